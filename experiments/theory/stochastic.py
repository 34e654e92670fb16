"""Modified equations beside the optimizers that they stand for.

Two of the three parts are on a problem of two parameters, whose moments are known
without sampling (`dsbp_jax.theory.sde.expectations`), so that errors of 1e-6 can be
told from zero: how the weak error falls with η where ρ = c√η, and how it falls with ρ
at a fixed η. The third is a small network on digits, by paths.
"""

import dataclasses
import functools
import math
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats
from matplotlib.axes import Axes
from rich.progress import Progress

import dsbp_jax
from dsbp_jax.theory import sde
from experiments import checks, data
from experiments.study import runs
from experiments.theory import known, record

ORDERS = (1, 2, 3)
NETWORKS = ("sam", "dsbp")


@dataclasses.dataclass(frozen=True)
class SdeConfig:
    """The modified equations."""

    etas: tuple[float, ...] = (0.01, 0.005, 0.0025, 0.00125)
    """Learning rates of the first part."""
    ratio: float = 2.0
    """c of ρ = c√η there."""
    rhos: tuple[float, ...] = (0.3, 0.4, 0.6, 0.8)
    """Radii of the second part."""
    fixed_eta: float = 1e-3
    """Its learning rate."""
    nodes: int = 14
    """Chebyshev nodes for each of the two parameters."""
    paths: int = 32
    """Paths of the network."""
    steps: int = 100
    """Steps of the network."""
    network_eta: float = 0.05
    """Its learning rate."""
    network_rho: float = 0.2
    """Its radius."""
    hidden: int = 16
    """Its hidden units."""
    batches: int = 8
    """Batches that it draws from, of 32 digits each."""
    seed: int = 0
    """Of the network and its paths."""
    networks: tuple[str, ...] = NETWORKS
    """Which of sam, dsbp the network is trained by."""
    cells: pathlib.Path = pathlib.Path("runs/theory-sde")
    """Folder of the parts that are done, from which a stopped command goes on."""

    def __post_init__(self) -> None:
        """Checks every value."""
        for name in ("etas", "rhos"):
            values = getattr(self, name)
            if len(values) < 2:
                raise ValueError(f"sde.{name}={values!r}; accepted are two or more")
            for value in values:
                checks.positive(f"sde.{name}", value)
        for name in ("ratio", "fixed_eta", "network_eta", "network_rho"):
            checks.positive(f"sde.{name}", getattr(self, name))
        for name in ("nodes", "paths", "steps", "hidden", "batches"):
            checks.count(f"sde.{name}", getattr(self, name), 2)
        if self.steps % 10:
            raise ValueError(f"sde.steps={self.steps}; accepted are multiples of 10")
        checks.count("sde.seed", self.seed, 0)
        for name in self.networks:
            checks.one_of("sde.networks", name, NETWORKS)


def run(config: SdeConfig, progress: Progress) -> dict[str, Any]:
    """All three parts.

    Args:
      config: The options.
      progress: A bar to move.

    Returns:
      Rows by part.
    """
    runs.make_folder(config.cells / "part.json")
    parts: dict[str, Callable[[], Any]] = {
        "by_eta": lambda: errors_by_eta(config, progress),
        "by_rho": lambda: errors_by_rho(config, progress),
        **{
            f"network-{name}": functools.partial(network, config, name, progress)
            for name in config.networks
        },
    }
    # Of each part; which parts there are is no matter of theirs.
    settings = record.as_json(config)
    del settings["networks"]
    found, seconds = {}, {}
    for name, compute in parts.items():

        def measured(name: str = name, compute: Any = compute) -> dict[str, Any]:
            start = time.perf_counter()
            # Weak errors are far below what float32 can tell from zero.
            with jax.enable_x64(name.startswith("by_")):
                rows = compute()
            return {"found": rows, "seconds": time.perf_counter() - start}

        file = config.cells / f"{name}.json"
        part = record.kept(file, settings, measured, "sde.cells")
        found[name], seconds[name] = part["found"], part["seconds"]
    networks = {name: found.pop(f"network-{name}") for name in config.networks}
    return found | {"network": networks, "seconds": seconds}


def _slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of logarithms, by least squares."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def errors_by_eta(config: SdeConfig, progress: Progress) -> list[dict[str, Any]]:
    """The weak error at time 1 with ρ = c√η: the largest of five moments."""
    variants = [(3, False), *((order, True) for order in ORDERS)]
    task = progress.add_task(
        "weak error in η", total=len(known.METHODS) * len(config.etas)
    )
    errors: dict[Any, list[float]] = {}
    for name in known.METHODS:
        for eta in config.etas:
            rho = config.ratio * math.sqrt(eta)
            moments = functools.partial(known.moments, name, rho, eta)
            optimizer = moments(None, nodes=config.nodes)
            for order, correction in variants:
                found = moments(order, nodes=config.nodes, correction=correction)
                error = float(np.max(np.abs(found - optimizer)))
                errors.setdefault((name, order, correction), []).append(error)
            progress.advance(task)
    return [
        {
            "method": name,
            "order": order,
            "correction": correction,
            "etas": list(config.etas),
            "errors": values,
            "slope": _slope(config.etas, values),
        }
        for (name, order, correction), values in errors.items()
    ]


def errors_by_rho(config: SdeConfig, progress: Progress) -> list[dict[str, Any]]:
    """The weak error at time 1 and a fixed η, of the equations with the correction."""
    names = [name for name in known.METHODS if name != "sgd"]
    task = progress.add_task("weak error in ρ", total=len(names) * len(config.rhos))
    errors: dict[Any, list[float]] = {}
    for name in names:
        for rho in config.rhos:
            moments = functools.partial(known.moments, name, rho, config.fixed_eta)
            optimizer = moments(None, nodes=config.nodes)
            for order in ORDERS:
                found = moments(order, nodes=config.nodes)
                error = float(np.max(np.abs(found - optimizer)))
                errors.setdefault((name, order), []).append(error)
            progress.advance(task)
    return [
        {
            "method": name,
            "order": order,
            "rhos": list(config.rhos),
            "errors": values,
            "slope": _slope(config.rhos, values),
        }
        for (name, order), values in errors.items()
    ]


def network(config: SdeConfig, name: str, progress: Progress) -> dict[str, Any]:
    """Paths of a small network's loss, of the optimizer and of each order."""
    digits = data.load("digits").train
    count = 32 * config.batches
    images = digits.images[:count].reshape(config.batches, 32, -1) / 255.0
    labels = digits.labels[:count].reshape(config.batches, 32)
    batches = jnp.asarray(images, jnp.float32), jnp.asarray(labels)
    keys = jax.random.split(jax.random.key(config.seed), 3)
    inner = jax.nn.initializers.lecun_normal()
    params = {
        "first": inner(keys[0], (images.shape[-1], config.hidden)),
        "head": inner(keys[1], (config.hidden, 10)),
    }

    def forward(params: Any, x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ params["first"]) @ params["head"]

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        x, y = batch
        logits = forward(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def observe(params: Any) -> jax.Array:
        return jnp.mean(jax.vmap(loss_fn, (None, 0))(params, batches))

    if name == "dsbp":
        capture = dsbp_jax.capture_activations(forward, which=("inputs",))
        _, activations = capture(params, batches[0].reshape(count, -1))
        bases = dsbp_jax.activation_bases(activations, 8)
        method = sde.dsbp(bases, rho=config.network_rho, residual=0.1)
    else:
        method = sde.sam(config.network_rho)

    make = functools.partial(sde.modified_equation, loss_fn, method, config.network_eta)
    options = {
        "key": keys[2],
        "num_paths": config.paths,
        "every": config.steps // 10,
        "observe": observe,
    }
    task = progress.add_task(f"network, {name}", total=1 + len(ORDERS))
    start = time.perf_counter()
    reference = sde.optimizer_paths(
        make(order=0), params, batches, config.steps, **options
    )
    seconds = {"optimizer": time.perf_counter() - start}
    found = {"optimizer": reference}
    progress.advance(task)
    for order in ORDERS:
        start = time.perf_counter()
        label = f"order {order}"
        found[label] = sde.sde_paths(
            make(order=order), params, batches, config.steps, substeps=1, **options
        )
        jax.block_until_ready(found[label].observed)
        seconds[label] = time.perf_counter() - start
        progress.advance(task)
    result: dict[str, Any] = {"steps": reference.steps.tolist(), "seconds": seconds}
    for label, paths in found.items():
        values = np.asarray(paths.observed, np.float64)
        result[label] = {
            "mean": values.mean(0).tolist(),
            "half_width": _half_width(values).tolist(),
            "at_the_end": values[:, -1].tolist(),
        }
        if paths.validity is not None:
            result[label] |= {k: float(v) for k, v in paths.validity._asdict().items()}
            last = np.asarray(reference.observed, np.float64)[:, -1]
            apart = scipy.stats.ttest_ind(values[:, -1], last, equal_var=False)
            low, high = apart.confidence_interval(0.95)
            result[label]["difference"] = [
                float(values[:, -1].mean() - last.mean()),
                float(low),
                float(high),
            ]
    return result


def _half_width(values: np.ndarray) -> np.ndarray:
    """Of the 95 % interval of the mean over paths, at each time."""
    count = len(values)
    error = values.std(0, ddof=1) / math.sqrt(count)
    return scipy.stats.t.ppf(0.975, count - 1) * error


def tables(result: dict[str, Any]) -> dict[str, list[dict[str, str]]]:
    """The result as text."""
    numbers = lambda values: ", ".join(f"{value:.2g}" for value in values)
    by_eta = [
        {
            "method": row["method"],
            "order in ρ": str(row["order"]),
            "with the term in η": "yes" if row["correction"] else "no",
            "weak errors": numbers(row["errors"]),
            "slope": f"{row['slope']:.2f}",
        }
        for row in result["by_eta"]
    ]
    by_rho = [
        {
            "method": row["method"],
            "order in ρ": str(row["order"]),
            "weak errors": numbers(row["errors"]),
            "slope": f"{row['slope']:.2f}",
        }
        for row in result["by_rho"]
    ]
    networks = [
        {
            "method": name,
            "equation": label,
            "loss at the end": f"{of['mean'][-1]:.4f} ± {of['half_width'][-1]:.4f}",
            "minus the optimizer's": (
                "{:+.4f} ({:+.4f} to {:+.4f})".format(*of["difference"])
                if "difference" in of
                else ""
            ),
            "η‖J‖, remainder": (
                f"{of['stiffness']:.2f}, {of['remainder']:.3f}"
                if "stiffness" in of
                else ""
            ),
        }
        for name, network in result["network"].items()
        for label, of in network.items()
        if isinstance(of, dict) and "mean" in of
    ]
    found = {
        "Weak error in η, ρ = c√η": by_eta,
        "Weak error in ρ at a fixed η": by_rho,
        "A network, 95 % intervals over paths": networks,
    }
    return {title: rows for title, rows in found.items() if rows}


def panels(result: dict[str, Any]) -> list[Callable[[Axes], None]]:
    """The result as plots."""

    def errors(rows: list[dict[str, Any]], key: str, label: str, name: str):
        def draw(axis: Axes) -> None:
            for row in rows:
                if row["method"] == name and row.get("correction", True):
                    text = f"order {row['order']} (slope {row['slope']:.2f})"
                    axis.loglog(row[key], row["errors"], marker=".", label=text)
            axis.set(title=name, xlabel=label, ylabel="weak error")
            axis.legend(fontsize=8)

        return draw

    def paths(name: str, network: dict[str, Any]):
        def draw(axis: Axes) -> None:
            for label, of in network.items():
                if isinstance(of, dict) and "mean" in of:
                    mean, width = np.array(of["mean"]), np.array(of["half_width"])
                    (line,) = axis.plot(network["steps"], mean, label=label)
                    axis.fill_between(
                        network["steps"],
                        mean - width,
                        mean + width,
                        color=line.get_color(),
                        alpha=0.2,
                        lw=0,
                    )
            axis.set(title=f"network, {name}", xlabel="step", ylabel="loss")
            axis.legend(fontsize=8)

        return draw

    names = lambda part: dict.fromkeys(row["method"] for row in result[part])
    return [
        *(
            errors(result["by_eta"], "etas", "η, with ρ = c√η", name)
            for name in names("by_eta")
        ),
        *(errors(result["by_rho"], "rhos", "ρ", name) for name in names("by_rho")),
        *(paths(name, network) for name, network in result["network"].items()),
    ]
