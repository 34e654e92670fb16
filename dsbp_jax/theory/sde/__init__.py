"""Optimizers as stochastic differential equations.

`methods` says what a step does with a gradient (SGD, SAM, DSBP, whitening), `equation`
turns that into drift and diffusion by Taylor expansion, `validity` says where the
expansion cannot hold. `paths` integrates it with diffrax, and runs the optimizer
itself beside it; `collocation` has the moments of both without sampling, for problems
of few parameters.
"""

from dsbp_jax.theory.sde.collocation import expectations as expectations
from dsbp_jax.theory.sde.equation import (
    Equation as Equation,
    modified_equation as modified_equation,
)
from dsbp_jax.theory.sde.methods import (
    Method as Method,
    dsbp as dsbp,
    sam as sam,
    sgd as sgd,
    whitened as whitened,
)
from dsbp_jax.theory.sde.paths import (
    Paths as Paths,
    optimizer_paths as optimizer_paths,
    sde_paths as sde_paths,
)
from dsbp_jax.theory.sde.validity import Validity as Validity, validity as validity
