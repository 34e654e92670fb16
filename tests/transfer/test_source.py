"""Sources: what is saved comes back, and what is merged spans both."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsbp_jax
from dsbp_jax import linalg, transfer
from tests.layers.models import normal
from tests.transfer.test_adapters import OTHER, PARAMS, X, bases, projector


def test_a_saved_source_comes_back_bit_for_bit(tmp_path):
    spaces = bases(3)
    half = {**PARAMS, "b": PARAMS["b"].astype(jnp.bfloat16)}
    transfer.save_source(tmp_path / "source.npz", half, spaces)
    source = transfer.load_source(tmp_path / "source.npz")
    assert {*source.params} == {"a", "b"}
    for path, space in spaces.items():
        assert jax.tree.structure(space) == jax.tree.structure(source.bases[path])
        jax.tree.map(np.testing.assert_array_equal, source.bases[path], space)
        np.testing.assert_array_equal(source.params[path], half[path])
        assert source.params[path].dtype == half[path].dtype
    tx = dsbp_jax.add_spectral_transfer(0.5, *source)
    tx.init(half)


def test_a_file_of_something_else_is_named(tmp_path):
    for name, write in (
        ("other.npz", lambda file: np.savez(file, x=np.ones(2))),
        ("text.npz", lambda file: file.write_text("no arrays", encoding="utf-8")),
    ):
        write(tmp_path / name)
        with pytest.raises(ValueError, match=rf"path must be a file of save_.*{name}"):
            transfer.load_source(tmp_path / name)
    with pytest.raises(OSError, match="missing"):
        transfer.load_source(tmp_path / "missing.npz")


@pytest.mark.slow
def test_penalties_of_merged_sources_add_up():
    first, second = bases(3, X), bases(4, OTHER)
    merged = transfer.merge_bases(first, second)
    params = jax.tree.map(lambda w: w + 0.1 * jnp.cos(3 * w), PARAMS)
    penalty = lambda spaces: float(
        dsbp_jax.spectral_transfer_penalty(1.0, PARAMS, spaces)(params)
    )
    assert merged["a"].rank == 7
    assert penalty(merged) == pytest.approx(penalty(first) + penalty(second), rel=1e-4)
    inside = projector(merged["a"].vectors)
    for spaces in (first, second):
        v = spaces["a"].vectors
        np.testing.assert_allclose(inside @ v, v, atol=1e-5)


def test_growth_stops_at_the_energy():
    """As few directions as hold the share, and no fewer."""
    first, second = bases(2, X)["a"].basis, bases(12, OTHER)["a"].basis
    cov = np.asarray(OTHER.T @ OTHER, np.float64) / len(OTHER)
    held = lambda basis: np.trace(projector(basis.vectors) @ cov) / np.trace(cov)
    sizes = {}
    for energy in (0.5, 0.9, 0.99):
        grown = linalg.grow_basis(first, second, energy)
        sizes[energy] = grown.vectors.shape[-1]
        assert held(grown) >= energy - 1e-4
        np.testing.assert_allclose(
            projector(grown.vectors) @ first.vectors, first.vectors, atol=1e-5
        )
        away = np.eye(12) - projector(first.vectors)
        left = np.linalg.eigvalsh(away @ cov @ away)[::-1]
        fewer = held(first) + left[: sizes[energy] - 3].sum() / np.trace(cov)
        assert fewer < energy
    assert sizes[0.5] < sizes[0.9] < sizes[0.99] < 12
    # What is held already adds nothing.
    assert linalg.grow_basis(second, first, 1.0).vectors.shape[-1] == 12


def test_stacks_grow_together():
    stack = lambda seed: linalg.EigenBasis(
        jnp.linalg.qr(normal(3, 6, 2, seed=seed))[0], jnp.ones((3, 2)), 2 * jnp.ones(3)
    )
    first, second = stack(0), stack(1)
    second = second._replace(vectors=second.vectors.at[0].set(first.vectors[0]))
    grown = linalg.grow_basis(first, second)
    assert grown.vectors.shape == (3, 6, 4)
    gram = grown.vectors.mT @ grown.vectors
    np.testing.assert_allclose(gram, np.broadcast_to(np.eye(4), (3, 4, 4)), atol=1e-5)


def test_spaces_of_other_layers_do_not_merge():
    spaces = bases(2)
    with pytest.raises(ValueError, match=r"other must have a space of .* at 'a'"):
        transfer.merge_bases(spaces, {"a": spaces["b"]})
    with pytest.raises(ValueError, match="energy must be"):
        transfer.merge_bases(spaces, spaces, energy=0)
    random = dataclasses.replace(spaces["a"], solved=jnp.array(False))
    with pytest.raises(ValueError, match="other must have been refreshed; at 'a'"):
        transfer.merge_bases(spaces, {"a": random})
    only = transfer.merge_bases({"a": spaces["a"]}, {"b": spaces["b"]})
    assert {*only} == {"a", "b"}
