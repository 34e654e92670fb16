"""The three kinds of visit the interpreter is made for, in miniature."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from dsbp_jax.layers import layout, primitives
from dsbp_jax.layers.finder import array_leaves, trace
from dsbp_jax.layers.rewrite import evaluate
from tests.layers.models import nested_scans, normal

pytestmark = pytest.mark.usefixtures("strict_promotion")


def rewrite(fn, visit, params, *args, extras=None):
    traced = trace(fn, params, args, {})
    outputs, collected = evaluate(traced, visit, array_leaves((params, args)), extras)
    return traced.unflatten(outputs), collected


def plain(product, x, w, extra):
    return product(x, w), None


def sketch(product, x, w, basis):
    """`y = xw` whose weight gradient is `B((xB)ᵀΔ)`: `w` moves along `BBᵀ`."""
    return product.sketched(x, w, basis, product.restrict(w, basis)), None


def nested_branches(params, x):
    """A stack, a shared kernel, a branch, a rematerialised block and a jit."""

    def layer(h, w):
        h = jax.checkpoint(lambda h, w: jnp.tanh(h @ w))(h, w)
        step = lambda h: jax.jit(jnp.matmul)(h, params["shared"])
        return lax.cond(jnp.sum(h) > 0, step, lambda h: h, h), None

    return lax.scan(layer, x, params["stacked"])[0]


PARAMS = {"stacked": normal(3, 4, 4), "shared": normal(4, 4, seed=1)}
NESTED = {"stacked": normal(3, 2, 4, 4), "shared": normal(4, 4, seed=1)}
X = normal(5, 4)


def orthonormal(*shape):
    return jnp.linalg.qr(normal(*shape, seed=7))[0]


@pytest.mark.parametrize(
    ("model", "params"), [(nested_branches, PARAMS), (nested_scans, NESTED)]
)
def test_sketched_gradient_is_the_projected_one(model, params):
    batch = params["stacked"].shape[:-2]
    extras = {"stacked": orthonormal(*batch, 4, 2), "shared": orthonormal(4, 2)}

    def loss(params, fn):
        out = fn(params)
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(out))

    sketched = lambda p: rewrite(model, sketch, p, X, extras=extras)[0]
    value, gradient = jax.jit(jax.value_and_grad(lambda p: loss(p, sketched)))(params)
    wanted_value, wanted = jax.jit(
        jax.value_and_grad(lambda p: loss(p, lambda p: model(p, X)))
    )(params)
    np.testing.assert_allclose(value, wanted_value, rtol=1e-6)
    for name, basis in extras.items():
        projected = basis @ (basis.mT @ wanted[name])
        scale = jnp.abs(wanted[name]).max()
        np.testing.assert_allclose(gradient[name], projected, atol=2e-6 * scale)


def test_coordinates_replace_the_weight():
    basis = {"stacked": orthonormal(3, 4, 2), "shared": orthonormal(4, 2)}
    coordinates = {"stacked": normal(3, 2, 4, seed=3), "shared": normal(2, 4, seed=4)}

    def visit(product, x, w, extra):
        basis, coordinate = extra
        y = product(x, lax.stop_gradient(w))
        return y + jnp.matmul(jnp.matmul(x, basis), coordinate), None

    extras = {name: (basis[name], coordinates[name]) for name in basis}
    out, _ = rewrite(nested_branches, visit, PARAMS, X, extras=extras)
    merged = jax.tree.map(lambda w, v, s: w + v @ s, PARAMS, basis, coordinates)
    np.testing.assert_allclose(out, nested_branches(merged, X), rtol=2e-5, atol=1e-5)


def test_extras_follow_a_stack_that_is_rearranged_before_the_loops():
    def model(params, x):
        stacked = jnp.transpose(params["stacked"], (2, 0, 1)).reshape(2, 3, 4, 4)
        return nested_scans({**params, "stacked": stacked}, x)[0]

    params = {"stacked": normal(4, 4, 6), "shared": normal(4, 4)}
    assert layout(model, params, X)["stacked"].batch_axes == (2,)
    marks = {"stacked": jnp.arange(6.0)[:, None, None] * jnp.ones((6, 1, 2))}

    def visit(product, x, w, extra):
        return product(x, w), extra

    _, collected = rewrite(model, visit, params, X, extras=marks)
    assert collected["stacked"].shape == (2, 3, 1, 2)
    np.testing.assert_array_equal(collected["stacked"][..., 0, 0].ravel(), range(6))
    (site,) = [s for s in trace(model, params, (X,), {}).sites if s.path == "stacked"]
    np.testing.assert_array_equal(site.gather(collected["stacked"]), marks["stacked"])


def test_equations_keep_their_parameters():
    def model(params, x):
        return jnp.matmul(
            x, params, precision="highest", preferred_element_type=jnp.float32
        )

    w, x = normal(4, 3, dtype=jnp.bfloat16), normal(5, 4, dtype=jnp.bfloat16)
    rewritten = jax.make_jaxpr(lambda w, x: rewrite(model, plain, w, x)[0])(w, x)
    assert str(rewritten) == str(jax.make_jaxpr(model)(w, x))


def test_remat_keeps_its_policy():
    policy = jax.checkpoint_policies.nothing_saveable

    def model(params, x):
        block = lambda x: jnp.sin(jnp.sin(x @ params))
        return jnp.sum(jax.checkpoint(block, policy=policy, prevent_cse=False)(x))

    def equations(fn):
        jaxpr = jax.make_jaxpr(jax.grad(fn))(normal(4, 4), X)
        return sorted(str(e.primitive) for e in jaxpr.eqns)

    rewritten = lambda w, x: rewrite(model, plain, w, x)[0]
    assert equations(rewritten) == equations(model)

    def options(fn):
        first, *_ = jax.make_jaxpr(fn)(normal(4, 4), X).jaxpr.eqns
        assert primitives.call_of(first).kind == "remat"
        return primitives.remat_options(first)

    assert options(rewritten) == options(model)
    assert options(model)["policy"] in (policy, None)  # None: that policy by default
    assert not options(model).get("prevent_cse")


def test_a_users_rule_is_never_visited_by_default():
    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda res, g: res)
    visited = []

    def visit(product, x, w, extra):
        visited.append(product.site.name)
        return product(x, w), None

    model = lambda p, x: product(x @ p["a"], p["b"])
    params = {"a": normal(4, 4), "b": normal(4, 4)}
    rewrite(model, visit, params, X)
    assert visited == ["a"]


def test_effects_happen_once(capfd):
    def model(params, x):
        jax.debug.print("row {}", x[0, 0])
        return x @ params

    rewrite(model, plain, normal(4, 3), jnp.ones((5, 4)))
    jax.effects_barrier()
    assert capfd.readouterr().out.count("row 1.0") == 1
