"""Losses whose convolutions run over patches, against the losses themselves."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import lax

from dsbp_jax import capture_activations, meta
from dsbp_jax.meta.patched import keeps_convolutions, with_activations, with_patches
from tests.meta import models
from tests.meta.models import close, normal
from tests.meta.test_maml import value_and_grad

SGD = optax.sgd(0.05)
X = normal(2, 5, 6, 4, seed=1)
KERNEL = normal(3, 2, 4, 4)


def convolve(x, w, **options):
    window = {"window_strides": (1, 1), "padding": ((1, 1), (0, 1)), **options}
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, w, dimension_numbers=numbers, **window)


@jax.custom_vjp
def ruled(x, w):
    return convolve(x, w)


ruled.defvjp(lambda x, w: jax.vjp(convolve, x, w), lambda back, g: back(g))


# Each model, and how many of its convolutions run as they stand.
MODELS = {
    "plain": (lambda p, x: convolve(x, p["a"]), 0),
    "strided and dilated": (
        lambda p, x: convolve(x, p["a"], window_strides=(2, 1), rhs_dilation=(1, 2)),
        0,
    ),
    "two": (lambda p, x: convolve(jnp.tanh(convolve(x, p["a"])), p["b"]), 0),
    "joint": (
        lambda p, x: convolve(x, jnp.concatenate([p["a"], p["b"]], -1)),
        0,
    ),
    "grouped": (
        lambda p, x: convolve(x, p["grouped"], feature_group_count=2),
        1,
    ),
    "transposed": (lambda p, x: convolve(x, p["a"], lhs_dilation=(2, 2)), 1),
    "of data": (lambda p, x: convolve(convolve(x, KERNEL + 1.0), p["a"]), 1),
    "in a rule": (lambda p, x: ruled(x, p["a"]), 1),
    "none": (lambda p, x: x @ p["dense"], 0),
}
PARAMS = {
    "a": KERNEL,
    "b": normal(3, 2, 4, 4, seed=2),
    "grouped": normal(3, 2, 2, 4, seed=3),
    "dense": normal(4, 4, seed=4),
}


def convolutions(fn):
    return str(jax.make_jaxpr(fn)(PARAMS, X)).count("conv_general_dilated[")


@pytest.mark.parametrize("name", MODELS)
def test_patches_are_the_convolution(name):
    model, kept = MODELS[name]
    patched = with_patches(model)
    close(patched(PARAMS, X), model(PARAMS, X), 1e-4, 1e-5)
    assert convolutions(patched) == kept
    assert keeps_convolutions(model, PARAMS, X) == bool(kept)


def test_gradients_are_those_of_the_convolution():
    model, _ = MODELS["two"]
    loss = lambda fn: lambda p, x: jnp.sum(jnp.sin(fn(p, x)))
    actual, wanted = (
        jax.grad(loss(fn), (0, 1))(PARAMS, X) for fn in (with_patches(model), model)
    )
    close(actual, wanted, 1e-3, 1e-4)


@pytest.mark.parametrize("name", ["two", "joint", "of data", "none"])
def test_activations_are_those_that_are_captured(name):
    model, kept = MODELS[name]
    captured = with_activations(model)
    close(captured(PARAMS, X), capture_activations(model)(PARAMS, X), 1e-4, 1e-5)
    assert convolutions(captured) == kept


def test_arguments_may_be_static_or_named():
    def model(params, x, how, *, scale):
        return {"y": scale * convolve(x, params["a"]), "how": how}

    actual = with_patches(model)(PARAMS, X, "as it is", scale=2.0)
    assert actual["how"] == "as it is"
    close(actual["y"], 2.0 * convolve(X, KERNEL), 1e-4, 1e-5)


def test_elsewhere_than_on_a_cpu_nothing_is_replaced(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    model, _ = MODELS["two"]
    assert convolutions(with_patches(model)) == 2
    assert convolutions(with_activations(model)) == 2
    assert not keeps_convolutions(MODELS["transposed"][0], PARAMS, X)


def test_a_convolutional_model():
    conv_loss, params, tasks = models.conv_net()
    grad = jax.value_and_grad(meta.maml(conv_loss, SGD, 1).meta_loss)
    traced = jax.jit(grad).trace(params, tasks)
    assert "conv_general_dilated" not in str(traced.jaxpr)
    actual = traced.lower().compile()(params, tasks)
    reference = models.unrolled(conv_loss, SGD, 1)
    close(actual, value_and_grad(reference, params, tasks), 1e-4, 1e-5)


def test_a_loss_without_convolutions_is_traced_once():
    calls = []

    def loss(params, x):
        calls.append(1)
        return jnp.sum(x @ params)

    with_patches(loss)(jnp.eye(3), jnp.ones((2, 3)))
    assert len(calls) == 1
