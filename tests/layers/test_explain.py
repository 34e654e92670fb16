import jax
import jax.numpy as jnp
import pytest
from jax import lax

from dsbp_jax.layers import explain, layout
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


def test_numbers_by_hand(explanation):
    wide, stack = explanation["wide"], explanation["stack"]
    plain = 1000 * 40 * 200
    sketched = 1000 * 40 * 8 + 1000 * 8 * 200 + 8 * 40 * 200
    assert wide.flops_saved == pytest.approx(1 - sketched / plain)
    assert wide.use == "dense, 1000 rows"
    assert wide.state_bytes == (4 * (40 * 8 + 8 + 1), 4 * (200 * 8 + 8 + 1))
    assert stack.state_bytes == (3 * 4 * (200 * 8 + 8 + 1),) * 2
    assert stack.use == "dense, 1000 rows, in loops of 3"
    assert stack.view.batch_axes == (0,)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("wide", ""),
        ("stack", ""),
        ("wide#1", "plain gradient: a further use of the leaf"),
        ("bias", "no matrix; used by"),
        ("table", "looked up by index (gather) (a guess without layout would be"),
        ("rule", "plain gradient: inside custom_jvp_call, whose rule stays whole"),
        ("frozen", "no gradient: behind stop_gradient"),
        ("small", "plain gradient: a sketch would cost more"),
        ("unused", "not used by the function"),
        ("step", "int32 is no floating type"),
    ],
)
def test_reasons(explanation, name, reason):
    assert explanation[name].reason.startswith(reason)
    assert bool(explanation[name].reason) == bool(reason)


def test_prints_as_a_table(explanation):
    header, *lines, summary = str(explanation).split("\n")
    assert header.split()[:2] == ["leaf", "shape"]
    assert len(lines) == len(explanation)
    assert any(line.startswith("stack ") and "(1)→(2)" in line for line in lines)
    assert summary.endswith("left alone though of two or more axes: table, unused")
    assert repr(explanation) == str(explanation)


def test_a_rank_that_is_no_restriction():
    report = explain(model, PARAMS, X, rank=64)["wide"]
    assert report.reason == "plain gradient: rank 64 is not below d_in 40"


def test_convolutions_count_taps():
    def conv(params, x):
        return lax.conv(x, params, (2, 2), "SAME")

    report = explain(conv, struct(32, 64, 3, 3), struct(2, 64, 8, 8), rank=4)[""]
    n_in, n_out = 2 * 64, 2 * 16
    sketched = n_in * 64 * 4 + n_out * 9 * 4 * 32 + 9 * 4 * 64 * 32
    assert report.flops_saved == pytest.approx(1 - sketched / (n_out * 9 * 64 * 32))
    assert "9 × 64→32 (1)→(0)" in str(explain(conv, normal(32, 64, 3, 3), X4))


X4 = struct(2, 64, 8, 8)


@pytest.mark.parametrize("rank", [0, -3, 2.0, True, None])
def test_rank_must_be_a_positive_integer(rank):
    with pytest.raises(ValueError, match=r"rank must be a positive integer, got"):
        explain(model, PARAMS, X, rank=rank)
