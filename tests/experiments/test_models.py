"""Every model: shapes, dtypes, modes, initialisation, and how it is read."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import dsbp_jax
from dsbp_jax.layers import leaves_by_path
from experiments import models

SMALL = {
    "mlp": {"hidden": (32,)},
    "cnn": {"channels": (4, 8, 8), "hidden": 16},
    "conv4": {"channels": 24},
    "resnet18": {"width": 4},
    "vit": {"dim": 16, "depth": 2, "heads": 2},
}
KERNELS = {"mlp": 2, "cnn": 5, "conv4": 5, "resnet18": 21, "vit": 2 + 2 * 6}
"""How many layers the small models have."""


def build(name, image_shape=(8, 8, 1), *, num_classes=10, seed=0, **options):
    return models.build(
        name,
        image_shape=image_shape,
        num_classes=num_classes,
        rngs=nnx.Rngs(seed),
        **(SMALL[name] | options),
    )


def built(name, dtype=jnp.float32):
    """A small model whose kernels come from NumPy, which need not compile."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: build(name, dtype=dtype)))
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        name = str(path[-2])  # The last part is the value of the variable.
        if "kernel" in name:
            fan_in = math.prod(leaf.shape) / leaf.shape[-1]
            return jnp.asarray(rng.normal(0, fan_in**-0.5, leaf.shape), leaf.dtype)
        ones = "scale" in name or "var" in name
        return (jnp.ones if ones else jnp.zeros)(leaf.shape, leaf.dtype)

    return nnx.merge(graphdef, jax.tree.map_with_path(fill, state))


def some_images(num=12, shape=(8, 8, 1)):
    return jax.random.normal(jax.random.key(0), (num, *shape))


@nnx.jit
def run(model, images):
    return model(images)


@pytest.mark.parametrize("name", models.MODELS)
class TestEveryModel:
    @pytest.mark.parametrize(
        "shape", [(8, 8, 1), (28, 28, 1), (32, 32, 3), (64, 64, 3)]
    )
    def test_logits(self, name, shape):
        images = jax.ShapeDtypeStruct((5, *shape), jnp.float32)
        logits = nnx.eval_shape(
            lambda images: build(name, shape, num_classes=7)(images), images
        )
        assert (logits.shape, logits.dtype) == ((5, 7), jnp.float32)

    def test_bfloat16_computes_narrow_and_keeps_wide(self, name):
        graphdef, state = nnx.split(built(name, "bfloat16"))
        assert {leaf.dtype.name for leaf in jax.tree.leaves(state)} == {"float32"}
        forward = lambda state, images: nnx.merge(graphdef, state)(images)
        jaxpr = str(jax.make_jaxpr(forward)(state, some_images()))
        products = re.findall(r":(\w+)\[[\d,]*\] = (?:dot_gen|conv_gen)", jaxpr)
        # Attention scores alone, no product of a kernel, are kept in float32.
        assert products.count("bf16") >= KERNELS[name]
        assert products.count("f32") == (SMALL[name]["depth"] if name == "vit" else 0)

    def test_evaluation_treats_images_alone(self, name):
        model = built(name)
        model.eval()
        state = jax.tree.map(np.asarray, nnx.state(model))
        images = some_images()
        logits = run(model, images)
        others_blank = images.at[2:].set(0.0)
        np.testing.assert_allclose(run(model, others_blank)[:2], logits[:2], atol=1e-5)
        jax.tree.map(np.testing.assert_array_equal, state, nnx.state(model))

    def test_every_kernel_is_found_as_a_layer(self, name):
        model = built(name)
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        forward = lambda params, rest, images: nnx.merge(graphdef, params, rest)(images)
        layout = dsbp_jax.layout(forward, params, rest, some_images())
        kernels = [path for path in leaves_by_path(params) if "kernel" in path]
        assert sorted(layout) == sorted(kernels)
        assert len(kernels) == KERNELS[name]

    @pytest.mark.slow
    def test_learns_a_batch_by_heart(self, name):
        model = built(name)
        optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
        images, labels = some_images(), jnp.arange(12) % 3

        @nnx.jit
        def step(model, optimizer):
            def loss(model):
                return optax.softmax_cross_entropy_with_integer_labels(
                    model(images), labels
                ).mean()

            value, grads = nnx.value_and_grad(loss)(model)
            optimizer.update(model, grads)
            return value

        losses = [float(step(model, optimizer)) for _ in range(60)]
        assert losses[-1] < 0.2 * losses[0]

    def test_unknown_option_lists_the_accepted(self, name):
        with pytest.raises(ValueError, match=f"colour: not an option of '{name}'.*dt"):
            build(name, colour="red")


def test_unknown_model_lists_the_names():
    with pytest.raises(ValueError, match="accepted are mlp, cnn, conv4, resnet18, vit"):
        models.build(
            "mlq", image_shape=(8, 8, 1), num_classes=2, rngs=nnx.Rngs(params=0)
        )


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_bfloat16_is_close_to_float32(name):
    logits = [
        run(built(name, dtype), some_images()) for dtype in (jnp.float32, jnp.bfloat16)
    ]
    assert [x.dtype for x in logits] == [jnp.float32, jnp.float32]
    np.testing.assert_allclose(*logits, atol=0.1)


def test_same_seed_same_model():
    kernels = [build("mlp", seed=seed).head.kernel[...] for seed in (0, 0, 1)]
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert not np.array_equal(kernels[0], kernels[2])


@pytest.mark.parametrize(
    ("kernel", "gain"),
    [
        (lambda: build("mlp", hidden=(400, 300)).layers[1].kernel, 2),
        (lambda: build("mlp", hidden=(400,), num_classes=300).head.kernel, 1),
        (lambda: build("cnn", channels=(64,), hidden=16).dense.kernel, 2),
        (lambda: build("resnet18", width=16).blocks[1].conv1.kernel, 2),
    ],
    ids=["mlp", "head", "cnn", "resnet18"],
)
def test_initial_scale_is_of_he_or_lecun(kernel, gain):
    # Under jit the kernels that are not returned are not computed.
    values = jax.jit(lambda: kernel()[...])()
    fan_in = values.size / values.shape[-1]
    assert float(values.std()) == pytest.approx((gain / fan_in) ** 0.5, rel=0.05)


def test_batch_normalisation_learns_in_training_mode_only():
    model = built("resnet18")
    images = 3.0 + some_images()
    start = np.asarray(model.stem_norm.mean[...])
    for _ in range(80):
        trained = run(model, images)
    learned = np.asarray(model.stem_norm.mean[...])
    assert not np.allclose(start, learned)
    model.eval()
    np.testing.assert_allclose(run(model, images), trained, atol=0.05, rtol=0.05)
    np.testing.assert_array_equal(model.stem_norm.mean[...], learned)
    model.train()
    run(model, -images)
    assert not np.allclose(model.stem_norm.mean[...], learned)


class TestViT:
    def positions(self, shape, **options):
        model = nnx.eval_shape(lambda: build("vit", shape, **options))
        return model.positions.shape

    @pytest.mark.parametrize(
        ("shape", "tokens"),
        [((8, 8, 1), 16), ((28, 28, 1), 49), ((32, 32, 3), 64), ((64, 64, 3), 64)],
    )
    def test_default_patch(self, shape, tokens):
        assert self.positions(shape) == (1, tokens, 16)

    def test_patches_of_oblong_images(self):
        assert self.positions((12, 8, 1), patch=4) == (1, 6, 16)

    def test_sizes_that_do_not_divide(self):
        with pytest.raises(ValueError, match=r"patch=3 does.*accepted are 1, 2, 4, 8"):
            build("vit", patch=3)
        with pytest.raises(ValueError, match="heads=3 does not divide dim=16"):
            build("vit", heads=3)
