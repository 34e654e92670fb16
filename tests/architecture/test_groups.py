import jax
import jax.numpy as jnp
import pytest

from dsbp_jax import architecture
from tests.architecture import models
from tests.layers.models import normal


def widths(model):
    """By name: size, and the places that share it."""
    found = architecture.groups(model.fn, model.params, model.x)
    return {
        name: (group.size, {f"{p.path}[{p.axis}]" for p in group.places})
        for name, group in found.items()
    }


def test_groups_of_mlps():
    assert widths(models.plain_mlp()) == {
        "up": (16, {"up[1]", "up_bias[0]", "mid[0]"}),
        "mid": (24, {"mid[1]", "mid_bias[0]", "down[0]"}),
    }
    assert widths(models.linen_mlp()) == {
        "params/Dense_0/kernel": (
            16,
            {
                "params/Dense_0/kernel[1]",
                "params/Dense_0/bias[0]",
                "params/Dense_2/kernel[0]",
            },
        ),
        "params/Dense_2/kernel": (
            12,
            {
                "params/Dense_2/kernel[1]",
                "params/Dense_2/bias[0]",
                "params/Dense_1/kernel[0]",
            },
        ),
    }
    assert widths(models.nnx_mlp()) == {
        "layers/0/kernel": (
            16,
            {"layers/0/kernel[1]", "layers/0/bias[0]", "layers/2/kernel[0]"},
        )
    }
    assert widths(models.equinox_mlp()) == {
        "layers/0/weight": (
            16,
            {"layers/0/weight[0]", "layers/0/bias[0]", "layers/1/weight[1]"},
        ),
        "layers/1/weight": (
            16,
            {"layers/1/weight[0]", "layers/1/bias[0]", "layers/2/weight[1]"},
        ),
    }
    assert set(widths(models.haiku_mlp())) == {"mlp/~/linear_0/w", "mlp/~/linear_1/w"}


def norm(number):
    return {
        f"{where}/BatchNorm_{number}/{name}[0]"
        for where, names in (
            ("params", ("scale", "bias")),
            ("batch_stats", ("mean", "var")),
        )
        for name in names
    }


def kernel(*axes):
    return {f"params/{name}/kernel[{axis}]" for name, axis in axes}


def test_groups_of_a_residual_network_with_batch_norm():
    assert widths(models.linen_resnet()) == {
        # The stream: what is added to it has its width.
        "params/Conv_0/kernel": (
            8,
            norm(0)
            | norm(2)
            | kernel(
                ("Conv_0", 3),
                ("Conv_1", 2),
                ("Conv_2", 3),
                ("Conv_3", 2),
                ("Conv_5", 2),
            ),
        ),
        "params/Conv_1/kernel": (10, norm(1) | kernel(("Conv_1", 3), ("Conv_2", 2))),
        "params/Conv_3/kernel": (10, norm(3) | kernel(("Conv_3", 3), ("Conv_4", 2))),
        # One of the digits of the flattened input of a dense layer.
        "params/Conv_4/kernel": (
            12,
            norm(4) | kernel(("Conv_4", 3), ("Conv_5", 3), ("Dense_0", 0)),
        ),
        "params/Dense_0/kernel": (
            16,
            {"params/Dense_0/bias[0]"} | kernel(("Dense_0", 1), ("Dense_1", 0)),
        ),
    }


def test_depthwise_ties_input_to_output():
    assert widths(models.equinox_depthwise())["layers/0/weight"] == (
        8,
        {
            "layers/0/weight[0]",
            "layers/0/bias[0]",
            "layers/1/weight[0]",
            "layers/1/bias[0]",
            "layers/2/weight[1]",
        },
    )


def test_groups_of_convolutions():
    assert {n: size for n, (size, _) in widths(models.haiku_cnn()).items()} == {
        "conv2_d/w": 8,
        "conv2_d_1/w": 6,
    }
    assert {n: size for n, (size, _) in widths(models.nnx_cnn()).items()} == {
        "layers/0/kernel": 8,
        "layers/3/kernel": 6,
    }


def test_the_table_says_why_an_axis_stays():
    model = models.plain_mlp()
    table = str(architecture.groups(model.fn, model.params, model.x))
    assert "up: 16 wide, selected; mid[0], up[1], up_bias[0]" in table
    assert "fixed, an axis of the input: up[0]" in table
    assert "fixed, an axis of the output: down[1], down_bias[0]" in table


def test_tied_kernels_are_not_repaired():
    fn = lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T @ p["head"]
    params = {"w": normal(4, 6), "head": normal(4, 2)}
    groups = architecture.groups(fn, params, normal(5, 4))
    assert groups["w"].repaired == frozenset()
    assert groups["w"].size == 6


def test_effects_are_refused():
    def fn(params, x):
        jax.debug.print("{}", x)
        return x @ params["w"]

    with pytest.raises(ValueError, match="no side effects"):
        architecture.groups(fn, {"w": normal(3, 2)}, normal(5, 3))


def test_a_kernel_that_is_standardised_first_leaves_its_width_whole():
    """Its rows are read before they are contracted, and cannot take others over."""

    def fn(params, x):
        convolve = lambda x, w: jax.lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(convolve(x, params["a"]))
        kernel = params["b"] - params["b"].mean((0, 1, 2))
        return convolve(x, kernel).mean((1, 2))

    params = {"a": normal(3, 3, 2, 6), "b": normal(3, 3, 6, 4)}
    groups = architecture.groups(fn, params, normal(2, 4, 4, 2))
    assert "used elsewhere" in groups["a"].reason
