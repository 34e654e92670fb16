import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench import engine, projection
from experiments.bench.timing import Stateful, interleave


def test_interleave_times_every_function_once_a_round():
    calls = []

    def record(name):
        calls.append(name)
        return jnp.zeros(())

    times = interleave({"a": lambda: record("a"), "b": lambda: record("b")}, 3)
    assert calls == ["a", "b"] * 4  # the first round warms up
    assert {name: seconds.shape for name, seconds in times.items()} == {
        "a": (3,),
        "b": (3,),
    }
    assert all((seconds > 0).all() for seconds in times.values())


def test_stateful_carries_and_donates_its_state():
    first = jnp.zeros(3)
    step = Stateful(lambda state, x: state + x, first, jnp.ones(3))
    step()
    np.testing.assert_array_equal(step(), 2)
    assert first.is_deleted()


def test_drift_turns_the_leading_directions(monkeypatch):
    monkeypatch.setattr(engine, "DIM", 64)
    monkeypatch.setattr(engine, "SAMPLES", 4096)
    monkeypatch.setattr(engine, "RANK", 4)
    spectrum = np.where(np.arange(64) < 4, 1.0, 1e-4)
    before, after = engine.drifted_rows(spectrum, 60)
    top = lambda x: np.linalg.eigh(x.T @ x)[1][:, -4:]
    cosines = np.linalg.svd(top(before).T @ top(after), compute_uv=False)
    np.testing.assert_allclose(cosines, 0.5, atol=0.05)


def test_stats_are_what_their_names_say():
    row = projection._stats("x", np.array([1.0, 1.0, 4.0]), reference=2.0)
    assert row["worst / median"] == pytest.approx(4)
    assert row["amortised / reference"] == pytest.approx(1)
    assert row["mean ms"] == pytest.approx(2000)
