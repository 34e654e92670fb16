import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import dsbp_jax
from dsbp_jax import Layout, MatrixView, explain, layout
from tests.layers.models import doubled, normal

struct = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)


def model(params, x):
    h = jax.nn.relu(x @ params["wide"] + params["bias"])
    h, _ = lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, params["stack"])
    h = h + params["table"][jnp.argmax(h, axis=-1)]
    h = doubled(h, params["rule"]) @ lax.stop_gradient(params["frozen"])
    return (h @ params["wide"].T) @ params["small"]


PARAMS = {
    "wide": struct(40, 200),
    "bias": struct(200),
    "stack": struct(3, 200, 200),
    "table": struct(200, 200),
    "rule": struct(200, 200),
    "frozen": struct(200, 200),
    "small": struct(40, 3),
    "unused": struct(40, 40),
    "step": struct(dtype=jnp.int32),
}
X = struct(1000, 40)


@pytest.fixture(scope="module")
def explanation():
    return explain(model, PARAMS, X, rank=8)


def test_every_leaf_has_a_report(explanation):
    assert {name.split("#")[0] for name in explanation} == set(PARAMS)
    assert len(explanation) == len(PARAMS) + 1
    assert explanation["wide#1"].view.input_axes == (1,)
    assert "nothing" not in explanation
    views = {r.name: r.view for r in explanation.values() if r.view is not None}
    assert views == dict(layout(model, PARAMS, X))


def test_roles_are_said(explanation):
    roles = {name: explanation[name].role for name in PARAMS}
    assert roles == dsbp_jax.roles(model, PARAMS, X)
    assert roles["small"] == "head"
    assert roles["table"] == "embedding"
    assert roles["stack"] == "hidden"


def test_numbers_by_hand(explanation):
    wide, stack = explanation["wide"], explanation["stack"]
    plain = 1000 * 40 * 200
    sketched = 1000 * 40 * 8 + 1000 * 8 * 200 + 8 * 40 * 200
    assert wide.sketch_saving == pytest.approx(1 - sketched / plain)
    assert wide.use == "dense, 1000 rows"
    assert wide.ranks == (8, 8)
    assert wide.state_bytes == (4 * (40 * 8 + 8 + 4), 4 * (200 * 8 + 8 + 4))
    assert stack.state_bytes == (3 * 4 * (200 * 8 + 8 + 4),) * 2
    assert stack.use == "dense, 1000 rows, in loops of 3"
    assert stack.view.batch_axes == (0,)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("wide", ""),
        ("stack", ""),
        ("wide#1", "further use: transforms go by the first"),
        ("bias", "no matrix; used by"),
        ("table", "looked up by index (gather) (a guess without layout would be"),
        ("rule", ""),
        ("frozen", "no gradient: behind stop_gradient"),
        ("small", "identity: rank 8 ≥ d_out 3"),
        ("unused", "not used by the function"),
        ("step", "int32 is no floating type"),
    ],
)
def test_reasons(explanation, name, reason):
    assert explanation[name].reason.startswith(reason)
    assert bool(explanation[name].reason) == bool(reason)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("wide", ""),
        ("wide#1", "further use"),
        ("rule", "inside custom_jvp_call"),
        ("frozen", "no gradient"),
        ("small", "would cost more"),
        ("bias", ""),
    ],
)
def test_why_no_sketch_would_do(explanation, name, reason):
    assert explanation[name].no_sketch == reason


def test_prints_as_a_table(explanation):
    header, *lines, summary, legend = str(explanation).split("\n")
    assert header.split()[:2] == ["leaf", "shape"]
    assert len(lines) == len(explanation)
    assert any(line.startswith("stack ") and "(1)→(2)" in line for line in lines)
    assert summary.endswith("left alone though of two or more axes: table, unused")
    assert legend.startswith("with so many columns a sketch saves of the weight grad")
    (small,) = [line for line in lines if line.startswith("small ")]
    assert "0% (would cost more)" in small
    assert "plain gradient" not in str(explanation)
    assert repr(explanation) == str(explanation)


def test_ranks_that_reach_the_dimension():
    reports = explain(model, PARAMS, X, rank=np.int64(64))
    wide, small = reports["wide"], reports["small"]
    assert wide.reason == "identity: rank 64 ≥ d_in 40"
    assert wide.no_sketch == "rank 64 ≥ d_in 40"
    assert wide.ranks == (40, 64)
    assert wide.state_bytes == (0, 4 * (200 * 64 + 64 + 4))
    assert small.reason == "identity: rank 64 ≥ d_in 40, d_out 3"
    assert small.ranks == (40, 3)
    assert small.state_bytes == (0, 0)
    assert explain(model, PARAMS, X, rank=40)["wide"].reason.endswith(
        "rank 40 ≥ d_in 40"
    )


@pytest.mark.parametrize("rank", [2, 8, 64])
def test_state_bytes_are_what_a_projection_holds(rank):
    views = layout(model, PARAMS, X)
    tx = dsbp_jax.spectral_projection(rank, side="both", layout=views)
    tracked = jax.eval_shape(tx.init, PARAMS).tracked
    for report in explain(model, PARAMS, X, rank=rank).values():
        for index, side in enumerate(("input", "output")):
            leaves = jax.tree.leaves(tracked[side].get(report.name))
            held = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
            assert (report.state_bytes or (0, 0))[index] == held
            if held:
                width = tracked[side][report.name].basis.values.shape[-1]
                assert report.ranks[index] == width


def test_members_that_share_their_input_are_one_matrix_unless_told():
    members = lambda p, x: jax.vmap(lambda w: x @ w)(p["stack"])
    found = layout(members, {"stack": normal(3, 4, 2)}, normal(5, 4))
    assert found["stack"] == MatrixView((1,), (0, 2))
    own = Layout(tuple({**found, "stack": MatrixView((1,), (2,), (0,))}.items()))
    tx = dsbp_jax.spectral_projection(1, layout=own)
    tracked = tx.init({"stack": normal(3, 4, 2)}).tracked["output"]["stack"]
    assert tracked.basis.vectors.shape == (3, 2, 1)


def test_convolutions_count_taps():
    def conv(params, x):
        return lax.conv(x, params, (2, 2), "SAME")

    report = explain(conv, struct(32, 64, 3, 3), struct(2, 64, 8, 8), rank=4)[""]
    n_in, n_out = 2 * 64, 2 * 16
    sketched = n_in * 64 * 4 + n_out * 9 * 4 * 32 + 9 * 4 * 64 * 32
    assert report.sketch_saving == pytest.approx(1 - sketched / (n_out * 9 * 64 * 32))
    assert "9 × 64→32 (1)→(0)" in str(explain(conv, normal(32, 64, 3, 3), X4))


X4 = struct(2, 64, 8, 8)


@pytest.mark.parametrize("rank", [0, -3, 2.0, True, None])
def test_rank_must_be_a_positive_integer(rank):
    with pytest.raises(ValueError, match=r"rank must be an int of at least 1, got"):
        explain(model, PARAMS, X, rank=rank)


@pytest.mark.parametrize("rows", [4, 400])
def test_coordinates_hold_what_is_said(rows):
    """With few rows a sketch would cost more, and coordinates save all the same."""
    params = {"wide": jnp.ones((96, 160)), "mid": jnp.ones((160, 12))}
    loss_fn = lambda params, x: jnp.mean(jnp.tanh(x @ params["wide"]) @ params["mid"])
    x = jnp.ones((rows, 96))
    report = explain(loss_fn, params, x, rank=8)
    training = dsbp_jax.spectral_coordinates(loss_fn, rank=8)
    _, frame = training.init(params, x, key=jax.random.key(0))
    held = {name for name, one in report.items() if not one.no_coordinates}
    assert held == set(frame.kernels)
    assert "wide" in held
    assert bool(report["wide"].no_sketch) == (rows == 4)
    assert 0 < report["wide"].coordinates_saving < 1
