"""Image classifiers in Flax NNX, one file each, all with one calling convention.

`build` makes a model by name. Every model maps float32 images
`(n, height, width, channels)` to float32 logits `(n, num_classes)`, keeps its
parameters in float32 and computes in the `dtype` it was built with. Layers are
the standard ones of Flax, so that they are found by how the model uses them.
"""

import inspect
import typing
from typing import Any

import jax
from flax import nnx

from experiments import checks
from experiments.models.cnn import CNN as CNN
from experiments.models.conv4 import Conv4 as Conv4
from experiments.models.mlp import MLP as MLP
from experiments.models.resnet import ResNet18 as ResNet18
from experiments.models.vit import ViT as ViT

MODELS: dict[str, type[nnx.Module]] = {
    "mlp": MLP,
    "cnn": CNN,
    "conv4": Conv4,
    "resnet18": ResNet18,
    "vit": ViT,
}


def build(
    name: str,
    *,
    image_shape: tuple[int, int, int],
    num_classes: int,
    rngs: nnx.Rngs,
    **options: Any,
) -> nnx.Module:
    """Builds a model.

    Args:
      name: One of `MODELS`.
      image_shape: The shape `(height, width, channels)` of one image.
      num_classes: The number of logits.
      rngs: Random streams; `params` is used.
      **options: Options of that model, as its class documents them; all take
        `dtype`, the dtype of the computation.

    Returns:
      The model, in training mode; `model.train()` and `model.eval()` switch.

    Raises:
      ValueError: If the name or an option is unknown, or a value not accepted.

    Example:
      >>> model = build(
      ...     "mlp", image_shape=(8, 8, 1), num_classes=10, rngs=nnx.Rngs(0)
      ... )
      >>> import jax.numpy as jnp
      >>> model(jnp.zeros((2, 8, 8, 1))).shape
      (2, 10)
    """
    check(name, **options)
    try:
        return MODELS[name](image_shape, num_classes, rngs=rngs, **options)
    except (TypeError, OverflowError, MemoryError, jax.errors.JaxRuntimeError) as error:
        # Of a size that no array has, or that the memory has not.
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"{name!r} cannot be built with {options or 'its defaults'}: {reason}"
        ) from error


def check(name: str, **options: Any) -> None:
    """Checks the options of a model, as far as this needs no images.

    Args:
      name: One of `MODELS`.
      **options: Options of that model.

    Raises:
      ValueError: If the name or an option is unknown, or a value not accepted.

    Example:
      >>> check("cnn", channels=(32, 0))
      Traceback (most recent call last):
      ...
      ValueError: channels=(32, 0); accepted are one or more whole numbers from 1 to ...
    """
    checks.one_of("name", name, MODELS)
    model = MODELS[name]
    hints = typing.get_type_hints(model.__init__, include_extras=True)
    defaults = {
        key: parameter.default
        for key, parameter in inspect.signature(model.__init__).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and key != "rngs"
    }
    if unknown := [key for key in options if key not in defaults]:
        raise ValueError(
            f"{', '.join(unknown)}: not an option of {name!r}; accepted are "
            f"{', '.join(defaults)}"
        )
    for key, value in options.items():
        # Another's model may have options without an annotation.
        kind, *marks = typing.get_args(hints.get(key)) or (Any,)
        if value is None and type(None) in typing.get_args(kind):
            continue
        for mark in filter(callable, marks):
            mark(key, value)
    if hasattr(model, "check"):
        model.check(**(defaults | options))
