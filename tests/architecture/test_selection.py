import itertools

import numpy as np
import pytest

from dsbp_jax.architecture import selection
from dsbp_jax.architecture.moments import MAX_DENSE, Factor, Moments
from dsbp_jax.architecture.widths import Curve, share_out


def data(rows=300, rank=5, width=8, seed=0):
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(rank, width)) * np.geomspace(3, 0.3, rank)[:, None]
    return rng.normal(size=(rows, rank)) @ mixing + 0.1 * rng.normal(size=(rows, width))


def lost(h, kernel, kept):
    """By least squares on the data themselves."""
    h = h - h.mean(0)
    rest = h - h[:, kept] @ np.linalg.lstsq(h[:, kept], h, rcond=None)[0]
    return np.sum((rest @ kernel) ** 2) / np.sum((h @ kernel) ** 2)


def factor_of(h):
    h = h - h.mean(0)
    return Factor((h.T @ h / len(h))[None], None)


def test_errors_are_those_of_least_squares():
    h, kernel = data(), np.random.default_rng(1).normal(size=(8, 3))
    order, total = selection.order([factor_of(h)], [kernel], 0, exact=True)
    assert total == pytest.approx(np.sum(((h - h.mean(0)) @ kernel) ** 2) / len(h))
    for width in range(1, 8):
        wanted = lost(h, kernel, order.neurons[:width])
        assert order.errors[width] == pytest.approx(wanted, abs=1e-12)


def test_the_first_neuron_is_the_best_and_greed_costs_little():
    h, kernel = data(), np.random.default_rng(1).normal(size=(8, 3))
    order, _ = selection.order([factor_of(h)], [kernel], 0, exact=True)
    for width, slack in ((1, 1 + 1e-9), (3, 2.0)):
        best = min(
            lost(h, kernel, list(kept))
            for kept in itertools.combinations(range(8), width)
        )
        assert order.errors[width] <= slack * best


def test_the_next_layer_decides():
    """A loud neuron that is not listened to goes first."""
    h = np.random.default_rng(0).normal(size=(200, 4)) * [9, 1, 1, 1]
    kernel = np.array([[0.0], [1.0], [2.0], [3.0]])
    order, _ = selection.order([factor_of(h)], [kernel], 0, exact=True)
    assert order.neurons[0] == 3
    assert order.neurons[-1] == 0


def test_rows_stand_for_a_covariance():
    h = data()
    dense = factor_of(h)
    rows = (h - h.mean(0)) / np.sqrt(len(h))
    thin = Factor(None, rows[None])
    kept = np.array([1, 4, 6])
    for left, right in (
        (dense.diagonal(0), thin.diagonal(0)),
        (dense.column(0, 2), thin.column(0, 2)),
        (dense.eigenvalues(0), thin.eigenvalues(0)),
        (dense.repair(0, kept), thin.repair(0, kept)),
        (dense.times(0, h[:8].T), thin.times(0, h[:8].T)),
    ):
        np.testing.assert_allclose(left, right, rtol=1e-7, atol=1e-12)
    bases = [factor.eigen(0)[0][:, :3] for factor in (dense, thin)]
    projectors = [basis @ basis.T for basis in bases]
    np.testing.assert_allclose(*projectors, atol=1e-9)


def test_repair_survives_copies_and_the_dead():
    h = data(width=6)
    h[:, 3] = h[:, 0]
    h[:, 5] = 0
    found = factor_of(h).repair(0, np.array([0, 3, 5]))
    assert np.isfinite(found).all()
    assert np.abs(found).max() < 1e3


def test_moments_of_a_stream_are_those_of_all_its_rows():
    h = data(rows=90).astype(np.float32)
    moments = Moments(1, 8)
    for piece in np.split(h, 3):
        moments.add(piece[None])
    wide = h.astype(np.float64)
    np.testing.assert_allclose(moments.mean[0], wide.mean(0))
    covariance = np.cov(wide.T, bias=True)
    np.testing.assert_allclose(
        moments.factor(True).column(0, 2), covariance[2], rtol=1e-9
    )
    assert moments.count == 90


def test_nothing_wider_than_the_limit_is_squared():
    rows = np.random.default_rng(0).normal(size=(1, 40, MAX_DENSE + 8))
    moments = Moments(1, MAX_DENSE + 8)
    moments.add(rows)
    factor = moments.factor(True)
    assert factor.diagonal(0).shape == (MAX_DENSE + 8,)
    centred = rows[0] - rows[0].mean(0)
    np.testing.assert_allclose(factor.column(0, 3), centred.T @ centred[:, 3] / 40)


def test_a_rotation_keeps_what_is_answered_to():
    """Beside the best answers of that rank: the leading part of all answers."""
    h, kernel = data(), np.random.default_rng(1).normal(size=(8, 6))
    kernel[:, 3:] = kernel[:, :3] @ np.ones((3, 3))  # four answers of their own at most
    order, total, vectors = selection.rotated(factor_of(h), [kernel], 0)
    h = (h - h.mean(0)) / np.sqrt(len(h))
    values = np.linalg.svd(h @ kernel, compute_uv=False) ** 2
    assert total == pytest.approx(values.sum())
    assert vectors.shape == (8, 3)
    for width in range(4):
        assert order.errors[width] == pytest.approx(
            values[width:].sum() / values.sum(), abs=1e-12
        )
        thin = h @ vectors[:, :width]
        rest = h - thin @ np.linalg.lstsq(thin, h, rcond=None)[0]
        assert np.sum((rest @ kernel) ** 2) == pytest.approx(
            values[width:].sum(), abs=1e-12
        )


def test_sketched_answers_keep_the_gram_matrix_in_the_mean():
    kernel = np.random.default_rng(0).normal(size=(3, 500))
    grams = [
        (found := selection.answers(kernel, seed)) @ found.T for seed in range(400)
    ]
    assert selection.answers(kernel, 0).shape == (3, 64)
    np.testing.assert_allclose(np.mean(grams, 0), kernel @ kernel.T, rtol=0.05, atol=12)


def test_energy_says_a_width():
    errors = np.array([1.0, 0.4, 0.1, 0.0])
    widths = [selection.width_of_energy(errors, e, True) for e in (0.5, 0.9, 0.95, 1.0)]
    assert widths == [1, 2, 3, 3]
    values = np.array([6.0, 3.0, 1.0, 0.0])
    widths = [selection.spectral_width(values, e) for e in (0.6, 0.61, 0.95, 1.0)]
    assert widths == [1, 2, 3, 3]


def test_the_budget_is_shared_out_as_well_as_by_trying_all():
    rng = np.random.default_rng(0)
    drops = [np.sort(rng.exponential(size=8))[::-1] for _ in range(2)]
    errors = [np.concatenate([[0], np.cumsum(d)]) for d in drops]
    curves = [Curve(1 - e / e[-1], 8, 1) for e in errors]
    cost = lambda widths: (5 * widths[0] + widths[0] * widths[1] + 3 * widths[1]) / 128
    for target in (0.3, 0.5, 0.8):
        found = share_out(curves, cost, target)
        total = lambda w: sum(c.error(x) for c, x in zip(curves, w, strict=True))
        pairs = itertools.product(range(1, 9), repeat=2)
        best = min(total(pair) for pair in pairs if cost(pair) <= target)
        assert cost(found) <= target
        assert total(found) <= best + 0.06


def test_blocks_are_taken_out_of_a_wide_covariance():
    """More neurons than a block, against the factorisation of rows, which has none."""
    rng = np.random.default_rng(3)
    h = rng.normal(size=(400, 60)) @ rng.normal(size=(60, 300))
    h += 0.3 * rng.normal(size=h.shape)
    kernel = rng.normal(size=(300, 5))
    rows = (h - h.mean(0)) / np.sqrt(len(h))
    dense, _ = selection.order([factor_of(h)], [kernel], 0, exact=True)
    thin, _ = selection.order([Factor(None, rows[None])], [kernel], 0, exact=True)
    np.testing.assert_array_equal(dense.neurons, thin.neurons)
    np.testing.assert_allclose(dense.errors, thin.errors, atol=1e-12)
    kept = dense.neurons[:200]
    wanted = lost(h, kernel, kept)
    assert dense.errors[200] == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("noise", [0.3, 0.0])
def test_repairs_are_least_squares_where_kept_neurons_repeat_and_where_not(noise):
    """Without noise two of those kept are one: no elimination would do."""
    rng = np.random.default_rng(4)
    h = rng.normal(size=(500, 6))
    h[:, 1] = h[:, 0] + noise * rng.normal(size=500)
    kept = np.array([0, 1, 4])
    found = factor_of(h).repair(0, kept)
    h = h - h.mean(0)
    wanted = h[:, kept] @ np.linalg.lstsq(h[:, kept], h, rcond=None)[0]
    np.testing.assert_allclose(h[:, kept] @ found, wanted, atol=1e-8)
    assert np.max(np.abs(found)) < 10
