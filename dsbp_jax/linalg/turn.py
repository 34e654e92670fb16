"""Turning and stretching matrices inside a basis: elements of rank 2k of an algebra.

With V of shape `(d, k)` orthonormal and P = VVᵀ, what of a skew matrix A touches V is

    PA + AP − PAP = VYᵀ − YVᵀ,   Y = −(I − ½P) A V,

and of a symmetric one `VZᵀ + ZVᵀ`, `Z = (I − ½P) S V`. Neither is ever formed.
"""

import jax
import jax.numpy as jnp

from dsbp_jax.batching import one_by_one
from dsbp_jax.linalg.operators import left_product
from dsbp_jax.linalg.orthogonal import extend_basis
from dsbp_jax.linalg.rotation import rotation_change

# Angles up to 30 to rounding level: (30/2⁴)¹³/13! is 6e-7.
_DOUBLINGS, _TERMS = 4, 13


class Turn:
    """The elements on one side of matrices W, and what they do.

    Matrices are `(*batch, d, n)` where they are turned from the left, `(*batch, n, d)`
    where from the right: the formulas then hold for their transposes.

    Args:
      basis: V, shape `(*batch, d, k)`, of the matrices' dtype; with k = d that is all
        of SO(d).
      left: Whether W is turned from the left.

    Example:
      >>> w = jnp.diag(jnp.array([3.0, 2.0, 1.0]))
      >>> turn = Turn(jnp.eye(3, 2), left=True)
      >>> y, _ = turn.elements(w, jnp.ones((3, 3)))
      >>> turned = turn.rotate(w, -0.1 * y, "exp")
      >>> print(jnp.linalg.svd(turned, compute_uv=False).round(4))
      [3. 2. 1.]
    """

    def __init__(self, basis: jax.Array, *, left: bool):
        self._v, self._left = basis, left
        self._whole = basis.shape[-1] == basis.shape[-2]

    def _down(self, flat: jax.Array, v: jax.Array) -> jax.Array:
        """`WᵀV`, shape `(*batch, n, k)`."""
        return left_product(flat, v) if self._left else flat @ v

    def _up(self, flat: jax.Array, t: jax.Array) -> jax.Array:
        """`W T`, shape `(*batch, d, k)`."""
        return flat @ t if self._left else left_product(flat, t)

    def _outer(self, v: jax.Array, t: jax.Array) -> jax.Array:
        """`V Tᵀ`, flat."""
        return v @ t.mT if self._left else t @ v.mT

    def elements(self, w: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Y and Z of kernels and gradients, shape `(*batch, d, k)`."""
        left = self._up(g, self._down(w, self._v))
        right = self._up(w, self._down(g, self._v))
        return self._halved(0.5 * (right - left)), self._halved(0.5 * (left + right))

    def _halved(self, x: jax.Array) -> jax.Array:
        """`(I − ½P) X`: what is inside counts from both sides."""
        return x - 0.5 * self._v @ (self._v.mT @ x)

    def transported(
        self, parts: tuple[jax.Array, ...], before: jax.Array | None
    ) -> tuple[jax.Array, ...]:
        """Y and Z of the same elements, from a basis before its refresh to V."""
        if before is None:
            return parts
        turned = before.mT @ self._v  # VᵀV'
        return tuple(
            self._halved(x @ turned + sign * before @ (x.mT @ self._v))
            for x, sign in zip(parts, (-1, 1), strict=False)
        )

    def rotate(self, w: jax.Array, y: jax.Array, retraction: str) -> jax.Array:
        """`exp(VYᵀ − YVᵀ) W`, or its Cayley transform; differentiable, V a constant."""

        @jax.custom_jvp
        def run(v: jax.Array, w: jax.Array, y: jax.Array) -> jax.Array:
            return Turn(v, left=self._left)._rotate(w, y, retraction)

        # An orthonormal basis of the span of V and Y has no derivative where Y adds
        # less than k directions; the rotation has.
        @run.defjvp
        def _(primals: tuple, tangents: tuple) -> tuple:
            turn = Turn(primals[0], left=self._left)
            smooth = lambda w, y: turn._rotate_smoothly(w, y, retraction)
            return run(*primals), jax.jvp(smooth, primals[1:], tangents[1:])[1]

        return run(self._v, w, y)

    def _rotate(self, w: jax.Array, y: jax.Array, retraction: str) -> jax.Array:
        u, inside = self._v, self._v.mT @ y
        j = inside.mT - inside
        if not self._whole:
            # The other directions of Y; all there are, where k of them do not fit.
            dim, rank = self._v.shape[-2:]
            outside = (y - self._v @ inside)[..., : dim - rank]
            extend = extend_basis
            for _ in y.shape[:-2]:
                extend = jax.vmap(extend)
            q = extend(self._v, outside)
            u, across = jnp.concatenate([self._v, q], axis=-1), q.mT @ y
            corner = jnp.zeros((*across.shape[:-1], across.shape[-2]), y.dtype)
            j = jnp.block([[j, across.mT], [-across, corner]])
        turn = rotation_change(j, retraction).astype(w.dtype)
        return w + self._outer(u, self._down(w, u) @ turn.mT)

    def _rotate_smoothly(
        self, w: jax.Array, y: jax.Array, retraction: str
    ) -> jax.Array:
        """The same as `(I + L f(KᵀL) Kᵀ) W` with `LKᵀ = VYᵀ − YVᵀ`.

        Smooth everywhere, and less exact; f(x) = (eˣ − 1)/x, or 1/(1 − x/2).
        """
        left = jnp.concatenate([self._v, -y], axis=-1)
        right = jnp.concatenate([y, self._v], axis=-1)
        core = _phi if retraction == "exp" else _resolvent
        f = core(right.mT @ left)
        return w + self._outer(left, self._down(w, right) @ f.mT)

    def stretch(self, w: jax.Array, z: jax.Array) -> jax.Array:
        """`(VZᵀ + ZVᵀ) W`."""
        parts = self._down(w, z), self._down(w, self._v)
        return self._outer(self._v, parts[0]) + self._outer(z, parts[1])


def _phi(m: jax.Array) -> jax.Array:
    """`Σ Mⁿ/(n + 1)!` by products alone: scaled, summed, and doubled again."""
    identity = jnp.broadcast_to(jnp.eye(m.shape[-1], dtype=m.dtype), m.shape)
    small, phi = m / 2**_DOUBLINGS, identity
    for n in range(_TERMS, 1, -1):
        phi = identity + small @ phi / n
    exp = identity + small @ phi
    for _ in range(_DOUBLINGS):
        phi, exp = 0.5 * (exp + identity) @ phi, exp @ exp
    return phi


def _resolvent(m: jax.Array) -> jax.Array:
    """`(I − M/2)⁻¹`."""
    identity = jnp.broadcast_to(jnp.eye(m.shape[-1], dtype=m.dtype), m.shape)
    inverse = one_by_one(jnp.linalg.inv)
    for _ in m.shape[:-2]:
        inverse = jax.vmap(inverse)
    return inverse(identity - 0.5 * m)
