"""The functions of a meta-learner around one way to adapt to a task."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsbp_jax import checks
from dsbp_jax.layers import LayerActivations, capture_activations
from dsbp_jax.meshes import specs_of, with_auto_axes
from dsbp_jax.meta.adaptation import START, Adaptation, key_argument, plain_params
from dsbp_jax.meta.patched import keeps_convolutions, with_patches
from dsbp_jax.meta.tasks import TaskAxis, check_task_axis, num_tasks, over_tasks
from dsbp_jax.ownership import own


class Maml(NamedTuple):
    """The functions of a meta-learner.

    `params` is a pytree of arrays, or what `with_rates` makes of one. `bases`, as
    `dsbp_jax.eigenspaces` or `activation_bases` return them, replaces the bases that a
    spectral inner optimizer would track in the task by itself: it then projects on
    these and refreshes none. They must name every leaf that it tracks, as it is called
    in `params` or in its start without rates, on each side on which it tracks it. A
    projection leaves gradients alone whose basis was never solved; `spectral_subspace`
    works in its random start. With a PRNG `key`, the loss is called as
    `loss_fn(params, batch, key=...)`, with a key of its own for each task and step.
    Under an Explicit mesh results are on each device, adapted params sharded like
    `params`. METHODS section 6 has the formulas.

    Attributes:
      adapt: `adapt(params, support, *, bases=None, key=None)`: the params after the
        inner steps on one task, whose arrays have shape `(example, …)`.
      meta_loss: `meta_loss(params, (support, query), *, bases=None, key=None)`: the
        mean over tasks, shape `()`; arrays have shape `(task, example, …)` and may be
        sharded over tasks. To be differentiated and given to any outer optimizer.
      curve: `curve(params, (support, query), metric_fn=None, *, bases=None,
        key=None)`: `metric_fn(params, query)`, the loss by default, of every task
        before the first inner step and after each: arrays of shape `(task,
        num_steps + 1, …)`.
      activations: `activations(params, (support, query), *, key=None)`: what the layers
        see of all support sets at the start, as `dsbp_jax.capture_activations` returns
        it, named as in `params`; for an outer `track_bases(source="activation")`.
    """

    adapt: Callable[..., Any]
    meta_loss: Callable[..., jax.Array]
    curve: Callable[..., Any]
    activations: Callable[..., dict[str, LayerActivations]]


def make_learner(
    adaptation: Adaptation,
    task_axis: TaskAxis,
    check: Callable[[Any], None] = lambda params: None,
    task_loss: Callable[..., jax.Array] | None = None,
) -> Maml:
    """The functions around one adaptation."""
    task_axis = check_task_axis(task_axis)
    loss_fn = adaptation.loss_fn

    def query_loss(params: Any, task: Any, bases: Any, key: Any) -> jax.Array:
        support, query = task
        adapted, _ = adaptation.run(params, support, bases=bases, key=key)
        last = key_argument(key, adaptation.num_steps)
        return checks.scalar_loss(with_patches(loss_fn)(adapted, query, **last))

    def each_task(
        function: Callable[..., Any],
        params: Any,
        tasks: Any,
        bases: Any,
        key: Any,
        *,
        axis: TaskAxis = task_axis,
    ) -> Any:
        """`function(params, task, bases, key)` of every task, stacked."""
        number = num_tasks(tasks)
        check(params)
        keys = None if key is None else jax.random.split(key, number)
        if axis == "auto":
            one = jax.tree.map(lambda leaf: leaf[0], tasks[0])
            some = {} if keys is None else {"key": keys[0]}
            keeps = keeps_convolutions(loss_fn, plain_params(params), one, **some)
            axis = "map" if keeps else "vmap"
        call = lambda given: function(params, given[0], bases, given[1])
        return over_tasks(call, (tuple(tasks), keys), axis)

    def adapt(params: Any, support: Any, *, bases: Any = None, key: Any = None) -> Any:
        check(params)

        def run(params: Any, support: Any, bases: Any, key: Any) -> Any:
            return own(adaptation.run(params, support, bases=bases, key=key)[0])

        specs = lambda: specs_of(plain_params(params))
        return with_auto_axes(run, params, support, bases, key, out_specs=specs)

    def meta_loss(
        params: Any, tasks: Any, *, bases: Any = None, key: Any = None
    ) -> jax.Array:
        mean = lambda *given: jnp.mean(each_task(task_loss or query_loss, *given))
        return with_auto_axes(mean, params, tasks, bases, key, out_specs=_replicated)

    def curve(
        params: Any,
        tasks: Any,
        metric_fn: Callable[..., Any] | None = None,
        *,
        bases: Any = None,
        key: Any = None,
    ) -> Any:
        metric = with_patches(metric_fn or loss_fn)

        def task_curve(params: Any, task: Any, bases: Any, key: Any) -> Any:
            support, query = task
            last = {} if metric_fn else key_argument(key, adaptation.num_steps)
            after = lambda params: metric(params, query, **last)
            first = after(plain_params(params))
            _, noted = adaptation.run(
                params, support, bases=bases, key=key, after=after
            )
            join = lambda a, b: jnp.concatenate([jnp.asarray(a)[None], b])
            return jax.tree.map(join, first, noted)

        curves = lambda *given: each_task(task_curve, *given)
        return with_auto_axes(curves, params, tasks, bases, key, out_specs=_replicated)

    def activations(
        params: Any, tasks: Any, *, key: Any = None
    ) -> dict[str, LayerActivations]:
        captured = capture_activations(loss_fn)

        def of_task(params: Any, task: Any, bases: Any, key: Any) -> Any:
            del bases
            return captured(plain_params(params), task[0], **key_argument(key, 0))[1]

        def pooled(*given: Any) -> dict[str, LayerActivations]:
            # Kernels are not batched here, so that convolutions may stay what they are.
            found = each_task(of_task, *given, axis="vmap")
            return {path: _pool(layer) for path, layer in found.items()}

        found = with_auto_axes(pooled, params, tasks, None, key, out_specs=_replicated)
        prefix = "" if plain_params(params) is params else f"{START}/"
        return {prefix + path: layer for path, layer in found.items()}

    return Maml(adapt, meta_loss, curve, activations)


def _replicated() -> jax.P:
    return jax.P()


def _pool(layer: LayerActivations) -> LayerActivations:
    """Of all tasks: rows `(task, *batch, n, d)` as `(*batch, task · n, d)`."""

    def pool(rows: Any) -> jax.Array:
        rows = jnp.moveaxis(rows, 0, -3)
        return rows.reshape(*rows.shape[:-3], -1, rows.shape[-1])

    return layer._replace(
        inputs=pool(layer.inputs),
        outputs=pool(layer.outputs),
        count=jnp.sum(layer.count, axis=0),
    )
