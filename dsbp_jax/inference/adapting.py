"""Outputs on data that drift: moved where that helps, plain where it does not."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsbp_jax.inference import guard as guards
from dsbp_jax.inference.guard import Guard
from dsbp_jax.inference.inputs import (
    Models,
    arguments,
    canonical,
    finite,
    moved_pass,
    watched_pass,
)
from dsbp_jax.inference.measures import MEASURES, Drift, by_layer, of_layers, score_of
from dsbp_jax.inference.source import Source, leaves_of
from dsbp_jax.layers import Trace, trace
from dsbp_jax.ownership import own

_RETRY = 4  # batches between two looks at a moved model that is not trusted


class State(NamedTuple):
    """What is carried along a stream; of fixed shape.

    Attributes:
      watched: Models of layers' inputs as the plain model meets them on the probe.
      moved: Models of the inputs that are moved, as they are met before that.
      watched_images: Images that the former are of.  # shape=(), dtype=float32
      moved_images: Images that the latter are of.  # shape=(), dtype=float32
      probe: Images that drift is to be measured of, in small batches.
        # shape=(probed, *example)
      gathered: Of those, how many there are.  # shape=(), dtype=int32
      guard: What was seen of both models' answers.
      measures: Of drift.  # shape=(watched, 3), dtype=float32
      score: Of drift.  # shape=(), dtype=float32
      alarm: Whether there is drift.  # shape=(), dtype=bool
      adapted: Whether the last outputs were moved ones.  # shape=(), dtype=bool
      images: Since all began anew.  # shape=(), dtype=int32
      calls: Batches in all.  # shape=(), dtype=int32
    """

    watched: Models
    moved: Models
    watched_images: jax.Array
    moved_images: jax.Array
    probe: jax.Array
    gathered: jax.Array
    guard: Guard
    measures: jax.Array
    score: jax.Array
    alarm: jax.Array
    adapted: jax.Array
    images: jax.Array
    calls: jax.Array


def init(source: Source) -> State:
    """The state at the begin of a stream: nothing seen, all as on source data.

    Args:
      source: What `fit` returned.

    Returns:
      The state.

    Example:
      >>> from dsbp_jax import inference
      >>> x = jax.random.normal(jax.random.key(0), (12, 20, 3))
      >>> fn = lambda params, x: x @ params
      >>> state = inference.init(inference.fit(fn, jnp.ones((3, 2)), list(x)))
      >>> bool(state.alarm)
      False
    """
    prior = jnp.float32(source.settings.prior)
    state = State(
        {name: source.models[name] for name in source.watched},
        {name: source.models[name] for name in source.moved},
        prior,
        prior,
        jnp.zeros((source.probed, *source.shape), source.dtype),
        jnp.int32(0),
        guards.start(source.classes),
        jnp.zeros((len(source.watched), len(MEASURES)), jnp.float32),
        jnp.float32(0),
        jnp.array(False),
        jnp.array(False),
        jnp.int32(0),
        jnp.int32(0),
    )
    return own(state)  # a step may be given it away


def drift(source: Source, state: State) -> Drift:
    """How far the stream is from the source.

    Args:
      source: What `fit` returned.
      state: After the batches of the stream.

    Returns:
      Score, threshold, alarm, and the measures of each layer.

    Raises:
      ValueError: The state is of another source.

    References:
      [O] METHODS section 11.

    Example:
      >>> from dsbp_jax import inference
      >>> x = jax.random.normal(jax.random.key(0), (12, 160, 3))
      >>> fn, params = lambda params, x: x @ params["w"], {"w": jnp.eye(3)}
      >>> source = inference.fit(fn, params, list(x), layers=())  # an alarm alone
      >>> _, state = inference.adapt(fn, params, source, inference.init(source), x[0])
      >>> _, after = inference.adapt(fn, params, source, state, 3 * x[1] + 5)
      >>> drift = inference.drift(source, after)
      >>> bool(inference.drift(source, state).alarm), bool(drift.alarm)
      (False, True)
      >>> sorted(drift.layers["w"])
      ['angle', 'mean', 'spectrum']
    """
    _check_state(source, state)
    layers = by_layer(state.measures, source.watched)
    return Drift(state.score, source.threshold, state.alarm, layers)


def adapt(
    fn: Callable[[Any, Any], Any], params: Any, source: Source, state: State, x: Any
) -> tuple[Any, State]:
    """The outputs for a batch of a stream, and the state after it.

    The plain model looks at one row of `settings.probe` (at one batch of so many where
    batches are smaller): drift is measured there, as soon as `source.probed` rows are
    gathered. Without an alarm the outputs are those of `fn(params, x)`. With one, the
    inputs of the source's moved layers are carried back to where the source had them;
    the answers are handed out while the guard, which compares them with the plain ones
    on these rows, trusts them, and else the plain ones are, as they are where x is not
    finite.

    Args:
      fn: The function that was fitted.
      params: Its parameters.
      source: What `fit` returned.
      state: Of the stream so far.
      x: A batch; of any number of examples.

    Returns:
      Outputs and state. Wrap the call in `jax.jit`; batches of one size share a
      program.

    Raises:
      ValueError: x, the parameters or the state are not of the source.

    References:
      [O] METHODS section 11; [P] alignment of layers' inputs without gradients: PEA,
      ICLR 2026.

    Example:
      >>> from dsbp_jax import inference
      >>> fn = lambda params, x: x @ params
      >>> x = jax.random.normal(jax.random.key(0), (12, 160, 3))
      >>> source = inference.fit(fn, jnp.eye(3), list(x), layers=("",))
      >>> run = lambda state, x: inference.adapt(fn, jnp.eye(3), source, state, x)
      >>> step = jax.jit(run)
      >>> outputs, state = step(inference.init(source), x[0])
      >>> bool(jnp.all(outputs == x[0])), bool(state.adapted)
      (True, False)
      >>> outputs, state = step(inference.init(source), 3 * x[0] + 5)
      >>> bool(jnp.max(jnp.abs(jnp.mean(outputs, axis=0))) < 2.0), bool(state.adapted)
      (True, True)
    """
    settings = source.settings
    x = canonical(x)
    _check_input(source, x)
    _check_state(source, state)
    traced = trace(fn, params, (x,), {})
    _check_leaves(source, leaves_of(traced))
    arrays = arguments(params, x)
    sound = finite([x])
    state = _begun_anew(source, state, len(x))

    # The plain model, on the probe.
    stride = settings.stride(len(x))
    due = jnp.array(stride > 1) | (state.calls % settings.probe == 0)
    probe = x[::stride]
    images = len(probe)
    plain_model = trace(fn, params, (probe,), {})
    blank = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), plain_model.out)

    def measured(state: State, model: Trace, rows: Any) -> tuple[Any, State]:
        weight = len(rows) / (len(rows) + state.watched_images)
        plain, watched = watched_pass(
            model,
            arguments(params, rows),
            state.watched,
            weight,
            settings.rows,
        )
        return plain, _measured(source, state, watched, len(rows))

    def when_due(function: Callable[[Any], Any], state: Any, other: Any) -> Any:
        if stride > 1:
            return function(state)
        return jax.lax.cond(due, function, lambda state: other, state)

    if images < source.probed:
        gather = lambda state: _gathered(state, probe, sound)
        state = when_due(gather, state, state)
        whole = trace(fn, params, (state.probe,), {})

        def when_full(state: State) -> State:
            _, state = measured(state, whole, state.probe)
            return state._replace(gathered=jnp.int32(0))

        full = state.gathered >= source.probed
        state = jax.lax.cond(full, when_full, lambda state: state, state)
        plainly = lambda arrays: plain_model.run(arrays)
        answered = lambda: when_due(plainly, arguments(params, probe), blank)
    else:
        look = lambda state: measured(state, plain_model, probe)
        plain, state = when_due(look, state, (blank, state))
        answered = lambda: plain

    # The moved model, where it may be of use.
    retry = state.calls % (_RETRY if stride > 1 else settings.probe) == 0
    run = state.alarm & sound & (state.guard.trusted | retry)
    run &= bool(source.moved)

    def moving(state: State) -> tuple[Any, Models, Guard]:
        weight = len(x) / (len(x) + state.moved_images)
        outputs, models = moved_pass(
            traced,
            arrays,
            {name: source.models[name] for name in source.moved},
            state.moved,
            weight,
            settings.rows,
            settings.limit,
        )
        ours = jax.tree.map(lambda leaf: leaf[::stride], outputs)
        after = guards.compared(
            state.guard,
            answered(),
            ours,
            float(images),
            settings,
            source.classes,
            source.entropy,
            outputs,
        )
        kept = jax.tree.map(lambda a, b: jnp.where(due, a, b), after, state.guard)
        return outputs, models, kept

    def resting(state: State) -> tuple[Any, Models, Guard]:
        outputs = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), traced.out
        )
        return outputs, state.moved, state.guard

    outputs, models, guard = jax.lax.cond(run, moving, resting, state)
    use = run & guards.ready(guard) & finite(jax.tree.leaves(outputs))
    outputs = jax.lax.cond(
        use, lambda arrays: outputs, lambda arrays: traced.run(arrays), arrays
    )
    count = jnp.minimum(
        state.moved_images + jnp.where(run, float(len(x)), 0.0), settings.horizon
    )
    # Without drift, the next one is met with a fresh model.
    fresh = init(source)
    models, count = jax.tree.map(
        lambda a, b: jnp.where(state.alarm, a, b),
        (models, count),
        (fresh.moved, fresh.moved_images),
    )
    return outputs, state._replace(
        moved=models,
        moved_images=count,
        guard=guard,
        adapted=use,
        images=state.images + len(x),
        calls=state.calls + 1,
    )


def _begun_anew(source: Source, state: State, images: int) -> State:
    """The state, or where so many images have passed a new one."""
    over = state.images + images > source.settings.reset_every
    fresh = init(source)._replace(calls=state.calls)
    return jax.tree.map(lambda a, b: jnp.where(over, a, b), fresh, state)


def _gathered(state: State, rows: jax.Array, sound: jax.Array) -> State:
    """The state with so many more images of the probe; those over its end are lost."""
    at = state.gathered + jnp.arange(len(rows))
    found = state.probe.at[jnp.where(sound, at, len(state.probe))].set(
        rows, mode="drop"
    )
    return state._replace(
        probe=found, gathered=state.gathered + jnp.where(sound, len(rows), 0)
    )


def _measured(source: Source, state: State, watched: Models, images: int) -> State:
    """The state with the drift that the probe shows."""
    settings = source.settings
    found = of_layers(source.models, watched, source.watched)
    score = score_of(found, source.normal)
    level = jnp.where(state.alarm, settings.quiet, 1.0) * source.threshold
    most = settings.horizon / settings.probe
    return state._replace(
        watched=watched,
        watched_images=jnp.minimum(state.watched_images + images, most),
        measures=found,
        score=score,
        alarm=score > level,
    )


def _check_input(source: Source, x: Any) -> None:
    given = (tuple(x.shape[1:]), str(x.dtype)) if hasattr(x, "shape") else type(x)
    if given != (source.shape, source.dtype) or not len(x):
        wanted = ", ".join(map(str, ("n", *source.shape)))
        raise ValueError(
            f"x must be {source.dtype}({wanted}) with n of at least 1, as it was "
            f"fitted, got {getattr(x, 'dtype', '')}{getattr(x, 'shape', given)}"
        )


def _check_leaves(source: Source, leaves: Any) -> None:
    if leaves != source.leaves:
        odd = sorted({*leaves} ^ {*source.leaves})
        raise ValueError(
            f"params must be those that were fitted; {odd[0][0]!r} differs"
        )


def _check_state(source: Source, state: State) -> None:
    kinds = [
        jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), one)
        for one in (state, jax.eval_shape(lambda: init(source)))
    ]
    if kinds[0] != kinds[1]:
        raise ValueError(
            "state must be as init(source) makes it for this source, got other shapes "
            "or layers"
        )
