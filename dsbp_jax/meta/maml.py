"""MAML and its relatives: a start from which a few steps learn a task.

Over tasks i with a support set and a query set each, the meta-loss of a start θ is

    mean_i L_i^query(θ'_i),   θ'_i = the start after a few inner steps on L_i^support,

for an inner optimizer of any kind. What the relatives change: FOMAML takes the inner
updates for constants; ANIL adapts the head only; Reptile has no query set and pulls
the start towards θ'_i.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dsbp_jax import checks
from dsbp_jax.layers import leaves_by_path
from dsbp_jax.meta.adaptation import Adaptation, plain_params
from dsbp_jax.meta.learner import Maml, make_learner
from dsbp_jax.meta.tasks import TaskAxis


def maml(
    loss_fn: Callable[..., Any],
    inner: optax.GradientTransformation,
    num_steps: int,
    *,
    first_order: bool = False,
    task_axis: TaskAxis = "auto",
    checkpoint: bool = False,
) -> Maml:
    """Model-agnostic meta-learning with any inner optimizer.

    The inner optimizer may be spectral. A `spectral_projection` in it solves for its
    bases in each task, from the support set's gradient or activations (captured where
    the optimizer asks for them). Bases that are carried over tasks, tracked by an outer
    `track_bases`, are given as `bases=`; they cost the tasks two thin products a
    layer. Bases are constants to every derivative.

    Args:
      loss_fn: `loss_fn(params, batch)`, a floating-point scalar.
      inner: The optimizer that adapts, with its learning rate. It is also given
        `value`, `grad`, `value_fn` and `grad_fn`, for line searches and SAM, or those
        of them that its `update` takes (optax's own `sam`, which takes one, must not
        sit in an `optax.chain`, which hands it all). The
        second order differentiates through its updates: give Adam an `eps_root` (its
        root has no derivative where a gradient is zero), and line searches, which are
        loops, `first_order=True`.
      num_steps: Inner steps, at least 1.
      first_order: Take the inner updates for constants (FOMAML): the meta-gradient is
        then that of the query loss at the adapted params.
      task_axis: How tasks are run: `"vmap"` all at once, `"map"` one after the other,
        a number so many at once. A task axis that is sharded is split over its mesh
        by `"vmap"` only. `"auto"` is `"vmap"`, or `"map"` on a CPU where some
        convolution of the loss stays one: those that are grouped, transposed or not of
        params. (The others run as products over patches there, which `vmap` does not
        slow down and which use more memory.)
      checkpoint: Compute what is inside of the inner steps again for the derivative:
        memory then grows with `num_steps` by the params and the optimizer's state
        only. Refreshes inside of the tasks run twice.

    Returns:
      The functions; see `Maml`.

    Raises:
      ValueError: An argument is out of its range. When called: tasks are no pair of
        trees with one leading task axis, the loss is no scalar, or `bases` do not fit.

    References:
      [P] Finn, Abbeel and Levine, Model-agnostic meta-learning for fast adaptation of
      deep networks, ICML 2017. [O] Spectral inner optimizers: METHODS section 6.

    Example:
      >>> import jax, jax.numpy as jnp, optax, dsbp_jax
      >>> loss_fn = lambda p, batch: jnp.mean((batch[0] @ p["w"] - batch[1]) ** 2)
      >>> params = {"w": jnp.zeros((3, 1))}
      >>> learner = dsbp_jax.meta.maml(loss_fn, optax.sgd(0.1), num_steps=2)
      >>> x = jax.random.normal(jax.random.key(0), (4, 10, 3))  # 4 tasks, 10 examples
      >>> tasks = ((x, x @ jnp.ones((3, 1))), (x, x @ jnp.ones((3, 1))))
      >>> value, grads = jax.value_and_grad(learner.meta_loss)(params, tasks)
      >>> grads["w"].shape, learner.curve(params, tasks).shape
      ((3, 1), (4, 3))
    """
    adaptation = _adaptation(
        loss_fn, inner, num_steps, first_order=first_order, checkpoint=checkpoint
    )
    return make_learner(adaptation, task_axis)


def anil(
    loss_fn: Callable[..., Any],
    inner: optax.GradientTransformation,
    num_steps: int,
    *,
    head: str | Sequence[str],
    first_order: bool = False,
    task_axis: TaskAxis = "auto",
    checkpoint: bool = False,
) -> Maml:
    """MAML that adapts a part of the params only, mostly the last layer.

    Args:
      loss_fn: `loss_fn(params, batch)`, a floating-point scalar.
      inner: The optimizer that adapts, with its learning rate; any Optax
        transformation. It sees the leaves that are adapted.
      num_steps: Inner steps, at least 1.
      head: Canonical paths of what is adapted, leaves or whole branches (`"head"`
        stands for `"head/kernel"` and `"head/bias"`).
      first_order: Take the inner updates for constants (FOMAML).
      task_axis: `"vmap"` runs all tasks at once, `"map"` one after the other, a number
        so many at once; `"auto"` is `"vmap"`, or `"map"` on a CPU where some
        convolution of the loss can't run as a product over patches.
      checkpoint: Compute what is inside of the inner steps again for the derivative,
        which saves memory.

    Returns:
      The functions; see `Maml`.

    Raises:
      ValueError: An argument is out of its range. When called: a path of `head` names
        no leaf, tasks are no pair of trees with one leading task axis, the loss is no
        scalar, or `bases` do not fit.

    References:
      [P] Raghu et al., Rapid learning or feature reuse?, ICLR 2020.

    Example:
      >>> import jax.numpy as jnp, optax, dsbp_jax
      >>> forward = lambda p, x: x @ p["body"]["w"] @ p["head"]["w"]
      >>> loss_fn = lambda p, x: jnp.mean((forward(p, x) - 1) ** 2)
      >>> params = {"body": {"w": jnp.eye(2)}, "head": {"w": jnp.zeros((2, 1))}}
      >>> learner = dsbp_jax.meta.anil(loss_fn, optax.sgd(0.1), 1, head="head")
      >>> adapted = learner.adapt(params, jnp.ones((4, 2)))
      >>> adapted["body"]["w"].tolist(), adapted["head"]["w"].ravel()
      ([[1.0, 0.0], [0.0, 1.0]], Array([0.2, 0.2], dtype=float32))
    """
    names = (head,) if isinstance(head, str) else head
    if not (isinstance(names, Sequence) and names) or not all(
        isinstance(name, str) and name for name in names
    ):
        raise ValueError(f"head must be canonical paths of leaves, got {head!r}")
    under = lambda path, name: path == name or path.startswith(name + "/")
    adaptation = _adaptation(
        loss_fn,
        inner,
        num_steps,
        first_order=first_order,
        checkpoint=checkpoint,
        moves=lambda path: any(under(path, name) for name in names),
    )

    def check(params: Any) -> None:
        paths = list(leaves_by_path(plain_params(params)))
        for name in names:
            if not any(under(path, name) for path in paths):
                raise ValueError(
                    f"head must name leaves of params ({', '.join(paths)}), "
                    f"got {name!r}"
                )

    return make_learner(adaptation, task_axis, check)


def reptile(
    loss_fn: Callable[..., Any],
    inner: optax.GradientTransformation,
    num_steps: int,
    *,
    batch_size: int | None = None,
    task_axis: TaskAxis = "auto",
) -> Maml:
    """Reptile: moves the start towards the params that each task ends with.

    There is no query set: training adapts to all examples of a task. The meta-loss is
    `½ mean_i ‖θ − θ'_i‖²` with θ'_i held constant, so that its gradient is Reptile's
    step `θ − mean θ'_i`, for any outer optimizer (`optax.sgd(ε)` is the original).

    Args:
      loss_fn: `loss_fn(params, batch)`, a floating-point scalar.
      inner: The optimizer that adapts, with its learning rate; any Optax
        transformation.
      num_steps: Inner steps, at least 1.
      batch_size: Examples of an inner step in training, support and query set joined
        and gone through in their order, around and around; shuffle them or let classes
        alternate. None takes all in each step. `adapt` and `curve` always take the
        whole support set.
      task_axis: `"vmap"` runs all tasks at once, `"map"` one after the other, a number
        so many at once; `"auto"` is `"vmap"`, or `"map"` on a CPU where some
        convolution of the loss can't run as a product over patches.

    Returns:
      The functions; see `Maml`.

    Raises:
      ValueError: An argument is out of its range. When called: params have rates,
        tasks are no pair of trees with one leading task axis, the loss is no scalar, or
        `bases` do not fit.

    References:
      [P] Nichol, Achiam and Schulman, On first-order meta-learning algorithms, arXiv
      1803.02999, 2018.

    Example:
      >>> import jax, jax.numpy as jnp, optax, dsbp_jax
      >>> loss_fn = lambda w, x: 0.5 * jnp.mean((x - w) ** 2)
      >>> learner = dsbp_jax.meta.reptile(loss_fn, optax.sgd(0.5), num_steps=1)
      >>> tasks = (jnp.full((4, 2), 1.0), jnp.full((4, 2), 3.0))
      >>> jax.grad(learner.meta_loss)(jnp.zeros(()), tasks).item()
      -1.0
    """
    if batch_size is not None:
        batch_size = checks.positive_int("batch_size", batch_size)
    adaptation = _adaptation(loss_fn, inner, num_steps, first_order=True)
    training = _adaptation(
        loss_fn, inner, num_steps, first_order=True, batch_size=batch_size
    )

    def task_loss(params: Any, task: Any, bases: Any, key: Any) -> jax.Array:
        joined = jax.tree.map(lambda *parts: jnp.concatenate(parts), *task)
        adapted, _ = training.run(params, joined, bases=bases, key=key)
        return _half_squared_distance(params, jax.lax.stop_gradient(adapted))

    def check(params: Any) -> None:
        if plain_params(params) is not params:
            raise ValueError(
                "params must be without rates for reptile, whose step does not learn "
                "them, got WithRates"
            )

    return make_learner(adaptation, task_axis, check, task_loss)


def _half_squared_distance(a: Any, b: Any) -> jax.Array:
    return 0.5 * optax.tree.norm(optax.tree.sub(a, b), squared=True)


def _adaptation(
    loss_fn: Callable[..., Any],
    inner: optax.GradientTransformation,
    num_steps: int,
    **options: Any,
) -> Adaptation:
    """Checks what all have in common."""
    if not callable(loss_fn):
        raise ValueError(f"loss_fn must be a function, got {loss_fn!r}")
    if not (callable(getattr(inner, "init", None)) and hasattr(inner, "update")):
        raise ValueError(f"inner must be an optax transformation, got {inner!r}")
    return Adaptation(
        loss_fn=loss_fn,
        inner=_with_all_arguments(inner),
        num_steps=checks.positive_int("num_steps", num_steps),
        **options,
    )


def _with_all_arguments(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """The optimizer, given those of the arguments that its `update` knows."""
    known = inspect.signature(inner.update).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in known.values())

    def update(
        updates: Any, state: Any, params: Any = None, **more: Any
    ) -> tuple[Any, Any]:
        some = {name: more[name] for name in more if takes_all or name in known}
        return inner.update(updates, state, params, **some)

    return optax.GradientTransformationExtraArgs(inner.init, update)
