import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench import (
    compilation,
    compression,
    engine,
    meta,
    step,
    tuning,
    update,
)
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
    row = update.stats("x", np.array([1.0, 1.0, 4.0]), reference=2.0)
    assert row["worst / median"] == pytest.approx(4)
    assert row["mean / adam"] == pytest.approx(1)
    assert row["mean ms"] == pytest.approx(2000)


def test_updates_of_every_transform_are_timed(monkeypatch):
    view = update.dsbp_jax.MatrixView((0,), (1, 2))
    monkeypatch.setitem(update.SHAPES, "small", ((48, 4, 16), view))
    monkeypatch.setattr(update, "RANK", 8)
    monkeypatch.setattr(update, "EVERY", 2)
    few = ("adam", "spectral_subspace(adam)")
    every = update.ours
    monkeypatch.setattr(
        update, "ours", lambda layout: {name: every(layout)[name] for name in few}
    )
    found = {row["what"]: row for row in update.update_cost("small", 1)}
    assert {*update.peers(view), *few} == set(found)
    # A basis of the smaller side, and two moments of its coordinates.
    numbers = 48 * 8 + 2 * 8 * 64
    size = found["spectral_subspace(adam)"]["state MB"] * 1e6
    assert 4 * numbers < size < 4 * numbers + 200
    assert found["adam"]["refresh ms"] == ""
    assert isinstance(found["optax.contrib.galore"]["refresh ms"], float)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["mlp", "transformer"])
def test_steps_of_every_method_are_timed(model, monkeypatch):
    one_block = functools.partial(step.transformer, depth=1)
    monkeypatch.setitem(step.PROBLEMS, "transformer", one_block)
    config = step.StepConfig(rounds=1)
    rows = {
        row["method"]: row for row in step.measure(model, 128, 256, 8, "adam", config)
    }
    assert {"plain", "spectral_backprop", "spectral_coordinates", "muon"} <= set(rows)
    assert ("LoRA" in rows) == (model == "mlp")
    assert rows["plain"]["mean / plain"] == 1
    assert rows["plain"]["refresh ms"] == 0
    coordinates = rows["spectral_coordinates"]
    assert 0 < coordinates["share of refresh"] < 1
    # Two moments of 8 columns in place of 128; one of a block's kernels has 256 rows.
    share = {"mlp": 8 / 128, "transformer": (6 * 8 / 128 + 2 * 8 / 256) / 8}[model]
    assert coordinates["state / plain"] == pytest.approx(share, rel=0.05)


@pytest.mark.slow
def test_meta_gradients_are_timed_and_weighed():
    config = meta.MetaConfig(
        models=("mlp",), steps=(1,), tasks=(2,), rounds=1, memory_steps=(1, 4)
    )
    times, memory = meta.run(config).values()
    ours = [row for row in times if "PyTorch" not in row["how"]]
    assert ours[0]["over the loop"] == 1
    assert len(ours) == 7
    assert all(row["tasks / s"] > 0 for row in ours)
    plain, checkpoint, first_order = (
        [row[label] for row in memory] for label in list(memory[0])[1:]
    )
    assert plain[1] > checkpoint[1] > 0
    assert plain[0] > first_order[0] > 0


@pytest.mark.slow
def test_programs_are_compiled_from_empty_caches(monkeypatch):
    """Every stage is timed for a step and its fold, and set against Adam's."""
    monkeypatch.setattr(compilation, "DEPTH", 1)
    monkeypatch.setattr(compilation, "WIDTH", 32)
    monkeypatch.setattr(compilation, "TOKENS", 16)
    monkeypatch.setattr(compilation, "RANK", 4)
    problem = compilation.blocks(scanned=True)
    assert all(leaf.shape[0] == 1 for leaf in jax.tree.leaves(problem.params))
    contenders = compilation.training(compilation.blocks(scanned=False))
    few = {name: contenders.methods[name] for name in ("adam", "spectral_coordinates")}
    rows = compilation.measure(contenders._replace(methods=few), rounds=1)
    found = {row["what"]: row for row in rows}
    assert set(found) == {*few, "spectral_coordinates, fold"}
    assert found["adam"]["over adam"] == 1
    for row in found.values():
        stages = [row[f"{stage} s"] for stage in ("trace", "lower", "compile")]
        assert min(stages) > 0
        assert row["trace + compile s"] == pytest.approx(sum(stages))
        assert row["instructions"] > 0


def test_equal_leaves_are_told_apart_by_name_only():
    contenders = compilation.updates(3)
    adam = contenders.methods["adam"]()
    assert len(adam.carry[0]) == 3
    assert {leaf.shape for leaf in adam.carry[0].values()} == {contenders.x.shape}


@pytest.mark.slow
def test_ways_to_tune_are_measured():
    config = tuning.TuningConfig(
        width=16, rounds=2, contenders=("full", "lora:rank=2", "project_away")
    )
    (rows,) = tuning.run(config).values()
    full, lora, away = rows
    assert lora["trained"] < full["trained"] == away["trained"]
    assert all(row["step ms"] > 0 and row["begin ms"] > 0 for row in rows)
    with pytest.raises(ValueError, match=r"tuning\.rounds=0"):
        tuning.TuningConfig(rounds=0)


@pytest.mark.slow
def test_cut_models_are_timed_beside_whole_ones():
    config = compression.CutConfig(
        models=("CNN of 64 and 128 channels",), batch_sizes=(2, 1), width=64
    )
    _, rows = compression.run(config).values()
    assert [row["images"] for row in rows] == ["2", "1"]
    for row in rows:
        assert row["FLOPs"] <= 0.5
        assert row["parameters"] < 1
    with pytest.raises(ValueError, match=r"compression\.models='x'"):
        compression.CutConfig(models=("x",))
