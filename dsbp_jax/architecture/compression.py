"""The smaller model: its leaves, and the function that runs on them."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsbp_jax.architecture.axis_walk import AxisTrace, trace_axes
from dsbp_jax.architecture.cuts import Cut, apply_cuts, sizes_of, weights_of
from dsbp_jax.architecture.plans import Plan
from dsbp_jax.architecture.resize import run
from dsbp_jax.layers import array_leaves, leaves_by_path, split_arrays

_AGREES = 1e-4
MASKED = 1e8  # so large an output stands for minus infinity


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of a model.

    Attributes:
      flops: Operations of its products, over those of the original.
      parameters: Numbers in its leaves, likewise.
      same_function: Whether the function itself runs on the smaller leaves and agrees
        with `apply`: then nothing but the leaves is needed.
      note: Why it does not, or "".
    """

    flops: float
    parameters: float
    same_function: bool
    note: str = ""


class Compressed(NamedTuple):
    """A smaller model.

    Attributes:
      apply: `apply(params, x)`: the function, on smaller leaves. Differentiable; inputs
        of another shape are traced anew, so wrap it in `jax.jit`.
      params: The smaller leaves, in the tree of the original.
      report: What became of it.
    """

    apply: Callable[[Any, Any], Any]
    params: Any
    report: Report


def compress(fn: Callable[..., Any], params: Any, plan: Plan) -> Compressed:
    """Cuts a model to the widths of a plan.

    Args:
      fn: The function `fn(params, x)` that was planned.
      params: Its parameters, as they were planned.
      plan: What `plan` returned.

    Returns:
      The smaller model. `params` is untouched.

    Raises:
      ValueError: The parameters have other shapes than those that were planned.

    References:
      [O] METHODS section 10. Selection with least squares for what follows: [P] Lin et
      al., MoDeGPT, ICLR 2025; eigenbases between linear maps: [P] Ashkboos et al.,
      SliceGPT, ICLR 2024.

    Example:
      >>> import numpy as np
      >>> from dsbp_jax import architecture
      >>> w = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
      >>> params = {"up": jnp.asarray(np.tile(w, 2)), "down": jnp.ones((8, 2))}
      >>> fn = lambda params, x: jnp.tanh(x @ params["up"]) @ params["down"]
      >>> x = jnp.asarray(np.random.default_rng(1).normal(size=(50, 3)), jnp.float32)
      >>> plan = architecture.plan(fn, params, [x], energy=1.0, multiple_of=1)
      >>> small = architecture.compress(fn, params, plan)
      >>> small.params["up"].shape, small.params["down"].shape
      ((3, 4), (4, 2))
      >>> bool(jnp.allclose(small.apply(small.params, x), fn(params, x), atol=1e-5))
      True
    """
    structure = plan.structure
    structs = {
        path: (leaf.shape, leaf.dtype) for path, leaf in structure.traced.leaves.items()
    }
    given = leaves_by_path(params)
    for path, (shape, dtype) in structs.items():
        leaf = given.get(path)
        if leaf is None or (leaf.shape, leaf.dtype) != (shape, dtype):
            found = "no such leaf" if leaf is None else f"{leaf.dtype}{leaf.shape}"
            raise ValueError(
                f"params must be those that were planned: {path!r} was "
                f"{dtype}{shape}, got {found}"
            )
    small = apply_cuts(structure, params, plan.cuts)
    apply = resized(fn, params, plan.cuts)
    same, note = _same(fn, apply, small, plan.sample)
    return Compressed(apply, small, Report(plan.flops, plan.parameters, same, note))


def resized(
    fn: Callable[..., Any], params: Any, cuts: tuple[Cut, ...]
) -> Callable[[Any, Any], Any]:
    """A function on smaller leaves; another one than was planned, too.

    So a network is trained after the cut: the smaller leaves were found for how it runs
    at inference, and in training it runs otherwise, with statistics of the batch.
    Running means and variances must be taken again even where nothing is trained: what
    least squares repair varies less than what it stands for.

    Args:
      fn: A function `fn(params, x)` of the same leaves.
      params: The parameters as they were planned; their shapes matter.
      cuts: Those of the plan, `plan.cuts`.

    Returns:
      `apply(small_params, x)`, which returns what `fn` does, at the smaller sizes.
      Differentiable; wrap it in `jax.jit`.

    Raises:
      ValueError: When called: the leaves are not those of the smaller model, or `fn`
        takes their axes apart in another way than the function that was planned.

    Example:
      >>> from dsbp_jax import architecture
      >>> def model(params, x, training=False):
      ...     hidden = x @ params["up"]
      ...     mean = hidden.mean(0) if training else params["mean"]
      ...     return jax.nn.relu(hidden - mean) @ params["down"], mean
      >>> x = jax.random.normal(jax.random.key(0), (64, 4))
      >>> up, down = jax.random.normal(jax.random.key(1), (2, 4, 16))
      >>> params = {"up": up, "mean": jnp.zeros(16), "down": down.T}
      >>> inference = lambda params, x: model(params, x)[0]
      >>> plan = architecture.plan(inference, params, [x], flops=0.5)
      >>> small = architecture.compress(inference, params, plan)
      >>> training = lambda params, x: model(params, x, training=True)
      >>> y, mean = architecture.resized(training, params, plan.cuts)(small.params, x)
      >>> y.shape, mean.shape
      ((64, 4), (8,))
    """
    original = jax.tree.map(_struct, params)

    def apply(small: Any, x: Any) -> Any:
        structure: AxisTrace = trace_axes(fn, original, (jax.tree.map(_struct, x),))
        sizes = sizes_of(structure, cuts)
        arrays = array_leaves((small, x))
        _check(structure, sizes, arrays)
        return run(structure, sizes, arrays, weights_of(structure, cuts))

    return apply


def compiled(
    fn: Callable[..., Any], params: Any, x: Any
) -> tuple[Callable[[Any], Any], list[Any]]:
    """A function of its arrays alone, under `jax.jit`, and these arrays.

    Leaves that are no arrays, in or out, are static.
    """
    arrays, rebuild = split_arrays((params, x))
    return jax.jit(lambda arrays: array_leaves(fn(*rebuild(arrays)))), arrays


def _struct(leaf: Any) -> Any:
    if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
        return leaf
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _check(structure: AxisTrace, sizes: dict[int, int], arrays: list[Any]) -> None:
    for (path, leaf), array in zip(structure.leaves.items(), arrays, strict=False):
        wanted = tuple(structure.axes.resized(axis, sizes) for axis in leaf)
        if array.shape != wanted:
            raise ValueError(
                f"params must be the smaller leaves: {path!r} is {wanted}, "
                f"got {array.shape}"
            )


def _same(
    fn: Callable[..., Any], apply: Callable[..., Any], small: Any, x: Any
) -> tuple[bool, str]:
    """Whether a function itself runs on the smaller leaves, and agrees."""
    run, arrays = compiled(apply, small, x)
    wanted = run(arrays)
    try:
        run, arrays = compiled(fn, small, x)
        found = run(arrays)
    except Exception as error:  # whatever a framework's own check of shapes raises
        line = str(error).strip().splitlines()
        return False, f"fn refuses the smaller leaves: {line[0] if line else error!r}"
    for left, right in zip(found, wanted, strict=True):
        if left.shape != right.shape or left.dtype != right.dtype:
            return False, "fn returns another shape on the smaller leaves"
        if not _agree(np.asarray(left), np.asarray(right)):
            return False, "fn computes something else on the smaller leaves"
    return True, ""


def _agree(left: np.ndarray, right: np.ndarray) -> bool:
    """Whether two outputs are the same, but for rounding where they are floating."""
    if not jnp.issubdtype(right.dtype, jnp.floating):
        return bool(np.array_equal(left, right))
    left, right = left.astype(np.float64), right.astype(np.float64)
    plain = np.abs(right) < MASKED
    if not np.array_equal(left[~plain], right[~plain], equal_nan=True):
        return False
    scale = float(np.max(np.abs(right[plain]), initial=1e-30))
    return bool(np.all(np.abs(left[plain] - right[plain]) <= _AGREES * scale))
