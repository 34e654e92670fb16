import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dsbp_jax
from dsbp_jax import Layout, MatrixView, linalg
from dsbp_jax.tracking import Eigenspace, labelled
from tests.layers.models import normal

OUT_IN = MatrixView((1,), (0,))


def basis(dim, rank=2):
    vectors = jnp.linalg.qr(normal(dim, rank, seed=dim))[0]
    return linalg.EigenBasis(vectors, jnp.ones(rank), jnp.float32(5))


def trained(tx, params):
    grads = {name: normal(*leaf.shape, seed=3) for name, leaf in params.items()}
    return jax.jit(tx.update)(grads, tx.init(params), params)[1]


def test_a_label_is_taken_at_its_word():
    params = {"w": normal(6, 6)}
    layout = Layout((("w", OUT_IN),))
    state = trained(dsbp_jax.spectral_projection(2, layout=layout), params)
    (space,) = labelled("bases", dsbp_jax.eigenspaces(state), params)["w"]
    assert (space.view, space.side, space.source) == (OUT_IN, "output", "gradient")


def test_a_plain_basis_is_labelled_by_its_dimension_or_refused():
    params = {"w": normal(6, 4), "square": normal(5, 5)}
    found = labelled("bases", {"w": basis(6)}, params)
    assert found["w"][0].side == "input"
    assert labelled("bases", {"w": basis(4)}, params)["w"][0].side == "output"
    with pytest.raises(ValueError, match=r"bases of 'square' must say which side"):
        labelled("bases", {"square": basis(5)}, params)
    found = labelled("bases", {"square": basis(5)}, params, side="input")
    assert found["square"][0].side == "input"
    with pytest.raises(ValueError, match=r"must have vectors of shape \(4, k\)"):
        labelled("bases", {"w": basis(3)}, params)
    with pytest.raises(ValueError, match="must be an Eigenspace, a tuple of them"):
        labelled("bases", {"w": jnp.ones((6, 2))}, params)


def test_two_that_fit_are_refused_by_name():
    params = {"w": normal(6, 6)}
    tx = dsbp_jax.track_bases(2, side="both")
    spaces = dsbp_jax.eigenspaces(trained(tx, params))
    with pytest.raises(
        ValueError, match=r"got rank 2 on the input side .* and rank 2 on the output"
    ):
        labelled("bases", spaces, params)
    assert len(labelled("bases", spaces, params, side="both")["w"]) == 2
    assert labelled("bases", spaces, params, side="output")["w"][0].side == "output"
    twice = optax.chain(dsbp_jax.track_bases(2), dsbp_jax.track_bases(3))
    spaces = dsbp_jax.eigenspaces(trained(twice, params))
    with pytest.raises(ValueError, match=r"rank 2 on the output side .* and rank 3"):
        labelled("bases", spaces, params, side="output")


def test_a_layout_that_contradicts_the_label_is_refused():
    params = {"w": normal(6, 6)}
    spaces = dsbp_jax.eigenspaces(trained(dsbp_jax.track_bases(2), params))
    layout = Layout((("w", OUT_IN),))
    with pytest.raises(ValueError, match="must be of the leaf as layout sees it"):
        labelled("bases", spaces, params, layout)


def test_masked_leaves_are_ignored_and_a_wrong_tree_is_not():
    spaces = {"w": basis(6), "other": basis(6)}
    assert set(labelled("bases", spaces, {"w": normal(6, 4), "b": None})) == {"w"}
    with pytest.raises(ValueError, match="has no entry for 'w'; the nearest of its"):
        labelled("bases", {"w": basis(6)}, {"params/w": normal(6, 4)})
    with pytest.raises(ValueError, match="bases must hold the basis of at least one"):
        labelled("bases", {}, {"w": normal(6, 4)})
    space = Eigenspace(basis(6), jnp.array(True), None, "input", "gradient")
    with pytest.raises(ValueError, match="'w' must be of the output side, got those"):
        labelled("bases", {"w": space}, {"w": normal(6, 4)}, side="output")


def step(tx, params):
    return jax.jit(tx.update)(params, tx.init(params), params)


CONSUMERS = {
    "sam": lambda bases, params: dsbp_jax.sam_value_and_grad(
        lambda p: (0.0, p), 0.1, mode="spectral", bases=bases
    )(params),
    "decay": lambda bases, params: step(
        dsbp_jax.add_spectral_decay(0.1, bases=bases), params
    ),
    "transfer": lambda bases, params: step(
        dsbp_jax.add_spectral_transfer(0.1, params, bases), params
    ),
    "project_away": lambda bases, params: step(dsbp_jax.project_away(bases), params),
    "with_bases": lambda bases, params: dsbp_jax.with_bases(
        dsbp_jax.track_bases(2).init(params), bases
    ),
}


@pytest.mark.parametrize("name", CONSUMERS)
def test_no_consumer_guesses_the_side_of_a_square_kernel(name):
    params = {"w": normal(6, 6)}
    with pytest.raises(
        ValueError, match=r"'w'.*(which side|side must be).*square|squa"
    ):
        CONSUMERS[name]({"w": basis(6)}, params)


def test_sam_perturbs_in_the_space_that_the_label_names():
    """Input bases of a square kernel, as `spectral_subspace` makes some of them."""
    g = jnp.zeros((6, 6)).at[0].set(normal(6))
    params = {"w": jnp.zeros((6, 6))}
    tx = dsbp_jax.spectral_subspace(optax.sgd(0.1), 1, side="input")
    _, state = jax.jit(tx.update)({"w": g}, tx.init(params), params)
    seen = []
    record = lambda p: (seen.append(p["w"]), (0.0, {"w": g}))[1]
    dsbp_jax.sam_value_and_grad(
        record, 0.1, mode="spectral", bases=dsbp_jax.eigenspaces(state)
    )(params)
    v = dsbp_jax.eigenspaces(state)["w"][0].vectors
    expected = v @ (v.T @ g)
    cosine = jnp.vdot(seen[1], expected)
    cosine /= jnp.linalg.norm(seen[1]) * jnp.linalg.norm(expected)
    assert cosine > 1 - 1e-6
    np.testing.assert_allclose(jnp.linalg.norm(seen[1]), 0.1, rtol=1e-5)
