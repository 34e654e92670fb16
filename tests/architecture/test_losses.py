import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsbp_jax import architecture
from dsbp_jax.architecture import examples, losses, planning, sensitivity
from dsbp_jax.architecture.axis_walk import trace_axes
from dsbp_jax.architecture.compression import resized
from dsbp_jax.architecture.cuts import apply_cuts
from dsbp_jax.architecture.widths import Curve, share_out
from dsbp_jax.layers import array_leaves, leaves_by_path
from tests.architecture import models
from tests.layers.models import normal


def roots(fn, params, x, *names):
    return sensitivity.sensitivity(
        lambda batch: trace_axes(fn, params, (batch,)), names, params, x
    )


def gram(root):
    return root @ np.swapaxes(root, -1, -2)


BUILDERS = (
    *models.MLPS,
    *models.CNNS,
    models.linen_vit,
    models.linen_scanned,
)


@pytest.mark.parametrize("build", BUILDERS, ids=lambda build: build.__name__)
def test_a_cut_in_place_computes_what_the_smaller_model_does(build):
    fn, params, x = build()
    plan = architecture.plan(fn, params, [x], flops=0.6, multiple_of=1)
    assert plan.cuts
    for cut in plan.cuts:
        full = apply_cuts(
            plan.structure, params, (losses._in_place(plan.structure, cut),)
        )
        small = apply_cuts(plan.structure, params, (cut,))
        wanted = resized(fn, params, (cut,))(small, x)
        found = fn(full, x)
        assert list(map(jnp.shape, array_leaves(full))) == list(
            map(jnp.shape, array_leaves(params))
        )
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4),
            found,
            wanted,
        )


def test_a_loss_is_what_the_outputs_lose_with_that_group_alone():
    fn, params, x = models.plain_mlp()
    plan = architecture.plan(fn, params, [x], flops=0.5, multiple_of=8)
    assert len(x) > losses._MOST  # of which so many are looked at
    x = x[: losses._MOST]
    whole = fn(params, x)
    for one in plan.groups:
        cuts = tuple(cut for cut in plan.cuts if cut.group == one.group)
        small = apply_cuts(plan.structure, params, cuts)
        change = resized(fn, params, cuts)(small, x) - whole
        variance = jnp.sum((whole - whole[:1]) ** 2) / 2
        wanted = float(jnp.sum(change**2) / variance)
        assert one.loss == pytest.approx(wanted, rel=1e-3, abs=1e-9)
    assert "loss" in str(plan).splitlines()[0]


@pytest.mark.slow
@pytest.mark.parametrize("build", BUILDERS, ids=lambda build: build.__name__)
def test_plans_that_know_the_outputs_lose_less_of_them(build, monkeypatch):
    fn, params, x = build()
    wanted = fn(params, x)

    def lost():
        plan = architecture.plan(fn, params, [x], flops=0.5, multiple_of=1)
        small = architecture.compress(fn, params, plan)
        return float(jnp.std(small.apply(small.params, x) - wanted))

    now = lost()
    monkeypatch.setattr(planning, "sensitivity", lambda *_: {})
    monkeypatch.setattr(planning, "measure_groups", lambda *_: False)
    assert now <= 1.05 * lost()


def test_what_passes_beside_all_branches_counts_more():
    def fn(params, x):
        x = x @ params["stem"]
        for branch in params["branches"]:
            x = x + 0.1 * jax.nn.relu(x @ branch["up"]) @ branch["down"]
        return x @ params["head"]

    branch = lambda seed: {
        "up": normal(16, 16, seed=seed) / 4,
        "down": normal(16, 16, seed=seed + 1) / 4,
    }
    params = {
        "stem": normal(32, 16, seed=1) / 6,
        "branches": [branch(seed) for seed in (2, 4, 6, 8)],
        "head": normal(16, 20, seed=10) / 4,
    }
    plan = architecture.plan(fn, params, [normal(300, 32)], flops=0.5, multiple_of=1)
    widths = {one.group.name: one.width for one in plan.groups}
    assert widths.pop("stem") >= 14
    assert max(widths.values()) <= 8


def test_of_one_output_the_metric_is_exact():
    def fn(params, x):
        hidden = x @ params["up"]
        return jnp.tanh(hidden @ params["mid"]) @ params["down"]

    params = {"up": normal(3, 5), "mid": normal(5, 4, seed=1), "down": normal(4, 1)}
    x = normal(32, 3, seed=2)
    found = roots(fn, params, x, "up", "mid")
    slopes = 1 - jnp.tanh(x @ params["up"] @ params["mid"]) ** 2
    cotangent = slopes * params["down"][:, 0]  # but for its sign
    repeats = 2  # of each example
    wanted = {"mid": cotangent, "up": cotangent @ params["mid"].T}
    for name, rows in wanted.items():
        np.testing.assert_allclose(
            gram(found[name]), repeats * rows.T @ rows, atol=2e-3 * jnp.sum(rows**2)
        )


def test_stacks_and_convolutions_have_a_metric_each():
    def fn(params, x):
        step = lambda x, w: (jnp.tanh(x @ w), None)
        return jax.lax.scan(step, x, params["stack"])[0] @ params["head"]

    params = {"stack": normal(3, 4, 4), "head": normal(4, 1, seed=1)}
    x = normal(32, 4, seed=2)
    found = roots(fn, params, x, "stack")["stack"]
    last = jax.lax.fori_loop(0, 2, lambda i, h: jnp.tanh(h @ params["stack"][i]), x)
    rows = (1 - jnp.tanh(last @ params["stack"][2]) ** 2) * params["head"][:, 0]
    repeats = 2  # of each example
    assert found.shape == (3, 4, 4)
    np.testing.assert_allclose(
        gram(found[2]), repeats * rows.T @ rows, atol=4e-3 * jnp.sum(rows**2)
    )
    model = models.linen_resnet()
    names = [name for name in leaves_by_path(model.params) if name.endswith("kernel")]
    felt = roots(*model, *names)
    assert {one.ndim for one in felt.values()} == {2}
    for one in felt.values():  # more than what is added to each direction
        values = np.linalg.eigvalsh(gram(one))
        assert values[-1] > 100 * sensitivity._REST * values.mean()


def test_wide_answers_are_sketched():
    fn = lambda params, x: jnp.sum(jnp.tanh(x @ params["up"]) @ params["down"], axis=1)
    params = {"up": normal(4, 300), "down": normal(300, 2, seed=1)}
    x = normal(64, 4, seed=2)
    found = roots(fn, params, x, "up")["up"]
    slopes = 1 - jnp.tanh(x @ params["up"]) ** 2
    rows = slopes * params["down"].sum(axis=1)
    wanted = 2 * np.asarray(rows.T @ rows)
    assert found.shape == (300, 64)
    assert np.corrcoef(np.diag(gram(found)), np.diag(wanted))[0, 1] > 0.9
    assert np.trace(gram(found)) == pytest.approx(np.trace(wanted), rel=0.2)


def test_functions_without_a_derivative_are_planned_all_the_same():
    def looped(params, x):
        answers = jax.nn.relu(x @ params["up"]) @ params["down"]
        return jax.lax.while_loop(
            lambda y: jnp.max(jnp.abs(y)) > 1, lambda y: y / 2, answers
        )

    chosen = lambda params, x: jnp.argmax(jnp.tanh(x @ params["up"]) @ params["down"])
    params = {"up": normal(6, 16), "down": normal(16, 3, seed=1)}
    x = normal(100, 6, seed=2)
    assert roots(looped, params, x, "down") == {}
    assert roots(chosen, params, x, "down") == {}
    for fn, known in ((looped, True), (chosen, False)):
        plan = architecture.plan(fn, params, [x], flops=0.5, multiple_of=1)
        assert plan.flops <= 0.5
        assert (plan.groups[0].loss is not None) is known
        assert ("loss" in str(plan)) is known


def test_a_batch_of_one_example_and_scalars_beside_it():
    fn = lambda params, batch: (
        batch["scale"] * jnp.tanh(batch["x"] @ params["up"]) @ params["down"]
    )
    params = {"up": normal(6, 16), "down": normal(16, 3, seed=1)}
    batch = {"x": normal(1, 50, 6, seed=2), "scale": jnp.float32(2)}
    plan = architecture.plan(fn, params, [batch], flops=0.5, multiple_of=1)
    assert plan.groups[0].width == 8
    assert plan.groups[0].loss > 0


@pytest.mark.parametrize("masked", [-jnp.inf, -1e9, jnp.finfo(jnp.float32).min])
def test_outputs_that_are_masked_count_for_nothing(masked):
    fn, params, x = models.plain_mlp()
    shut = lambda params, x: jnp.pad(
        fn(params, x), ((0, 0), (0, 1)), constant_values=masked
    )
    plans = [
        architecture.plan(one, params, [x], flops=0.5, multiple_of=1)
        for one in (fn, shut)
    ]
    for one, other in zip(*(plan.groups for plan in plans), strict=True):
        assert abs(other.width - one.width) <= 1
        assert 0.5 * one.loss < other.loss < 2 * one.loss


def test_a_mask_that_depends_on_the_input_counts_for_nothing():
    fn, params, x = models.plain_mlp()
    for masked in (-jnp.inf, -1e9, jnp.finfo(jnp.float32).min):
        shut = lambda params, x, masked=masked: jnp.where(
            jnp.arange(3.0) <= jnp.where(x[:, :1] > 0, 2, 1), fn(params, x), masked
        )
        plan = architecture.plan(shut, params, [x], flops=0.5, multiple_of=1)
        assert all(1e-4 < one.loss < 1 for one in plan.groups)


def test_outputs_in_half_precision_do_not_overflow():
    fn, params, x = models.plain_mlp()
    half = lambda params, x: (30 * fn(params, x)).astype(jnp.float16)
    plan = architecture.plan(half, params, [x], flops=0.5, multiple_of=1)
    assert all(0 <= one.loss < 1 for one in plan.groups)


def test_a_derivative_that_is_not_finite_is_none():
    root = lambda h: jnp.where(h > 0, jnp.sqrt(h), 0)
    fn = lambda params, x: (
        root(jnp.tanh(x @ params["up"]) @ params["mid"]) @ params["down"]
    )
    params = {
        "up": normal(6, 16),
        "mid": normal(16, 16, seed=1),
        "down": normal(16, 3, seed=3),
    }
    x = normal(100, 6, seed=2)
    assert roots(fn, params, x, "mid") == {}
    assert architecture.plan(fn, params, [x], flops=0.5, multiple_of=1).flops <= 0.5


def test_pairs_past_an_exponential_are_measured_on_the_smaller_model():
    def fn(params, x):
        q, k = jnp.exp(x @ params["q"]), jnp.exp(x @ params["k"])
        return (q @ k.T) @ x @ params["down"]

    params = {
        "q": normal(4, 12) / 8,
        "k": normal(4, 12, seed=1) / 8,
        "down": normal(4, 3, seed=2),
    }
    x = normal(40, 4, seed=3)
    plan = architecture.plan(fn, params, [x], flops=0.8, multiple_of=1)
    (one,) = (one for one in plan.groups if one.group.pairs)
    assert one.width < 12
    small = architecture.compress(fn, params, plan)
    whole = fn(params, x)
    change = small.apply(small.params, x) - whole
    wanted = jnp.sum(change**2) / (jnp.sum((whole - whole[:1]) ** 2) / 2)
    assert one.loss == pytest.approx(float(wanted), rel=0.5)  # between those tried


def test_a_kernel_that_a_loop_shares_has_the_metric_of_all_its_rows():
    def fn(params, x):
        hidden = x
        step = lambda h, _: (-jnp.tanh(h @ params["w"]), None)
        hidden, _ = jax.lax.scan(step, hidden, None, length=2)
        return hidden @ params["head"]

    params = {"w": normal(300, 300) / 17, "head": normal(300, 1, seed=1)}
    with jax.enable_x64(True):
        x = normal(16, 300, seed=2)
        found = roots(fn, params, x, "w")["w"]
    first = x @ params["w"]
    second = -jnp.tanh(first) @ params["w"]
    last = -(1 - jnp.tanh(second) ** 2) * params["head"][:, 0]
    before = -(1 - jnp.tanh(first) ** 2) * (last @ params["w"].T)
    wanted = 2 * (last.T @ last + before.T @ before)
    assert found.shape == (300, 300)
    np.testing.assert_allclose(gram(found), wanted, atol=0.01 * jnp.max(wanted))


def test_a_branch_that_the_examples_do_not_reach_keeps_its_order():
    def fn(params, x):
        arms = [
            lambda x, arm=arm: jnp.tanh(x @ arm["up"]) @ arm["down"]
            for arm in params["arms"]
        ]
        return jax.lax.switch((x[0, 0] > 100).astype(jnp.int32), arms, x)

    arm = lambda seed: {"up": normal(6, 16, seed=seed), "down": normal(16, 3, seed=7)}
    params = {"arms": [arm(1), arm(2)]}
    x = normal(100, 6, seed=3)
    found = roots(fn, params, x, "arms/0/down", "arms/1/down")
    assert all(np.linalg.matrix_rank(gram(one)) == 3 for one in found.values())
    far = x.at[0, 0].set(200.0)
    plan = architecture.plan(fn, params, [x, far], flops=0.5, multiple_of=1)
    widths = {one.group.name: one.width for one in plan.groups}
    assert min(widths.values()) > 3  # neither is taken for useless


def test_functions_of_one_batch_size_are_planned_on_all_of_it():
    fn, params, x = models.plain_mlp()
    fixed = lambda params, x: fn(params, x.reshape(200, 6) + jnp.zeros((200, 1)))
    plan = architecture.plan(fixed, params, [x], flops=0.5, multiple_of=1)
    assert all(one.loss is not None for one in plan.groups)


def test_what_examples_share_is_not_cut_into_examples():
    batch = {"x": np.zeros((20, 3)), "mask": np.ones((1, 5)), "scale": 2.0}
    part = examples.some(batch, 4, 8)
    assert examples.count(batch) == 20
    assert (part["x"].shape, part["mask"].shape) == ((8, 3), (1, 5))


def test_a_plan_is_the_same_twice():
    fn, params, x = models.linen_vit()
    plans = [
        architecture.plan(fn, params, [x], flops=0.5, multiple_of=1) for _ in range(2)
    ]
    assert str(plans[0]) == str(plans[1])


def test_groups_that_are_too_wide_are_estimated_from_the_others():
    fn = lambda params, x: (
        jnp.tanh(jnp.tanh(x @ params["up"]) @ params["mid"]) @ params["down"]
    )
    params = {
        "up": normal(4, 2100),
        "mid": normal(2100, 8, seed=1) / 45,
        "down": normal(8, 2, seed=2),
    }
    x = normal(600, 4, seed=3)
    plan = architecture.plan(fn, params, [x], flops=0.1, multiple_of=2)
    wide = {one.group.name: one for one in plan.groups}["up"]
    assert wide.width < 2100
    assert 0 < wide.loss < 1


def test_losses_are_put_into_curves():
    errors = np.linspace(1, 0, 17)
    curves = [Curve(errors, 16, 1) for _ in range(4)]
    widths = [[1, 8], [1, 8], [], [4, 8]]
    lost = [[0.5, 0.25], [0.0, 0.0], [], [0.1, np.inf]]
    assert losses.set_losses(curves, widths, lost)
    first, unreached, wide, broken = curves
    assert first.loss(1) == pytest.approx(0.5)
    assert first.loss(8) == pytest.approx(0.25)
    assert first.loss(16) == 0
    assert 0.25 < first.loss(4) < 0.5
    np.testing.assert_allclose(unreached.losses, wide.losses)  # as the others
    assert wide.loss(1) > 0.5
    assert broken.loss(8) == pytest.approx(5.0)  # worse than all else
    assert broken.loss(4) == pytest.approx(5.0)  # and so is what is narrower
    for curve in curves:
        assert (np.diff(curve.losses) <= 0).all()


def test_where_nothing_was_measured_errors_stay():
    curve = Curve(np.linspace(1, 0, 17), 16, 1)
    before = curve.losses
    assert not losses.set_losses([curve], [[]], [[]])
    assert not losses.set_losses([curve], [[1]], [[np.nan]])
    assert curve.losses is before


def test_rounding_where_no_error_is_expected_does_not_explode():
    errors = np.concatenate([np.linspace(1, 0.01, 8), np.zeros(9)])
    curve = Curve(errors, 16, 1)
    losses.set_losses([curve], [[1, 7, 12]], [[0.6, 0.01, 1e-6]])
    assert curve.loss(1) == pytest.approx(0.6)
    assert max(curve.losses) == pytest.approx(0.6)


def test_square_kernels_have_a_price():
    flat = lambda n: Curve(np.concatenate([np.full(n, 1e-6), [0.0]]), n, 1)
    saved = lambda n, rank: max(n * n - 2 * n * rank, 0)
    cost = lambda ranks: 1 - sum(saved(64, rank) for rank in ranks) / (2 * 64**2)
    ranks = share_out([flat(64), flat(64)], cost, 0.4)
    assert cost(ranks) <= 0.4
    assert max(ranks) < 32


def test_fewer_examples_may_have_fewer_layers():
    def fn(params, x):
        one = lambda row: jnp.tanh(row @ params["up"]) @ params["down"]
        return jax.lax.map(one, x, batch_size=32)

    params = {"up": normal(6, 16), "down": normal(16, 3, seed=1)}
    x = normal(200, 6, seed=2)
    plan = architecture.plan(fn, params, [x], flops=0.6, multiple_of=1)
    assert plan.flops <= 0.6
