import jax
import jax.numpy as jnp
import pytest

from dsbp_jax import architecture
from dsbp_jax.architecture import timing
from tests.architecture import models
from tests.layers.models import normal

MODEL = models.plain_mlp()


def planned(**options):
    return architecture.plan(MODEL.fn, MODEL.params, [MODEL.x], **options)


def test_flops_are_shared_out_and_counted():
    plan = planned(flops=0.5, multiple_of=1)
    up, mid = (
        next(one.width for one in plan.groups if one.group.name == name)
        for name in ("up", "mid")
    )
    whole = 6 * 16 + 16 * 24 + 24 * 3
    cut = 6 * up + up * mid + mid * 3
    assert plan.flops == pytest.approx(cut / whole)
    assert 0.45 < plan.flops <= 0.5
    biases, fewer = 16 + 24 + 3, up + mid + 3
    assert plan.parameters == pytest.approx((cut + fewer) / (whole + biases))


def test_more_energy_is_more_width():
    plans = [planned(energy=energy, multiple_of=1) for energy in (0.8, 0.95, 1.0)]
    widths = [[one.width for one in plan.groups] for plan in plans]
    assert all(a <= b for a, b in zip(widths[0], widths[1], strict=True))
    assert widths[0] < widths[1] < widths[2] == [24, 16]
    for plan, energy in zip(plans, (0.8, 0.95, 1.0), strict=True):
        assert all(one.error <= 1 - energy + 1e-9 for one in plan.groups)


def test_widths_are_multiples():
    plan = planned(flops=0.5)
    assert all(one.width % 8 == 0 for one in plan.groups)


def test_batches_of_several_shapes_add_up():
    halves = [MODEL.x[:80], MODEL.x[80:]]
    one = planned(energy=0.9, multiple_of=1)
    two = architecture.plan(
        MODEL.fn, MODEL.params, iter(halves), energy=0.9, multiple_of=1
    )
    assert [g.width for g in one.groups] == [g.width for g in two.groups]
    assert [g.error for g in one.groups] == pytest.approx([g.error for g in two.groups])


def test_what_is_protected_stays():
    plan = planned(energy=0.5, protect=["up_bias"])
    assert [one.group.name for one in plan.groups] == ["mid"]
    assert plan.left == {"up": "protected"}
    assert "up stays: protected" in str(plan)


def test_times_are_measured_and_slower_plans_refused(monkeypatch):
    monkeypatch.setattr(timing, "_SECONDS", 0.0)
    monkeypatch.setattr(timing, "_RUNS", 2)
    x = MODEL.x[:4]
    both = [timing.compiled(MODEL.fn, MODEL.params, x)] * 2
    assert all(0 < seconds < 1 for seconds in timing._medians(*both))
    monkeypatch.setattr(timing, "_medians", lambda *programs: (1.0, 0.5))
    plan = planned(flops=0.3, batch_sizes=[4, 2])
    assert plan.latency == {4: (1.0, 0.5), 2: (1.0, 0.5)}
    assert "batch of 4: 1e+03 ms → 500 ms (0.50)" in str(plan)
    monkeypatch.setattr(timing, "_medians", lambda *programs: (1.0, 1.5))
    with pytest.raises(ValueError, match="not faster at a batch of 4"):
        planned(flops=0.3, batch_sizes=[4])


def test_latency_is_approached_by_measuring(monkeypatch):
    # As if half of the time were spent beside the products.
    def medians(before, after):
        return 1.0, 0.5 + 0.5 * sum(a.size for a in after[1]) / sum(
            b.size for b in before[1]
        )

    monkeypatch.setattr(timing, "_medians", medians)
    x = normal(1, 6)
    goal = lambda latency: architecture.plan(
        MODEL.fn,
        MODEL.params,
        [x + normal(30, 6)],
        latency=latency,
        multiple_of=1,
        batch_sizes=[1],
    )
    plan = goal(0.7)
    ((before, after),) = plan.latency.values()
    assert after / before <= 0.7
    with pytest.raises(ValueError, match=r"no plan takes latency=0.4.*nearest"):
        goal(0.4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of energy, flops and latency must be given, got none"),
        ({"energy": 0.9, "flops": 0.5}, "exactly one of .* got energy, flops"),
        ({"energy": 0.0}, r"energy must be a number in \(0, 1\], got 0.0"),
        ({"energy": 1.5}, r"energy must be a number in \(0, 1\], got 1.5"),
        ({"flops": -1}, r"flops must be a number in \(0, 1\], got -1"),
        ({"flops": 0.01}, r"no plan keeps flops=0.01: .* the nearest is 0.2"),
        ({"latency": 0.5}, "latency needs batch_sizes"),
        ({"energy": 0.9, "multiple_of": 0}, "multiple_of must be an int of at least 1"),
        ({"energy": 0.9, "protect": ["upp"]}, "protect names 'upp', which is neither"),
        ({"energy": 0.9, "protect": "up"}, "protect must be a sequence of paths"),
        ({"energy": 0.9, "protect": ["up", "mid"]}, "fn has no width that can be cut"),
        (
            {"energy": 0.9, "batch_sizes": [0]},
            "batch_sizes must be an int of at least 1",
        ),
    ],
)
def test_bad_input_is_one_clear_line(options, message):
    with pytest.raises(ValueError, match=message):
        planned(**options)


def test_no_batches_and_data_of_another_shape():
    with pytest.raises(ValueError, match="at least one batch"):
        architecture.plan(MODEL.fn, MODEL.params, [], energy=0.9)
    with pytest.raises(TypeError, match="dot_general"):
        architecture.plan(MODEL.fn, MODEL.params, [normal(5, 7)], energy=0.9)


def test_a_layer_of_width_one_has_nothing_to_cut():
    fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
    params = {"up": normal(3, 1), "down": normal(1, 2)}
    with pytest.raises(ValueError, match="no width that can be cut"):
        architecture.plan(fn, params, [normal(9, 3)], energy=0.9)


def test_a_width_that_the_function_closes_over_is_named():
    fn = lambda p, x: (jnp.tanh(x @ p["up"]) * MODEL.params["up_bias"]) @ p["down"]
    params = {"up": normal(3, 16), "down": normal(16, 2)}
    groups = architecture.groups(fn, params, normal(9, 3))
    assert "that the function closes over" in groups.reasons["up", 1]
    with pytest.raises(ValueError, match="no width that can be cut"):
        architecture.plan(fn, params, [normal(9, 3)], energy=0.9)


def test_planning_computes_on_traced_shapes_only_once_per_shape():
    calls = []

    def fn(params, x):
        calls.append(x.shape)
        return MODEL.fn(params, x)

    architecture.plan(fn, MODEL.params, [MODEL.x] * 3, energy=0.9)
    assert len(calls) == 1
    assert not jax.config.jax_enable_x64
