import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsbp_jax import MatrixView
from dsbp_jax.linalg import EigenBasis
from dsbp_jax.tracking import Eigenspace, from_coordinates, project, to_coordinates
from tests.layers.models import normal

# Of each kind of leaf: shape, view, and the dimensions of its two sides.
KINDS = {
    "dense": ((12, 10), MatrixView((0,), (1,))),
    "square": ((8, 8), MatrixView((0,), (1,))),
    "stored (out, in)": ((10, 12), MatrixView((1,), (0,))),
    "conv": ((3, 3, 6, 8), MatrixView((2,), (3,))),
    "attention": ((12, 2, 5), MatrixView((0,), (1, 2))),
    "stacked": ((3, 10, 8), MatrixView((1,), (2,), (0,))),
}


def space(shape, view, side, rank=3, solved=True):
    *batch, _, d_in, d_out = view.matrix_shape(shape)
    dim = d_in if side == "input" else d_out
    vectors = jnp.linalg.qr(normal(*batch, dim, rank, seed=1))[0]
    values = jnp.broadcast_to(jnp.array([4.0, 2.0, 1.0])[:rank], (*batch, rank))
    basis = EigenBasis(vectors, values, jnp.full(batch, 10.0))
    return Eigenspace(basis, jnp.full(batch, solved), view, side, "gradient")


def dense(leaf, one, middle):
    """`V M Vᵀ` applied by whole matrices, the readable way; float64."""
    matrix = np.asarray(one.view.to_matrix(leaf), np.float64)
    v = np.asarray(one.vectors, np.float64)[..., None, :, :]
    p = v @ (middle[..., None, :, None] * np.swapaxes(v, -1, -2))
    result = p @ matrix if one.side == "input" else matrix @ p
    return np.asarray(one.view.from_matrix(jnp.asarray(result), leaf.shape))


kinds = pytest.mark.parametrize(("shape", "view"), KINDS.values(), ids=KINDS)
sides = pytest.mark.parametrize("side", ["input", "output"])


@kinds
@sides
def test_methods_equal_dense_matrices(shape, view, side):
    leaf, one = normal(*shape), space(shape, view, side)
    ones, values = np.ones(one.values.shape), np.asarray(one.values, np.float64)
    inside = dense(leaf, one, ones)
    close = lambda actual, expected: np.testing.assert_allclose(
        actual, expected, atol=3e-6
    )
    close(one.project(leaf), inside)
    close(one.project(leaf, residual=0.25), leaf - 0.75 * (leaf - inside))
    close(one.outside(leaf), leaf - inside)
    close(one.weighted(leaf), dense(leaf, one, values))
    close(one.lift(one.coordinates(leaf), leaf), inside)
    close(one.leading(1).project(leaf), dense(leaf, one, np.array([1.0, 0, 0]) * ones))


@kinds
def test_both_sides_are_one_after_the_other(shape, view):
    leaf = normal(*shape)
    both = space(shape, view, "input"), space(shape, view, "output")
    expected = both[1].project(both[0].project(leaf))
    np.testing.assert_allclose(project(leaf, both), expected, atol=2e-6)
    thin = to_coordinates(leaf, both)
    assert thin.shape[-2:] == (3, 3)
    lifted = view.from_matrix(from_coordinates(thin, both, leaf), shape)
    np.testing.assert_allclose(lifted, expected, atol=2e-6)


@pytest.mark.parametrize("method", ["project", "outside"])
def test_a_leaf_whose_space_was_never_solved_passes_through(method):
    shape, view = KINDS["stacked"]
    leaf, one = normal(*shape), space(shape, view, "output")
    one = dataclasses.replace(one, solved=jnp.array([True, False, True]))
    result = getattr(one, method)(leaf)
    np.testing.assert_array_equal(result[1], leaf[1])
    assert not np.array_equal(result[0], leaf[0])


def test_energy_leaves_out_trailing_columns():
    shape, view = KINDS["dense"]
    leaf, one = normal(*shape), space(shape, view, "output")
    np.testing.assert_allclose(
        one.project(leaf, energy=0.6), one.leading(2).project(leaf), atol=1e-6
    )


def test_dtypes_are_kept_and_the_label_is_static():
    shape, view = KINDS["dense"]
    one = space(shape, view, "output")
    low = normal(*shape).astype(jnp.bfloat16)
    assert one.project(low).dtype == jnp.bfloat16
    run = jax.jit(lambda one, leaf: (one.side, one.project(leaf))[1])
    expected = one.project(normal(*shape))
    np.testing.assert_allclose(run(one, normal(*shape)), expected, atol=1e-6)
    leaves, _ = jax.tree.flatten(one)
    assert len(leaves) == 4


def test_rotation_moves_coordinates():
    shape, view = KINDS["dense"]
    old = space(shape, view, "input")
    turn = jnp.linalg.qr(normal(3, 3, seed=4))[0]
    basis = old.basis._replace(vectors=old.vectors @ turn)
    new = dataclasses.replace(old, basis=basis)
    leaf = normal(*shape)
    moved = old.rotation_to(new) @ old.coordinates(leaf)[0]
    np.testing.assert_allclose(moved, new.coordinates(leaf)[0], atol=2e-6)


def test_a_space_without_a_view_says_so():
    one = dataclasses.replace(space(*KINDS["dense"], "input"), view=None)
    with pytest.raises(ValueError, match="view must be known"):
        one.project(normal(12, 10))
