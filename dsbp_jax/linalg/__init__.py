"""Eigenvalues of symmetric operators; knows nothing of networks or optimizers.

`SymmetricOperator` is what everything here works on; `gram`, `product_gram`,
`skew_gram`, `matrix`, `hessian`, `gradient_jacobian` and `gauss_newton` build one.
`EigenBasis` is what everything else in the package passes around; `init_basis`,
`refresh_basis` and `top_eigenpairs` make one. `expm_lowrank_skew` and
`cayley_lowrank_skew` rotate.
`follow_leading` follows the leading part of a matrix that moves, by power steps.
`transport` moves one spike-plus-flat model onto another. `lanczos` is for
diagnostics. The formulas stand in `METHODS.md`, sections 0 and 5; what
is [P] printed in a source, [O] our own design, or [T] follows by algebra is tagged so.
"""

from dsbp_jax.linalg.basis import (
    EigenBasis as EigenBasis,
    RefreshInfo as RefreshInfo,
    init_basis as init_basis,
    refresh_basis as refresh_basis,
    refresh_with_info as refresh_with_info,
    top_eigenpairs as top_eigenpairs,
)
from dsbp_jax.linalg.factored import product_gram as product_gram
from dsbp_jax.linalg.growth import grow_basis as grow_basis
from dsbp_jax.linalg.lanczos import Lanczos as Lanczos, lanczos as lanczos
from dsbp_jax.linalg.leading import (
    Leading as Leading,
    expand as expand,
    follow_leading as follow_leading,
    principal as principal,
    times as times,
)
from dsbp_jax.linalg.operators import (
    SymmetricOperator as SymmetricOperator,
    gauss_newton as gauss_newton,
    gradient_jacobian as gradient_jacobian,
    gram as gram,
    hessian as hessian,
    matrix as matrix,
    skew_gram as skew_gram,
)
from dsbp_jax.linalg.orthogonal import extend_basis as extend_basis
from dsbp_jax.linalg.rotation import (
    RETRACTIONS as RETRACTIONS,
    cayley_lowrank_skew as cayley_lowrank_skew,
    expm_lowrank_skew as expm_lowrank_skew,
)
from dsbp_jax.linalg.spiked import (
    Spiked as Spiked,
    Transport as Transport,
    absorb as absorb,
    tail as tail,
    transport as transport,
)
from dsbp_jax.linalg.turn import Turn as Turn
