"""The eigen engine: what one warm refresh recovers, and what it costs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dsbp_jax import linalg
from experiments.bench.timing import Stateful, interleave

DIM, SAMPLES, RANK = 2048, 1024, 32


def drifted_rows(
    spectrum: np.ndarray, angle: float, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Samples before and after the leading directions have turned.

    Args:
      spectrum: Population eigenvalues, shape `(DIM,)`.
      angle: Each leading direction turns by this angle, in degrees, towards a
        direction that carried only tail energy before.
      seed: Of directions and samples.

    Returns:
      Two arrays of rows of shape `(SAMPLES, DIM)`, float32.
    """
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.standard_normal((DIM, DIM)))
    turned = q.copy()
    old, new = q[:, :RANK], q[:, -RANK:]
    cos, sin = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    turned[:, :RANK], turned[:, -RANK:] = cos * old + sin * new, cos * new - sin * old
    draw = lambda: rng.standard_normal((SAMPLES, DIM)) * np.sqrt(spectrum)
    return (
        (draw() @ q.T).astype(np.float32),
        (draw() @ turned.T).astype(np.float32),
    )


SPECTRA = {
    "1/i": 1 / np.arange(1, DIM + 1),
    "0.9^i + tail": 0.9 ** np.arange(DIM) + 1e-3,
    "step": np.where(np.arange(DIM) < RANK, 1.0, 1e-2),
}


def recovery() -> list[dict[str, Any]]:
    """What a stale basis lost and one warm refresh brings back, per spectrum."""
    top = jax.jit(linalg.top_eigenpairs, static_argnums=1)
    refresh = jax.jit(linalg.refresh_basis)
    rows = []
    for name, spectrum in SPECTRA.items():
        before, after = map(linalg.gram, map(jnp.asarray, drifted_rows(spectrum, 40)))
        key = jax.random.key(0)
        stale, best = top(before, RANK, key=key), top(after, RANK, key=key)
        energy = lambda basis, op=after: float(
            jnp.vdot(basis.vectors, op.matmat(basis.vectors))
        )
        attainable, kept = energy(best), energy(stale)
        fresh = refresh(after, stale)
        rows.append(
            {
                "spectrum": name,
                "stale energy": kept / attainable,
                "recovered": (energy(fresh) - kept) / (attainable - kept),
            }
        )
    return rows


def galore_step(rank: int) -> Callable[[], Any]:
    """An update of optax's GaLore that refreshes its projector, on a 2048² kernel."""
    tx = optax.contrib.galore(1e-3, rank=rank, update_proj_gap=1)
    kernel = jax.random.normal(jax.random.key(1), (DIM, DIM))
    step = lambda state, grad, params: tx.update(grad, state, params)[1]
    params = {"kernel": kernel}
    return Stateful(step, tx.init(params), params, params)


def costs(rounds: int = 15) -> list[dict[str, Any]]:
    """Milliseconds of a refresh and of what it replaces."""
    x = jnp.asarray(drifted_rows(SPECTRA["1/i"], 40)[1])
    covariance = x.T @ x / SAMPLES
    gradient = jax.random.normal(jax.random.key(1), (DIM, DIM))
    refresh = jax.jit(lambda x, basis: linalg.refresh_basis(linalg.gram(x), basis))
    cold = jax.jit(
        lambda x: linalg.top_eigenpairs(linalg.gram(x), RANK, key=jax.random.key(0))
    )
    eigh, svd = jax.jit(jnp.linalg.eigh), jax.jit(jnp.linalg.svd, static_argnums=1)
    start = {k: linalg.init_basis(DIM, k, key=jax.random.key(0)) for k in (RANK, 64)}
    fast = interleave(
        {
            f"warm refresh, rank {RANK}, 1024 samples": lambda: refresh(x, start[RANK]),
            "warm refresh, rank 64, 2048² gradient": lambda: refresh(
                gradient, start[64]
            ),
            "one 1024×2048×2048 product": lambda: x @ gradient,
        },
        rounds,
    )
    galore = galore_step(64)
    slow = interleave(
        {
            f"warm refresh, rank {RANK}, 1024 samples (again)": lambda: refresh(
                x, start[RANK]
            ),
            f"cold solve to convergence, rank {RANK}": lambda: cold(x),
            "jnp.linalg.eigh, 2048²": lambda: eigh(covariance),
            "jnp.linalg.svd, 2048²": lambda: svd(gradient, False),
            "optax galore's refreshing update, rank 64": galore,
        },
        max(3, rounds // 5),
    )
    medians = {name: np.median(t) for name, t in {**fast, **slow}.items()}
    reference = medians[f"warm refresh, rank {RANK}, 1024 samples"]
    return [
        {"what": name, "ms": seconds * 1e3, "times the refresh": seconds / reference}
        for name, seconds in medians.items()
    ]


def run() -> dict[str, list[dict[str, Any]]]:
    """The benchmark's tables, by title."""
    return {
        f"One warm refresh after a drift ({DIM}-dim, {SAMPLES} samples, rank {RANK})": (
            recovery()
        ),
        "Cost (median)": costs(),
    }
