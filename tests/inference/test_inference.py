"""Fitting, following and guarding a small model on data with a known shift."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsbp_jax import inference
from dsbp_jax.inference import guard as guards

CLASSES, DIM, BATCH = 4, 6, 64
SETTINGS = inference.Settings(rank=3, prior=8.0)


def images(number, seed, labels=None):
    """Points about a centre for each class."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(CLASSES, size=number) if labels is None else labels
    centres = 3 * np.random.default_rng(0).normal(size=(CLASSES, DIM))
    x = centres[labels] + rng.normal(size=(number, DIM))
    return x.astype(np.float32), labels


def fn(params, x):
    hidden = jnp.tanh(x @ params["up"])
    return hidden @ params["down"]


def trained():
    """Least squares on random features: a classifier without training."""
    rng = np.random.default_rng(1)
    up = (rng.normal(size=(DIM, 24)) / 6).astype(np.float32)
    x, labels = images(2000, 2)
    hidden = np.tanh(x @ up)
    down = np.linalg.lstsq(hidden, 8 * np.eye(CLASSES)[labels], rcond=None)[0]
    return {"up": jnp.asarray(up), "down": jnp.asarray(down, jnp.float32)}


def shifted(x):
    return (0.3 * x + 2).astype(np.float32)


@dataclasses.dataclass
class Case:
    params: dict
    source: inference.Source
    step: object
    plain: object

    def follow(self, batches, state=None):
        state = inference.init(self.source) if state is None else state
        outputs = []
        for x in batches:
            one, state = self.step(state, jnp.asarray(x))
            outputs.append(np.asarray(one))
        return outputs, state


@pytest.fixture(scope="module")
def case():
    params = trained()
    batches = [jnp.asarray(images(BATCH, seed)[0]) for seed in range(10, 34)]
    source = inference.fit(fn, params, batches, settings=SETTINGS)
    step = jax.jit(lambda state, x: inference.adapt(fn, params, source, state, x))
    return Case(params, source, step, jax.jit(lambda x: fn(params, x)))


def stream(number, seed, change=lambda x: x, size=BATCH):
    pairs = [images(size, 100 * seed + at) for at in range(number)]
    return [change(x) for x, _ in pairs], [labels for _, labels in pairs]


def accuracy(outputs, labels):
    return np.mean(
        [np.mean(o.argmax(-1) == y) for o, y in zip(outputs, labels, strict=True)]
    )


def test_source_data_are_answered_by_the_plain_model_bit_for_bit(case):
    xs, labels = stream(12, 1)
    outputs, state = case.follow(xs)
    same = [np.array_equal(o, case.plain(x)) for o, x in zip(outputs, xs, strict=True)]
    assert np.mean(same) >= 0.9
    assert accuracy(outputs, labels) > 0.85
    drift = inference.drift(case.source, state)
    assert drift.score <= drift.threshold
    assert not drift.alarm


def test_a_shift_is_seen_and_undone(case):
    xs, labels = stream(12, 2, shifted)
    outputs, state = case.follow(xs)
    plain = accuracy([np.asarray(case.plain(x)) for x in xs], labels)
    assert bool(state.alarm)
    assert bool(state.adapted)
    assert accuracy(outputs, labels) > plain + 0.15
    drift = inference.drift(case.source, state)
    assert drift.score > drift.threshold
    assert drift.layers["up"]["mean"] > 0.3
    # Back on source data the alarm ends.
    back, _ = stream(12, 3)
    outputs, state = case.follow(back, state)
    assert not bool(state.alarm)
    np.testing.assert_array_equal(outputs[-1], case.plain(back[-1]))


def test_classes_in_turns_are_left_to_the_plain_model(case):
    labels = np.repeat(np.arange(CLASSES), 3)
    # Of so mild a shift that the plain model still tells classes apart.
    xs = [
        1.5 * images(BATCH, 500 + at, np.full(BATCH, label))[0]
        for at, label in enumerate(labels)
    ]
    outputs, state = case.follow(xs)
    same = [np.array_equal(o, case.plain(x)) for o, x in zip(outputs, xs, strict=True)]
    assert np.mean(same) >= 0.6
    assert not bool(state.guard.trusted)


BAD = {
    "nan": lambda x: np.where(np.arange(DIM) == 2, np.nan, x).astype(np.float32),
    "infinite": lambda x: np.where(np.arange(DIM) == 2, np.inf, x).astype(np.float32),
    "constant": lambda x: np.full_like(x, 7.0),
    "huge": lambda x: 1e18 * x,
}


@pytest.mark.parametrize("name", BAD)
def test_bad_batches_leave_a_sound_state(case, name):
    xs, _ = stream(8, 4, shifted)
    _, state = case.follow(xs[:4])
    bad = [BAD[name](x) for x in xs[4:6]]
    outputs, state = case.follow(bad, state)
    for leaf in jax.tree.leaves(state):
        assert np.all(np.isfinite(leaf))
    if name in ("nan", "infinite"):
        np.testing.assert_array_equal(outputs[0], case.plain(bad[0]))
    outputs, _ = case.follow(xs[6:], state)
    assert all(np.all(np.isfinite(one)) for one in outputs)


def test_batches_of_one_are_followed(case):
    xs, labels = stream(200, 5, shifted, size=1)
    outputs, state = case.follow(xs)
    assert bool(state.alarm)
    plain = accuracy([np.asarray(case.plain(x)) for x in xs], labels)
    assert accuracy(outputs, labels) >= plain - 0.02
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, s, x: (c.params, s, x[:, :-1]), r"x must be float32\(n, 6\)"),
        (lambda c, s, x: (c.params, s, x.astype(jnp.bfloat16)), r"got bfloat16"),
        (lambda c, s, x: (c.params, s, x[:0]), "n of at least 1"),
        (lambda c, s, x: ({**c.params, "b": x}, s, x), "params must be those.*'b'"),
        (lambda c, s, x: (c.params, s._replace(moved={}), x), "state must be as init"),
    ],
)
def test_what_does_not_belong_together_is_said(case, change, message):
    x = jnp.asarray(images(BATCH, 7)[0])
    params, state, x = change(case, inference.init(case.source), x)
    with pytest.raises(ValueError, match=message):
        inference.adapt(fn, params, case.source, state, x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(batches=[]), "batches must hold at least 9 batches .*, got 0"),
        (dict(held_out=[images(8, 2)[0]] * 2), "held_out must hold at least 3.*got 2"),
        (dict(batches=[], held_out=[]), "batches must hold at least 1 .*, got 0"),
        (dict(layers=("none",)), "layers must be among up, down, got 'none'"),
        (
            dict(batches=[np.ones((3, 2 + at // 8), np.float32) for at in range(9)]),
            "one shape",
        ),
    ],
)
def test_what_cannot_be_fitted_is_said(case, options, message):
    batches = options.pop("batches", [images(8, 1)[0]] * 9)
    with pytest.raises(ValueError, match=message):
        inference.fit(fn, case.params, batches, **options)


def test_drift_alone_needs_no_layer_to_move(case):
    batches = [jnp.asarray(images(BATCH, seed)[0]) for seed in range(10, 34)]
    source = inference.fit(
        fn, case.params, batches, layers=(), settings=SETTINGS, logits=False
    )
    assert source.moved == ()
    state = inference.init(source)
    step = jax.jit(lambda s, x: inference.adapt(fn, case.params, source, s, x))
    for x in stream(6, 6, shifted)[0]:
        outputs, state = step(state, x)
        np.testing.assert_allclose(outputs, case.plain(x), atol=1e-5)
    assert bool(inference.drift(source, state).alarm)


@pytest.mark.parametrize("held_out", [3, 12])
def test_clean_data_raise_no_alarm_with_few_batches_held_out(case, held_out):
    draw = lambda seeds: [jnp.asarray(images(BATCH, seed)[0]) for seed in seeds]
    source = inference.fit(
        fn,
        case.params,
        draw(range(100, 112)),
        held_out=draw(range(120, 120 + held_out)),
        layers=(),
        settings=SETTINGS,
    )
    step = jax.jit(lambda s, x: inference.adapt(fn, case.params, source, s, x)[1])
    state, alarms = inference.init(source), []
    for x in draw(range(200, 260)):
        state = step(state, x)
        alarms.append(bool(state.alarm))
    assert np.mean(alarms) <= 0.1
    for x in stream(12, 6, shifted)[0]:
        state = step(state, jnp.asarray(x))
    assert bool(inference.drift(source, state).alarm)


@pytest.mark.parametrize("size", [1, 5, 16, 40])
def test_drift_is_measured_of_as_many_images_in_small_batches(case, size):
    rows = np.concatenate(stream(60, 8, size=BATCH)[0])
    batches = rows[: len(rows) // size * size].reshape(-1, size, DIM)
    state, alarms, counts = inference.init(case.source), [], set()
    for x in batches:
        _, state = case.step(state, x)
        alarms.append(bool(state.alarm))
        counts.add(float(state.watched_images) % case.source.probed)
    assert case.source.probed == BATCH // SETTINGS.probe
    assert len(counts) <= 2  # at the prior, and at the horizon
    assert np.mean(alarms) <= 0.1
    for x in shifted(batches[: 12 * BATCH // size + 1]):
        _, state = case.step(state, x)
    assert bool(state.alarm)


def test_one_short_batch_held_out_does_not_shrink_what_is_measured(case):
    held_out = [jnp.asarray(images(BATCH, seed)[0]) for seed in range(120, 126)]
    held_out.append(held_out[0][:3])
    source = inference.fit(
        fn,
        case.params,
        [jnp.asarray(images(BATCH, seed)[0]) for seed in range(100, 112)],
        held_out=held_out,
        layers=(),
        settings=SETTINGS,
    )
    assert source.probed == BATCH // SETTINGS.probe


def test_gathered_images_are_those_of_the_probe(case):
    rows = np.concatenate(stream(3, 9, size=BATCH)[0])
    _, large = case.step(inference.init(case.source), rows[:BATCH])
    state = inference.init(case.source)
    for x in rows[:BATCH].reshape(4, 16, DIM):
        _, state = case.step(state, x)
    np.testing.assert_array_equal(state.probe, rows[: BATCH : SETTINGS.probe])
    np.testing.assert_allclose(state.measures, large.measures, atol=1e-5)
    _, after = case.step(state, np.full((16, DIM), np.nan, np.float32))
    assert int(after.gathered) == 0
    assert np.all(np.isfinite(after.probe))


def test_a_state_is_of_fixed_shape(case):
    state = inference.init(case.source)
    x = jnp.asarray(images(BATCH, 7)[0])
    _, after = case.step(state, x)
    kinds = [
        jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), s) for s in (state, after)
    ]
    assert kinds[0] == kinds[1]
    assert case.step._cache_size() >= 1


SHARES = jnp.full(CLASSES, 1 / CLASSES)


def guard(plain, moved, steps=6, usual=0.2, size=24):
    """A guard that saw such logits."""
    state = guards.start(SHARES)
    for at in range(steps):
        one, two = plain(at, size), moved(at, size)
        state = compared(state, one, two, usual)
    return state


@jax.jit
def compared(state, plain, moved, usual):
    settings = inference.Settings()
    return guards.compared(
        state, plain, moved, float(len(plain)), settings, SHARES, usual, moved
    )


def sure(labels, size, scale=8.0):
    return jnp.asarray(scale * np.eye(CLASSES)[np.resize(labels, size)], jnp.float32)


ALL = np.random.default_rng(0).permutation(np.repeat(np.arange(CLASSES), 6))


@pytest.mark.parametrize(
    ("plain", "moved", "trusted"),
    [
        (lambda at, n: sure(ALL, n), lambda at, n: sure(ALL, n), True),
        (lambda at, n: sure(ALL, n), lambda at, n: sure(ALL, n, 0.5), False),
        (lambda at, n: sure(ALL, n), lambda at, n: sure([1], n), False),
        (lambda at, n: sure([1], n), lambda at, n: sure(ALL, n), True),
        (lambda at, n: sure([at % 4], n), lambda at, n: sure(ALL, n), True),
        (
            lambda at, n: sure([at % 4], n),
            lambda at, n: sure([*ALL[:12], *[at % 4] * 12], n),
            False,
        ),
        (lambda at, n: sure([at % 4], n), lambda at, n: sure(ALL, n, 2.8), False),
        (lambda at, n: sure(ALL, n), lambda at, n: sure(ALL, n) * jnp.nan, False),
    ],
    ids=[
        "alike",
        "unsure",
        "one-sided",
        "collapsed",
        "shifts in turns",
        "turns",
        "scattered and unsure",
        "nan",
    ],
)
def test_what_the_guard_trusts(plain, moved, trusted):
    assert bool(guards.ready(guard(plain, moved))) == trusted


def test_after_answers_that_are_not_finite_trust_takes_its_patience():
    alike = lambda at, n: sure(ALL, n)
    state = guard(alike, alike, steps=20)
    broken = compared(state, sure(ALL, 24), sure(ALL, 24) * jnp.nan, 0.2)
    assert not broken.trusted
    assert float(broken.since) == 0
    soon = compared(broken, sure(ALL, 8), sure(ALL, 8), 0.2)
    late = compared(soon, sure(ALL, 24), sure(ALL, 24), 0.2)
    assert [bool(one.trusted) for one in (soon, late)] == [False, True]


def test_a_state_may_be_given_away_from_its_first_step(case):
    """Its arrays are its own: neither the source's nor one array twice."""
    step = jax.jit(
        lambda state, x: inference.adapt(fn, case.params, case.source, state, x),
        donate_argnums=0,
    )
    x = jnp.asarray(images(BATCH, 7)[0])
    outputs, state = step(inference.init(case.source), x)
    np.testing.assert_array_equal(outputs, case.plain(x))
    step(state, x)
    assert np.all(np.isfinite(case.source.normal))
    assert not any(
        leaf.is_deleted() for leaf in jax.tree.leaves(case.source) if leaf.size
    )


def test_batches_of_numpy_are_in_the_dtype_that_a_jitted_step_sees(case):
    batches = [images(BATCH, seed)[0].astype(np.float64) for seed in range(12)]
    source = inference.fit(fn, case.params, batches, layers=(), settings=SETTINGS)
    assert source.dtype == "float32"
    step = jax.jit(lambda state, x: inference.adapt(fn, case.params, source, state, x))
    jitted, _ = step(inference.init(source), batches[0])
    eager, _ = inference.adapt(
        fn, case.params, source, inference.init(source), batches[0]
    )
    np.testing.assert_allclose(jitted, eager, atol=1e-6)
