"""PAC-Bayes certificates of networks with one hidden layer, at 99 % confidence.

One table is of posteriors: their form (isotropic, diagonal, in the eigenspaces of each
layer) by their prior (the initialisation, or a network trained on the other half of the
examples), mean and scales trained by the bound. The other is of optima: the same
posterior around networks from several optimizers, its scales trained and its mean left
where the optimizer ended. Each cell is one file in a folder, so that a stopped command
goes on where it was. The test set is read for its error alone.
"""

import dataclasses
import functools
import itertools
import math
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from matplotlib.axes import Axes
from rich.progress import Progress

from dsbp_jax.theory import pac_bayes
from experiments import checks, data
from experiments.study import runs, statistics
from experiments.theory import record, training

PRIORS = ("initial", "learned")
FAMILIES = ("isotropic", "diagonal", "eigenbasis")
_SIZES = ("hidden", "epochs", "posterior_epochs", "passes")


@dataclasses.dataclass(frozen=True)
class PacBayesConfig:
    """The PAC-Bayes bound."""

    dataset: str = "fashion_mnist"
    """Of 28 by 28 images, or of any other shape, one channel."""
    data_dir: pathlib.Path | None = None
    """Folder of the data sets."""
    seeds: int = 3
    """Cells of each row."""
    hidden: int = 100
    """Hidden units."""
    epochs: int = 3
    """Of the network."""
    posterior_epochs: int = 4
    """Of its posterior."""
    scale_rate: float = 0.02
    """Adam's rate for the scales of the posterior."""
    passes: int = 1
    """Over the examples, for the certificate."""
    priors: tuple[str, ...] = PRIORS
    """Which of initial, learned."""
    families: tuple[str, ...] = FAMILIES
    """Which of isotropic, diagonal, eigenbasis."""
    optimizers: tuple[str, ...] = tuple(training.OPTIMIZERS)
    """Which of momentum, spectral_decay, sam, dsbp_sam to find optima by."""
    cells: pathlib.Path = pathlib.Path("runs/theory-pac-bayes")
    """Folder of the cells."""

    def __post_init__(self) -> None:
        """Checks every value."""
        for name in ("seeds", *_SIZES):
            checks.count(f"pac_bayes.{name}", getattr(self, name))
        checks.positive("pac_bayes.scale_rate", self.scale_rate)
        known = {
            "priors": PRIORS,
            "families": FAMILIES,
            "optimizers": training.OPTIMIZERS,
        }
        for name, accepted in known.items():
            for value in getattr(self, name):
                checks.one_of(f"pac_bayes.{name}", value, accepted)


def run(config: PacBayesConfig, progress: Progress) -> dict[str, Any]:
    """All cells.

    Args:
      config: The options.
      progress: A bar to move.

    Returns:
      The cells.

    Raises:
      ValueError: The data cannot be loaded, or the folder holds cells of others.
    """
    found = data.load(config.dataset, data_dir=config.data_dir)
    examples = _flat(found.train, found.validation)
    test = _flat(found.test)
    runs.make_folder(config.cells / "cell.json")
    rows = [
        *itertools.product(
            range(config.seeds), config.priors, config.families, ["momentum"]
        ),
        *itertools.product(
            range(config.seeds), ["fixed"], ["eigenbasis"], config.optimizers
        ),
    ]
    task = progress.add_task("certificates", total=len(rows))
    networks: dict[Any, Any] = {}
    cells = []
    settings = {
        name: getattr(config, name) for name in (*_SIZES, "dataset", "scale_rate")
    }
    for row in rows:
        seed, prior, family, optimizer = row
        compute = functools.partial(certify, config, *row, examples, test, networks)
        file = config.cells / f"{prior}-{family}-{optimizer}-{seed}.json"
        cells.append(record.kept(file, settings, compute, "pac_bayes.cells"))
        progress.advance(task)
    return {
        "examples": len(examples[1]),
        "test_examples": len(test[1]),
        "chance_of_the_test_set": 1.96 * math.sqrt(0.12 * 0.88 / len(test[1])),
        "cells": cells,
        "seconds": sum(cell["seconds"] for cell in cells),
    }


def _flat(*splits: data.Split) -> tuple[np.ndarray, np.ndarray]:
    """Images in [0, 1], as rows, and labels: scaled by no statistics of theirs."""
    images = np.concatenate([split.images for split in splits])
    labels = np.concatenate([split.labels for split in splits])
    return (images.reshape(len(images), -1) / np.float32(255)), labels


def certify(
    config: PacBayesConfig,
    seed: int,
    prior_name: str,
    family_name: str,
    optimizer: str,
    examples: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    networks: dict[Any, Any],
) -> dict[str, Any]:
    """One cell.

    Args:
      config: The options.
      seed: Its seed.
      prior_name: One of `PRIORS`, or `"fixed"` for the first of them with the mean
        left alone.
      family_name: One of `FAMILIES`.
      optimizer: One of `training.OPTIMIZERS`.
      examples: Images and labels.
      test: Likewise.
      networks: Trained params by seed, optimizer and part of the data; added to.

    Returns:
      The cell.
    """
    began = time.perf_counter()
    x, y = examples
    start = training.init(seed, config.hidden, x.shape[1], int(y.max()) + 1)
    order = np.random.default_rng(seed).permutation(len(x))
    half = len(x) // 2
    learned = prior_name == "learned"
    seen, held_out = (order[:half], order[half:]) if learned else (order, order)

    def network() -> Any:
        key = seed, optimizer, learned
        if key not in networks:
            networks[key] = training.train(
                optimizer, start, x[seen], y[seen], config.epochs, seed
            )
        return networks[key]

    params = network()
    if learned:
        prior = pac_bayes.learned_prior(params, 0.02, seen)
    else:
        prior = pac_bayes.initial_prior(start, 0.05)
    if family_name == "eigenbasis":
        family = pac_bayes.eigenbasis(training.bases(params, x[seen[:5000]]))
    else:
        family = getattr(pac_bayes, family_name)()
    posterior = family.init(params, 0.02)
    posterior, prior = training.train_posterior(
        family,
        posterior,
        prior,
        x[held_out],
        y[held_out],
        num_examples=len(held_out),
        epochs=config.posterior_epochs * len(x) // len(held_out),
        seed=seed,
        scale_rate=config.scale_rate,
        moves_mean=prior_name != "fixed",
    )
    keys = jax.random.split(jax.random.key(1000 + seed))
    certificate = pac_bayes.certify(
        training.errors,
        family,
        posterior,
        prior,
        (x[held_out], y[held_out]),
        indices=held_out,
        key=keys[0],
        passes=config.passes,
        together=500,
    )
    gibbs, _ = pac_bayes.gibbs_risk(
        training.errors, family, posterior, test, key=keys[1], together=500
    )
    at_mean = float(np.mean(training.errors(posterior.mean, test)))
    return {
        "seed": seed,
        "prior": prior_name,
        "family": family_name,
        "optimizer": optimizer,
        **certificate._asdict(),
        "test_error_of_the_posterior": gibbs,
        "test_error_of_its_mean": at_mean,
        "test_error_of_the_network": float(np.mean(training.errors(params, test))),
        "top_hessian_eigenvalue": (
            training.sharpness(params, x[order[:2000]], y[order[:2000]])
            if prior_name == "fixed"
            else None
        ),
        "log_scales": {
            path: [float(np.min(v)), float(np.mean(v)), float(np.max(v))]
            for path, v in posterior.log_scales.items()
        },
        "prior_log_scales": {k: float(v) for k, v in prior.log_scales.items()},
        "seconds": time.perf_counter() - began,
    }


def _rows(result: dict[str, Any]) -> dict[tuple[str, str, str], list[dict[str, Any]]]:
    """Cells by prior, family and optimizer."""
    rows: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for cell in result["cells"]:
        key = cell["prior"], cell["family"], cell["optimizer"]
        rows.setdefault(key, []).append(cell)
    return rows


def _text(values: Sequence[float], sign: str = "", digits: int = 4) -> str:
    found = statistics.interval(values)
    text = f"{found.mean:{sign}.{digits}f}"
    return text + (f" ± {found.half:.{digits}f}" if found.half else "")


def tables(result: dict[str, Any]) -> dict[str, list[dict[str, str]]]:
    """The result as text; ± is half of a 95 % interval over seeds."""
    rows = _rows(result)
    values = lambda cells, name: [cell[name] for cell in cells]
    forms, optima = [], []
    for (prior, family, optimizer), cells in rows.items():
        bounds = values(cells, "bound")
        common = {
            "bound": _text(bounds),
            "test error of the posterior": _text(
                values(cells, "test_error_of_the_posterior")
            ),
            "test error of the network": _text(
                values(cells, "test_error_of_the_network")
            ),
            "KL, nats": _text(values(cells, "divergence"), digits=0),
        }
        if prior != "fixed":
            note = ""
            plain = rows.get((prior, "isotropic", optimizer))
            if plain and family != "isotropic":
                theirs = values(plain, "bound")
                p_value = statistics.p_value(bounds, theirs)
                note = _text(np.subtract(bounds, theirs), "+")
                note += "" if p_value is None else f" (p {p_value:.2g})"
            forms.append(
                {"prior": prior, "posterior": family}
                | common
                | {"against isotropic": note}
            )
        else:
            curvature = values(cells, "top_hessian_eigenvalue")
            optima.append(
                {"optimizer": optimizer}
                | common
                | {"top Hessian eigenvalue": _text(curvature, digits=2)}
            )
    found = {
        "Posteriors: bound on the error at 99 % confidence": forms,
        "Optima: scales trained, mean left": optima,
    }
    return {title: rows for title, rows in found.items() if rows}


def panels(result: dict[str, Any]) -> list[Callable[[Axes], None]]:
    """The result as plots: bounds with test errors, and one against the other."""
    rows = _rows(result)

    def forms(axis: Axes) -> None:
        shown = [key for key in rows if key[0] != "fixed"]
        for i, key in enumerate(shown):
            for name, color in (("bound", "C0"), ("test_error_of_the_posterior", "C1")):
                heights = [cell[name] for cell in rows[key]]
                label = name.replace("_", " ") if i == 0 else None
                axis.plot([i] * len(heights), heights, "o", color=color, label=label)
        axis.set_xticks(range(len(shown)), [f"{k[0]}\n{k[1]}" for k in shown])
        axis.set(ylabel="error", ylim=(0, None))
        axis.tick_params(axis="x", labelsize=7)
        axis.legend()

    def optima(axis: Axes) -> None:
        for prior, family, optimizer in rows:
            if prior == "fixed":
                cells = rows[prior, family, optimizer]
                axis.plot(
                    [cell["bound"] for cell in cells],
                    [cell["test_error_of_the_network"] for cell in cells],
                    "o",
                    label=optimizer,
                )
        axis.set(xlabel="bound", ylabel="test error of the network")
        axis.legend(fontsize=8)

    kinds = {"forms": forms, "optima": optima}
    shown = {"optima" if prior == "fixed" else "forms" for prior, _, _ in rows}
    return [draw for kind, draw in kinds.items() if kind in shown]
