import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsbp_jax import linalg
from tests.linalg.spectra import (
    DIM,
    RANK,
    SPECTRA,
    factor,
    orthonormality_error,
    projector_error,
    projector_tolerance,
    symmetric,
)

pytestmark = pytest.mark.usefixtures("strict_promotion")

KEY = jax.random.key(0)
top = jax.jit(linalg.top_eigenpairs, static_argnums=1)
refresh = jax.jit(linalg.refresh_with_info, static_argnames=("num_blocks",))


def operator_of(spectrum, kind, dtype=jnp.float32):
    if kind == "gram":
        return linalg.gram(jnp.asarray(factor(spectrum), dtype))
    return linalg.matrix(jnp.asarray(symmetric(spectrum)[0], dtype))


@pytest.mark.parametrize("kind", ["gram", "matrix"])
@pytest.mark.parametrize("name", SPECTRA)
def test_top_eigenpairs_against_eigh(name, kind):
    spectrum = SPECTRA[name]
    basis = top(operator_of(spectrum, kind), RANK, key=KEY)
    assert orthonormality_error(basis.vectors) <= 1e-5
    _, q = symmetric(spectrum)
    ordered = np.argsort(spectrum)[::-1]
    tolerance = projector_tolerance(spectrum, RANK)
    if tolerance is None:
        captured = np.einsum(
            "dk,dk->", q.T @ basis.vectors, (q.T @ basis.vectors) * spectrum[:, None]
        )
        attainable = np.sort(spectrum)[::-1][:RANK].sum()
        np.testing.assert_allclose(captured, attainable, rtol=1e-5)
    else:
        oracle = q[:, ordered[:RANK]]
        assert projector_error(basis.vectors, oracle) <= tolerance
    scale = max(spectrum.max(), 1e-30)
    np.testing.assert_allclose(
        np.asarray(basis.values) / scale,
        np.sort(spectrum)[::-1][:RANK] / scale,
        atol=5e-6,
    )
    np.testing.assert_allclose(basis.trace, spectrum.sum(), rtol=1e-5)


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("num_blocks", [2, 4])
def test_refresh_is_rayleigh_ritz_on_the_krylov_block(name, num_blocks):
    rank = 8
    c, _ = symmetric(SPECTRA[name])
    start = linalg.init_basis(DIM, rank, key=KEY)
    blocks = [np.asarray(start.vectors, np.float64)]
    for _ in range(num_blocks - 1):
        blocks.append(np.linalg.qr(c @ blocks[-1])[0])
    krylov, _ = np.linalg.qr(np.concatenate(blocks, axis=1))
    ritz = np.linalg.eigvalsh(krylov.T @ c @ krylov)[::-1][:rank]
    for kind in ("gram", "matrix"):
        basis, info = refresh(
            operator_of(SPECTRA[name], kind), start, num_blocks=num_blocks
        )
        assert info.ok
        assert orthonormality_error(basis.vectors) <= 1e-5
        np.testing.assert_allclose(basis.values, ritz, atol=1e-5 * c.max() + 1e-6)


def test_refresh_recovers_a_drifted_subspace():
    """At least 80 % of the energy lost to a drift comes back in one refresh."""
    dim, samples, rank = 512, 256, 32
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.standard_normal((dim, dim)))
    spectrum = np.where(np.arange(dim) < rank, 0.9 ** np.arange(dim), 0.01)
    rows = rng.standard_normal((samples, dim)) * np.sqrt(spectrum)
    # A quarter of the leading directions is replaced by new ones.
    mixed = q.copy()
    mixed[:, : rank // 4], mixed[:, rank : rank + rank // 4] = (
        q[:, rank : rank + rank // 4],
        q[:, : rank // 4],
    )
    before, after = (
        linalg.gram(jnp.asarray(rows @ directions.T, jnp.float32))
        for directions in (q, mixed)
    )
    stale = top(before, rank, key=KEY)
    best = top(after, rank, key=KEY)
    energy = lambda basis: float(jnp.vdot(basis.vectors, after.matmat(basis.vectors)))
    attainable, lost_to_drift = energy(best), energy(stale)
    assert lost_to_drift < 0.9 * attainable
    fresh, _ = refresh(after, stale)
    recovered = (energy(fresh) - lost_to_drift) / (attainable - lost_to_drift)
    assert recovered >= 0.8


def test_stays_orthonormal_over_a_thousand_refreshes():
    operator = operator_of(SPECTRA["decaying"], "gram")
    start = linalg.init_basis(DIM, RANK, key=KEY)

    @jax.jit
    def many(basis):
        body = lambda b, _: (linalg.refresh_basis(operator, b), None)
        return jax.lax.scan(body, basis, length=1000)[0]

    assert orthonormality_error(many(start).vectors) <= 1e-5


@pytest.mark.parametrize("exponent", [-15, 15])
def test_extreme_scales(exponent):
    scale = 10.0**exponent
    x = factor(SPECTRA["geometric"])
    basis = top(linalg.gram(jnp.asarray(x * scale, jnp.float32)), RANK, key=KEY)
    expected = SPECTRA["geometric"][:RANK]
    np.testing.assert_allclose(basis.values / scale**2, expected, atol=1e-5)


@pytest.mark.parametrize("samples", [1, 5, RANK])
def test_fewer_samples_than_rank(samples):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((samples, DIM)), "float32")
    basis = top(linalg.gram(x), RANK, key=KEY)
    assert orthonormality_error(basis.vectors) <= 1e-5
    inside = basis.vectors @ (basis.vectors.T @ x.T)
    np.testing.assert_allclose(inside, x.T, atol=1e-4)
    warm, info = refresh(linalg.gram(x), basis)
    assert info.ok
    assert orthonormality_error(warm.vectors) <= 1e-5


def test_full_rank_is_the_dense_solution():
    operator = operator_of(SPECTRA["geometric"], "gram")
    basis, _ = refresh(operator, linalg.init_basis(DIM, DIM, key=KEY))
    np.testing.assert_allclose(basis.values, SPECTRA["geometric"], atol=1e-5)


def test_bfloat16_input_is_solved_in_float32():
    x = jnp.asarray(factor(SPECTRA["geometric"]), jnp.bfloat16)
    basis = top(linalg.gram(x), RANK, key=KEY)
    assert basis.vectors.dtype == basis.values.dtype == jnp.float32
    oracle = np.linalg.eigh(np.asarray(x, np.float64).T @ np.asarray(x, np.float64))[1]
    assert projector_error(basis.vectors, oracle[:, ::-1][:, :RANK]) <= 1e-3


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("tolerance", [0.0, 0.1])
def test_keeps_the_last_good_basis(bad, tolerance):
    x = jnp.asarray(factor(SPECTRA["geometric"]), jnp.float32)
    good = top(linalg.gram(x), RANK, key=KEY)
    after, info = refresh(linalg.gram(x.at[3, 5].set(bad)), good, tolerance=tolerance)
    assert not info.ok
    jax.tree.map(np.testing.assert_array_equal, after, good)


def test_tolerance_keeps_an_invariant_space():
    operator = operator_of(SPECTRA["step"], "matrix")
    good = top(operator, RANK, key=KEY)
    kept, info = refresh(operator, good, tolerance=1e-3)
    assert info.residual <= 1e-3
    assert info.ok
    assert projector_error(kept.vectors, good.vectors) <= 1e-5
    random = linalg.init_basis(DIM, RANK, key=KEY)
    moved, info = refresh(operator, random, tolerance=1e-3)
    assert info.residual > 1e-3
    assert projector_error(moved.vectors, random.vectors) > 0.1
    with pytest.raises(ValueError, match="tolerance must be a number in"):
        linalg.refresh_with_info(operator, good, tolerance=2.0)


def test_vmap_scan_cond_and_grad_agree_with_single_calls():
    operators = [operator_of(SPECTRA[n], "gram") for n in ("decaying", "zero", "step")]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *operators)
    starts = [linalg.init_basis(DIM, RANK, key=k) for k in jax.random.split(KEY, 3)]
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)
    warm = functools.partial(linalg.refresh_with_info, num_blocks=3)
    vmapped, _ = jax.jit(jax.vmap(warm))(stacked, batch)
    _, (scanned, _) = jax.lax.scan(
        lambda _, a: (None, warm(*a)), None, (stacked, batch)
    )
    for i, (operator, start) in enumerate(zip(operators, starts, strict=True)):
        keep = lambda _, basis: basis
        solve = lambda operator, basis: warm(operator, basis)[0]
        single = jax.lax.cond(i >= 0, solve, keep, operator, start)
        for batched in (vmapped, scanned):
            assert orthonormality_error(batched.vectors[i]) <= 1e-5
            np.testing.assert_allclose(batched.values[i], single.values, atol=1e-5)


def test_no_recompilation_across_operators():
    traces = []

    @jax.jit
    def step(operator, basis):
        traces.append(1)
        return linalg.refresh_basis(operator, basis)

    basis = linalg.init_basis(DIM, RANK, key=KEY)
    for name in ("flat", "step"):
        basis = step(operator_of(SPECTRA[name], "gram"), basis)
    assert len(traces) == 1


@pytest.mark.parametrize("rank", [0, -1, 2.0, True, "8", DIM + 1])
def test_bad_rank(rank):
    operator = operator_of(SPECTRA["flat"], "gram")
    with pytest.raises(ValueError, match=r"rank must be an int between 1 and .* got"):
        linalg.top_eigenpairs(operator, rank, key=KEY)
    with pytest.raises(ValueError, match="max_restarts must be an int of at least 1"):
        linalg.top_eigenpairs(operator, 1, key=KEY, max_restarts=0)
    with pytest.raises(ValueError, match=r"rank must be an int between 1 and .* got"):
        linalg.init_basis(DIM, rank, key=KEY)


def test_bad_shapes():
    basis = linalg.init_basis(8, 2, key=KEY)
    with pytest.raises(ValueError, match="basis must have 256 rows"):
        linalg.refresh_basis(operator_of(SPECTRA["flat"], "gram"), basis)
    with pytest.raises(ValueError, match="num_blocks must be an int of at least 2"):
        linalg.refresh_basis(linalg.matrix(jnp.eye(8)), basis, num_blocks=1)
    with pytest.raises(ValueError, match="x must be a floating-point array"):
        linalg.gram(jnp.ones(3))
    with pytest.raises(ValueError, match="c must be square"):
        linalg.matrix(jnp.ones((3, 2)))


@pytest.mark.parametrize(("dim", "rank", "samples"), [(600, 64, 8), (400, 128, 64)])
def test_wide_blocks_of_low_rank_data_do_not_fail(dim, rank, samples):
    """At 4,096 entries a maximum can lose the NaN of a failed factorisation."""
    x = jax.random.normal(KEY, (samples, dim))
    operator = linalg.gram(x)
    basis = linalg.init_basis(dim, rank, key=KEY)
    for _ in range(3):
        basis, info = refresh(operator, basis)
        assert info.ok
    assert orthonormality_error(basis.vectors) <= 1e-5
    inside = basis.vectors @ (basis.vectors.T @ x.T)
    np.testing.assert_allclose(inside, x.T, atol=1e-3)


def test_under_x64_everything_stays_float32():
    with jax.enable_x64(True):
        x = jnp.asarray(factor(SPECTRA["geometric"]))
        assert x.dtype == jnp.float64
        basis = top(linalg.gram(x), RANK, key=KEY)
        start = linalg.init_basis(DIM, RANK, key=KEY)
        refreshed = jax.jit(linalg.refresh_basis, static_argnames="num_blocks")
        warm = refreshed(linalg.gram(x), start, num_blocks=4)
        for leaf in jax.tree.leaves((basis, start, warm)):
            assert leaf.dtype == jnp.float32
        lanczos = jax.jit(lambda x: linalg.lanczos(linalg.matrix(x.T @ x), x[0], 4))(x)
        assert {leaf.dtype for leaf in lanczos} == {jnp.dtype("float32")}


@pytest.mark.parametrize("dim", [20, 300])
def test_cold_solve_of_a_bad_operator_says_so(dim):
    operator = linalg.matrix(jnp.full((dim, dim), jnp.nan, jnp.float32))
    basis = top(operator, 4, key=KEY)
    assert np.isnan(basis.values).all()
    assert orthonormality_error(basis.vectors) <= 1e-5


def test_indefinite_spectrum_by_signed_value():
    spectrum = np.concatenate([-np.linspace(0.1, 40, DIM - 3), [3.0, 2.0, 1.0]])
    c, _ = symmetric(spectrum)
    basis = top(linalg.matrix(jnp.asarray(c, jnp.float32)), 3, key=KEY)
    np.testing.assert_allclose(basis.values, [3.0, 2.0, 1.0], atol=1e-3)


def test_tolerated_basis_has_fresh_values():
    c, _ = symmetric(SPECTRA["step"])
    good = top(linalg.matrix(jnp.asarray(c, jnp.float32)), RANK, key=KEY)
    smaller = linalg.matrix(jnp.asarray(0.01 * c, jnp.float32))
    kept, _ = refresh(smaller, good, tolerance=1e-3)
    np.testing.assert_allclose(kept.values, 0.01 * good.values, rtol=1e-3)
    np.testing.assert_allclose(kept.trace, smaller.trace)
