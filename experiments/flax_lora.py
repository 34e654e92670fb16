"""Adapters of `dsbp_jax.spectral_lora` in the modules that Flax has for them."""

from typing import Any

from flax import nnx

from dsbp_jax import transfer


def with_lora(
    model: nnx.Module, adapters: dict[str, Any], frame: transfer.AdapterFrame
) -> nnx.Module:
    """Wraps the `nnx.Linear` modules of a model in `nnx.LoRA` that starts alike.

    `nnx.LoRAParam` then is what an optimizer of Flax is to train.

    Args:
      model: The model, which is changed; its parameters are those of the frame.
      adapters: As `spectral_lora(...).init` gives them, of the model's parameters.
      frame: Likewise.

    Returns:
      The same model.

    Raises:
      ValueError: An adapter is of another kind of module.

    Example:
      >>> import dsbp_jax, jax, jax.numpy as jnp
      >>> class Model(nnx.Module):
      ...     def __init__(self, rngs):
      ...         self.up = nnx.Linear(8, 6, rngs=rngs)
      ...     def __call__(self, x):
      ...         return self.up(x)
      >>> graph, params = nnx.split(Model(nnx.Rngs(0)))
      >>> fn = lambda params, x: nnx.merge(graph, params)(x)
      >>> lora = dsbp_jax.spectral_lora(fn, rank=2)
      >>> x = jax.random.normal(jax.random.key(0), (32, 8))
      >>> adapters, frame = lora.init(params, x, key=jax.random.key(1))
      >>> model = with_lora(nnx.merge(graph, params), adapters, frame)
      >>> model.up.lora_a.shape, bool(jnp.allclose(model(x), fn(params, x)))
      ((8, 2), True)
    """
    for path in frame.layout:
        *parents, name, _ = path.split("/")
        holder: Any = model
        for parent in parents:
            holder = _child(holder, parent)
        linear = _child(holder, name)
        if not isinstance(linear, nnx.Linear):
            raise ValueError(
                f"adapters={path!r} is of a {type(linear).__name__}; accepted are "
                "those of nnx.Linear"
            )
        down, up = adapters[path]
        down = frame.down[path] if down is None else down
        lora = nnx.LoRA(
            linear.in_features,
            up.shape[0],
            linear.out_features,
            base_module=linear,
            rngs=nnx.Rngs(0),
        )
        lora.lora_a, lora.lora_b = nnx.LoRAParam(down), nnx.LoRAParam(up)
        if name.isdigit():
            holder[int(name)] = lora
        else:
            setattr(holder, name, lora)
    return model


def _child(module: Any, name: str) -> Any:
    return module[int(name)] if name.isdigit() else getattr(module, name)
