"""Training steps that cost less: the projection inside the backward pass.

Here lives whatever replaces `jax.value_and_grad`: `sketch` returns ordinary gradients
through a sketch of each layer's inputs, `coordinates` trains kernels in the span of
such a sketch only, `columns` keeps the columns of both. How a layer is found and its
equation rewritten is `layers`' work, what follows the gradient is any Optax optimizer.
"""

from dsbp_jax.backprop.coordinates import (
    Observed as Observed,
    SpectralCoordinates as SpectralCoordinates,
    spectral_coordinates as spectral_coordinates,
)
from dsbp_jax.backprop.cost import (
    sketch_flops as sketch_flops,
    why_plain as why_plain,
)
from dsbp_jax.backprop.frame import Frame as Frame, sizes as sizes, views as views
from dsbp_jax.backprop.shrink import decay_since as decay_since
from dsbp_jax.backprop.sketch import (
    SketchState as SketchState,
    SpectralBackprop as SpectralBackprop,
    spectral_backprop as spectral_backprop,
)
from dsbp_jax.backprop.training import (
    SpectralTraining as SpectralTraining,
    TrainingState as TrainingState,
    spectral_training as spectral_training,
)
