"""Eigenvalues of symmetric operators; knows nothing of networks or optimizers.

`SymmetricOperator` is what everything here works on; `gram`, `matrix`,
`hessian` and `gauss_newton` build one. `EigenBasis` is what everything else in
the package passes around; `init_basis`, `refresh_basis` and `top_eigenpairs`
make one. `lanczos` is for diagnostics.
"""

from dsbp_jax.linalg.basis import (
    EigenBasis as EigenBasis,
)
from dsbp_jax.linalg.basis import (
    RefreshInfo as RefreshInfo,
)
from dsbp_jax.linalg.basis import (
    init_basis as init_basis,
)
from dsbp_jax.linalg.basis import (
    refresh_basis as refresh_basis,
)
from dsbp_jax.linalg.basis import (
    refresh_with_info as refresh_with_info,
)
from dsbp_jax.linalg.basis import (
    top_eigenpairs as top_eigenpairs,
)
from dsbp_jax.linalg.batching import unbatched_max as unbatched_max
from dsbp_jax.linalg.lanczos import Lanczos as Lanczos
from dsbp_jax.linalg.lanczos import lanczos as lanczos
from dsbp_jax.linalg.operators import (
    SymmetricOperator as SymmetricOperator,
)
from dsbp_jax.linalg.operators import (
    gauss_newton as gauss_newton,
)
from dsbp_jax.linalg.operators import (
    gram as gram,
)
from dsbp_jax.linalg.operators import (
    hessian as hessian,
)
from dsbp_jax.linalg.operators import (
    matrix as matrix,
)
