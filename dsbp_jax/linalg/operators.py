"""Symmetric operators: matrices known only by what they do to a block of vectors.

An operator is a pytree. Its callables are `jax.tree_util.Partial`s: the function
is static, the arrays it reads are data, so an operator crosses a `jit` boundary
without closing over tracers and two operators of one kind share one compilation.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial

from dsbp_jax import checks

# A difference of equal products leaves this much of them.
_SKEW_ROUNDING = 1e-5

MatMat = Callable[[jax.Array], jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SymmetricOperator:
    """A symmetric `(dim, dim)` matrix C, never formed.

    Attributes:
      matmat: Maps V of shape `(dim, k)` to CV, float32.
      dim: Size of C; static.
      trace: Trace of C, shape `()`, float32; zero where it is not known.
      half: Optional factor, `half(V)` of shape `(n, k)` with `half(V)ᵀ half(V) =
        VᵀCV`. With it, a projection of C on a subspace needs half the products
        and its error is not squared.

    Example:
      >>> c = jnp.diag(jnp.array([3.0, 1.0]))
      >>> operator = SymmetricOperator(lambda v: c @ v, dim=2, trace=jnp.trace(c))
      >>> operator.matmat(jnp.eye(2))[0, 0]
      Array(3., dtype=float32)
    """

    matmat: MatMat
    dim: int = dataclasses.field(metadata={"static": True})
    trace: jax.Array
    half: MatMat | None = None

    def __post_init__(self) -> None:
        """Makes plain functions pytrees (of no arrays)."""
        for name in ("matmat", "half"):
            function = getattr(self, name)
            if callable(function) and not isinstance(function, Partial):
                object.__setattr__(self, name, Partial(function))


def require_floating(name: str, x: jax.Array, ndim: int) -> None:
    """Raises unless this is a floating-point array of so many axes, with entries."""
    floating = jnp.issubdtype(jnp.result_type(x), jnp.floating)
    if jnp.ndim(x) != ndim or not floating or 0 in jnp.shape(x):
        raise ValueError(
            f"{name} must be a floating-point array with {ndim} axes, none empty, got "
            f"shape {jnp.shape(x)} and dtype {jnp.result_type(x)}"
        )


def _right_product(x: jax.Array, v: jax.Array) -> jax.Array:
    """`x v` for a thin v."""
    return x @ v


def left_product(x: jax.Array, v: jax.Array) -> jax.Array:
    """`xᵀ v` for a thin v, or stacks of both.

    `(vᵀx)ᵀ` runs twice as fast on a CPU; the barriers keep the compiler from turning
    it back.
    """
    barrier = jax.lax.optimization_barrier
    batch = tuple(range(x.ndim - 2))
    axes = (((x.ndim - 2,), (x.ndim - 2,)), (batch, batch))
    return barrier(jax.lax.dot_general(barrier(v), x, axes)).mT


def _times(y: jax.Array, factor: jax.Array | None) -> jax.Array:
    return y if factor is None else y * factor


def _gram_half(x: jax.Array, root: jax.Array | None, v: jax.Array) -> jax.Array:
    return _times(_right_product(x, v), root)


def _gram_matmat(x: jax.Array, root: jax.Array | None, v: jax.Array) -> jax.Array:
    return _times(left_product(x, _gram_half(x, root, v)), root)


def _row_gram_half(x: jax.Array, root: jax.Array | None, v: jax.Array) -> jax.Array:
    return _times(left_product(x, v), root)


def _row_gram_matmat(x: jax.Array, root: jax.Array | None, v: jax.Array) -> jax.Array:
    return _times(_right_product(x, _row_gram_half(x, root, v)), root)


def gram(
    x: jax.Array, *, count: jax.Array | float | None = None, axis: int = 1
) -> SymmetricOperator:
    """The covariance `xᵀx / count` of the rows of x, not centred.

    Args:
      x: Rows, shape `(n, d)`, any floating dtype; read as float32.
      count: What to divide by; default n. Rows of zeros may be left out of it.
      axis: The axis that the operator acts on. With 0 the samples are the columns:
        x has shape `(d, n)` and the operator is `xxᵀ / count`.

    Returns:
      An operator of dimension d with a factor, `half(v) = xv/√count`.

    Raises:
      ValueError: x is not a floating-point matrix with entries, `count` is
        negative, or `axis` is not 0 or 1.

    References:
      [P] Muthuraman, Dynamic spectral backpropagation, arXiv 2505.23369, 2025, has
      `xᵀx` of a layer's outputs. [O] Divided by the rows: METHODS section 0.

    Example:
      >>> operator = gram(jnp.array([[1.0, 0.0], [0.0, 2.0]]))
      >>> print(operator.matmat(jnp.eye(2)))
      [[0.5 0. ]
       [0.  2. ]]
    """
    require_floating("x", x, 2)
    if count is not None:
        checks.non_negative("count", count)
    if axis not in (0, 1):
        raise ValueError(f"axis must be 0 or 1, got {axis!r}")
    x = jnp.asarray(x, jnp.float32)
    trace, root = jnp.vdot(x, x, precision="highest"), None
    if not checks.is_static(count, 1):
        count = jnp.asarray(x.shape[1 - axis] if count is None else count, jnp.float32)
        # No row counted is an empty covariance, not a division by zero.
        scale = jnp.where(count > 0, 1 / jnp.where(count > 0, count, 1), 0)
        trace, root = trace * scale, jnp.sqrt(scale)
    matmat, half = (
        (_gram_matmat, _gram_half) if axis == 1 else (_row_gram_matmat, _row_gram_half)
    )
    return SymmetricOperator(
        matmat=Partial(matmat, x, root),
        dim=x.shape[axis],
        trace=trace,
        half=Partial(half, x, root),
    )


def _skew_half(g: jax.Array, w: jax.Array, v: jax.Array) -> jax.Array:
    left = _right_product(g, left_product(w, v))
    return 0.5 * (left - _right_product(w, left_product(g, v)))


def _skew_matmat(g: jax.Array, w: jax.Array, v: jax.Array) -> jax.Array:
    return -_skew_half(g, w, _skew_half(g, w, v))


def skew_gram(g: jax.Array, w: jax.Array) -> SymmetricOperator:
    """The operator `AᵀA` of the skew matrix `A = ½(GWᵀ − WGᵀ)`, which is not formed.

    Its leading eigenvectors, in pairs, are the planes in which `exp(−A) W` turns most.

    Args:
      g: Shape `(d, n)`, any floating dtype; read as float32.
      w: Shape `(d, n)`.

    Returns:
      An operator of dimension d with a factor, `half(v) = Av`. Its trace is an
      estimate from 16 fixed random signs for each row, unbiased over signs
      (Hutchinson); zero where A is nothing but rounding.

    Raises:
      ValueError: The arguments are not floating-point matrices of one shape.

    References:
      [O] METHODS section 5. [P] Hutchinson, A stochastic estimator of the trace, 1989.

    Example:
      >>> operator = skew_gram(jnp.array([[0.0], [2.0]]), jnp.array([[1.0], [0.0]]))
      >>> print(jnp.abs(operator.matmat(jnp.eye(2))))
      [[1. 0.]
       [0. 1.]]
    """
    require_floating("g", g, 2)
    require_floating("w", w, 2)
    if g.shape != w.shape:
        raise ValueError(f"g and w must have one shape, got {g.shape} and {w.shape}")
    g, w = jnp.asarray(g, jnp.float32), jnp.asarray(w, jnp.float32)
    probes = 16
    signs = jax.random.rademacher(jax.random.key(0), (len(g), probes), jnp.float32)
    # A difference of products that are nearly equal.
    with jax.default_matmul_precision("highest"):
        image = _skew_half(g, w, signs)
        whole = _right_product(g, left_product(w, signs))
        trace = jnp.vdot(image, image) / probes
        rounding = _SKEW_ROUNDING**2 * jnp.vdot(whole, whole) / probes
    return SymmetricOperator(
        matmat=Partial(_skew_matmat, g, w),
        dim=len(g),
        # A NaN is kept.
        trace=jnp.where(trace <= rounding, 0, trace),
        half=Partial(_skew_half, g, w),
    )


def _matrix_matmat(c: jax.Array, v: jax.Array) -> jax.Array:
    return c @ v


def matrix(c: jax.Array) -> SymmetricOperator:
    """An operator from a dense symmetric matrix.

    Args:
      c: Shape `(d, d)`, symmetric, any floating dtype; read as float32.

    Returns:
      An operator of dimension d.

    Raises:
      ValueError: c is not a square floating-point matrix.

    Example:
      >>> matrix(jnp.eye(3)).trace
      Array(3., dtype=float32)
    """
    require_floating("c", c, 2)
    if c.shape[0] != c.shape[1]:
        raise ValueError(f"c must be square, got shape {c.shape}")
    c = jnp.asarray(c, jnp.float32)
    return SymmetricOperator(Partial(_matrix_matmat, c), c.shape[0], jnp.trace(c))


@dataclasses.dataclass(frozen=True)
class _AlongTree:
    """A product on parameter trees, applied to the columns of a matrix.

    A frozen dataclass rather than a closure: two of them compare equal, so that
    operators built from one loss share one compilation.
    """

    product: Callable[..., Any]
    functions: tuple[Callable, ...]

    def __call__(self, params: Any, args: tuple, v: jax.Array) -> jax.Array:
        """Applies the product at `params` to v, shape `(dim, k)`."""
        flat, unravel = ravel_pytree(params)

        def one_column(column: jax.Array) -> jax.Array:
            tangent = jax.tree.map(
                lambda t, p: t.astype(p.dtype),
                unravel(column.astype(flat.dtype)),
                params,
            )
            product = self.product(*self.functions, params, tangent, args)
            return ravel_pytree(product)[0].astype(jnp.float32)

        if v.shape[1] == 1:
            # A batch of one would still turn convolutions into grouped ones.
            return one_column(v[:, 0])[:, None]
        return jax.vmap(one_column, in_axes=1, out_axes=1)(v)


def _tree_operator(product: _AlongTree, params: Any, args: tuple) -> SymmetricOperator:
    flat, _ = ravel_pytree(params)
    unknown = jnp.zeros((), jnp.float32)
    return SymmetricOperator(Partial(product, params, args), flat.size, unknown)


def hessian(
    loss_fn: Callable[..., jax.Array], params: Any, *args: Any
) -> SymmetricOperator:
    """The Hessian of a loss over all parameters, raveled into one vector.

    Args:
      loss_fn: `loss_fn(params, *args)`, a scalar; twice differentiable.
      params: Any pytree of floating-point arrays.
      *args: Further arguments (arrays or pytrees of them) of the loss.

    Returns:
      An operator whose dimension is the number of parameters; its products are
      forward-over-reverse. Its trace is not known (zero).

    References:
      [P] Pearlmutter, Fast exact multiplication by the Hessian, 1994.

    Example:
      >>> loss = lambda w: 0.5 * jnp.sum(jnp.array([1.0, 4.0]) * w**2)
      >>> print(hessian(loss, jnp.ones(2)).matmat(jnp.eye(2)))
      [[1. 0.]
       [0. 4.]]
    """
    return _tree_operator(_AlongTree(_hessian_product, (loss_fn,)), params, args)


def _hessian_product(loss_fn: Callable, params: Any, tangent: Any, args: tuple) -> Any:
    return _jacobian_product(jax.grad(loss_fn), params, tangent, args)


def gradient_jacobian(
    grad_fn: Callable[..., Any], params: Any, *args: Any
) -> SymmetricOperator:
    """The Hessian of a loss of which only the gradient is at hand, raveled.

    Args:
      grad_fn: `grad_fn(params, *args)`, the gradient of some loss; differentiable.
      params: Any pytree of floating-point arrays.
      *args: Further arguments (arrays or pytrees of them) of the gradient.

    Returns:
      An operator like that of `hessian`: of the number of parameters, its trace not
      known (zero).

    References:
      [T] The Jacobian of a gradient is the Hessian, hence symmetric.

    Example:
      >>> gradient = lambda w: jnp.array([1.0, 4.0]) * w
      >>> print(gradient_jacobian(gradient, jnp.ones(2)).matmat(jnp.eye(2)))
      [[1. 0.]
       [0. 4.]]
    """
    return _tree_operator(_AlongTree(_jacobian_product, (grad_fn,)), params, args)


def _jacobian_product(grad_fn: Callable, params: Any, tangent: Any, args: tuple) -> Any:
    return jax.jvp(lambda p: grad_fn(p, *args), (params,), (tangent,))[1]


def gauss_newton(
    loss_fn: Callable[..., jax.Array],
    model_fn: Callable[..., Any],
    params: Any,
    *args: Any,
) -> SymmetricOperator:
    """The generalised Gauss-Newton matrix `Jᵀ H J`, raveled like `hessian`.

    J is the Jacobian of the model's outputs, H the Hessian of the loss by those
    outputs; positive semi-definite where the loss is convex in the outputs.

    Args:
      loss_fn: `loss_fn(outputs)`, a scalar.
      model_fn: `model_fn(params, *args)`, the outputs.
      params: Any pytree of floating-point arrays.
      *args: Further arguments (arrays or pytrees of them) of the model.

    Returns:
      An operator whose dimension is the number of parameters. Its trace is not
      known (zero).

    References:
      [P] Schraudolph, Fast curvature matrix-vector products, 2002.

    Example:
      >>> model = lambda w, x: x @ w
      >>> loss = lambda y: 0.5 * jnp.sum(y**2)
      >>> x = jnp.array([[1.0, 0.0], [0.0, 2.0]])
      >>> print(gauss_newton(loss, model, jnp.ones(2), x).matmat(jnp.eye(2)))
      [[1. 0.]
       [0. 4.]]
    """
    product = _AlongTree(_gauss_newton_product, (loss_fn, model_fn))
    return _tree_operator(product, params, args)


def _gauss_newton_product(
    loss_fn: Callable, model_fn: Callable, params: Any, tangent: Any, args: tuple
) -> Any:
    model = lambda p: model_fn(p, *args)
    outputs, outputs_tangent = jax.jvp(model, (params,), (tangent,))
    _, curved = jax.jvp(jax.grad(loss_fn), (outputs,), (outputs_tangent,))
    _, pullback = jax.vjp(model, params)
    return pullback(curved)[0]
