"""Image classifiers in Flax NNX, one file each, all with one calling convention.

`build` makes a model by name. Every model maps float32 images
`(n, height, width, channels)` to float32 logits `(n, num_classes)`, keeps its
parameters in float32 and computes in the `dtype` it was built with. Layers are
the standard ones of Flax, so that they are found by how the model uses them.
"""

import inspect
from typing import Any

from flax import nnx

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
      ValueError: If the name or an option is unknown.

    Example:
      >>> model = build(
      ...     "mlp", image_shape=(8, 8, 1), num_classes=10, rngs=nnx.Rngs(0)
      ... )
      >>> import jax.numpy as jnp
      >>> model(jnp.zeros((2, 8, 8, 1))).shape
      (2, 10)
    """
    if name not in MODELS:
        raise ValueError(f"name={name!r}; accepted are {', '.join(MODELS)}")
    signature = inspect.signature(MODELS[name].__init__).parameters
    accepted = [key for key in signature if key not in _COMMON]
    if unknown := [key for key in options if key not in accepted]:
        raise ValueError(
            f"{', '.join(unknown)}: not an option of {name!r}; accepted are "
            f"{', '.join(accepted)}"
        )
    return MODELS[name](image_shape, num_classes, rngs=rngs, **options)


_COMMON = ("self", "image_shape", "num_classes", "rngs")
