"""Ways to tune a trained model: what is trained, and what it is held back by.

Each starts from a source model with a new head. What is trained and what is held fixed
are trees of arrays; penalties are added to the loss, before Adam, for all alike.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

import dsbp_jax
from dsbp_jax.linalg import EigenBasis
from dsbp_jax.tracking import Eigenspace

HEAD = "head"  # of every model of `experiments.models`
_FISHER = 512  # source images that ewc takes gradients of, at the most
_CHUNK = 8  # of them whose gradients are there at once


Apply = Callable[..., jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Origin:
    """What tuning begins with: arrays.

    Attributes:
      params: The source's body, with a new head.
      trained: All parameters of the source, with its head.
      rest: The rest of its state.
      seen: Normalised source images.
      target: Normalised target images, those that have labels.
      key: Of what is random.
    """

    params: Any
    trained: Any
    rest: Any
    seen: jax.Array
    target: jax.Array
    key: jax.Array


class Method:
    """Full fine-tuning; others change a part of it.

    Args:
      config: A `TransferConfig` or `SequenceConfig`, but for its seed and rate.
      apply: `apply(params, rest, x)`, logits of the target's head.
      source: `source(params, rest, x)`, those of the source's.
    """

    def __init__(self, config: Any, apply: Apply, source: Apply):
        self.config = config
        self.apply = apply
        self.source = source
        self.start = jax.jit(self.begin)

    def begin(self, origin: Origin) -> tuple[Any, Any]:
        """What is trained, and what is held fixed."""
        return origin.params, {}

    def logits(self, trained: Any, held: Any, *args: Any) -> jax.Array:
        """What the target's model answers."""
        return self.apply(self.params(trained, held), *args)

    def params(self, trained: Any, held: Any) -> Any:
        """Ordinary parameters."""
        return trained

    def penalty(self, trained: Any, held: Any) -> jax.Array:
        """What is added to the loss."""
        return jnp.float32(0)

    def restrict(self, updates: Any, held: Any) -> Any:
        """What an update may do."""
        return updates

    def replayed(self) -> bool:
        """Whether the source's loss is added."""
        return False

    def joined(self, before: Any, held: Any) -> Any:
        """What is held fixed of several sources in turn; not compiled.

        Args:
          before: Of those before the last; `blank` where none was.
          held: Of the last.

        Returns:
          Of all, shaped as `before`.
        """
        return held


class Probe(Method):
    """Only the head."""

    def begin(self, origin: Origin) -> tuple[Any, Any]:
        """See `Method`."""
        return {HEAD: origin.params[HEAD]}, {"params": origin.params}

    def params(self, trained: Any, held: Any) -> Any:
        """See `Method`."""
        return {**held["params"], **trained}


class L2SP(Method):
    """`½α‖W − W₀‖²` over all of the body [P: Li, Grandvalet and Davoine 2018]."""

    def begin(self, origin: Origin) -> tuple[Any, Any]:
        """See `Method`."""
        weights = jax.tree.map(jnp.ones_like, _body(origin.params))
        return origin.params, {"source": _body(origin.params), "weights": weights}

    def penalty(self, trained: Any, held: Any) -> jax.Array:
        """See `Method`."""
        parts = jax.tree.map(
            lambda weight, w, start: jnp.sum(weight * (w - start) ** 2),
            held["weights"],
            _body(trained),
            held["source"],
        )
        return self.config.strength / 2 * optax.tree.sum(parts)


class EWC(L2SP):
    """`½αΣFᵢ(Wᵢ − W₀ᵢ)²`, F the Fisher's diagonal [P: Kirkpatrick et al. 2017].

    F is the mean of squared gradients on source images, labels drawn from the model.
    """

    def begin(self, origin: Origin) -> tuple[Any, Any]:
        """See `Method`."""
        params, held = super().begin(origin)

        def squared(image, key):
            def loss(params):
                logits = self.source(params, origin.rest, image[None])[0]
                drawn = jax.random.categorical(key, jax.lax.stop_gradient(logits))
                return -jax.nn.log_softmax(logits)[drawn]

            return jax.tree.map(jnp.square, _body(jax.grad(loss)(origin.trained)))

        def chunk(total, part):
            found = jax.vmap(squared)(*part)
            return jax.tree.map(lambda a, b: a + b.sum(axis=0), total, found), None

        images = origin.seen[:_FISHER]
        whole = len(images) // _CHUNK * _CHUNK
        keys = jax.random.split(origin.key, whole).reshape(-1, _CHUNK)
        parts = images[:whole].reshape(-1, _CHUNK, *images.shape[1:])
        zero = jax.tree.map(jnp.zeros_like, _body(params))
        total, _ = jax.lax.scan(chunk, zero, (parts, keys))
        weights = jax.tree.map(lambda leaf: leaf / whole, total)
        return params, {**held, "weights": weights}

    def joined(self, before: Any, held: Any) -> Any:
        """See `Method`: the sum of all Fishers, about the last parameters."""
        weights = jax.tree.map(jnp.add, before["weights"], held["weights"])
        return {**held, "weights": weights}


class Replay(Method):
    """The loss of some source images beside it, under the source's head."""

    def replayed(self) -> bool:
        """See `Method`."""
        return True


class Spectral(Method):
    """What needs the source's eigenspaces."""

    def begin(self, origin: Origin) -> tuple[Any, Any]:
        """See `Method`."""
        source = _body(origin.params)
        return origin.params, {"source": source, "bases": self.bases(origin)}

    def bases(self, origin: Origin) -> Any:
        """Those of the body's inputs."""
        capture = dsbp_jax.capture_activations(self.source, which=("inputs",))
        _, seen = capture(origin.trained, origin.rest, origin.seen)
        seen = {path: own for path, own in seen.items() if not _in_head(path)}
        return dsbp_jax.activation_bases(seen, self.config.source_rank)

    def joined(self, before: Any, held: Any) -> Any:
        """See `Method`: spaces of the sums of all covariances."""
        grown = {
            path: _joined(before["bases"][path], space)
            for path, space in held["bases"].items()
        }
        return {**held, "bases": grown}


class SpectralTransfer(Spectral):
    """The spectral penalty."""

    def penalty(self, trained: Any, held: Any) -> jax.Array:
        """See `Method`."""
        return dsbp_jax.spectral_transfer_penalty(
            self.config.strength, held["source"], held["bases"]
        )(trained)


class ProjectAway(Spectral):
    """Updates outside of the source's eigenspaces [P: Saha, Garg and Roy 2021]."""

    def restrict(self, updates: Any, held: Any) -> Any:
        """See `Method`."""
        tx = dsbp_jax.project_away(held["bases"], energy=self.config.energy)
        return tx.update(updates, tx.init(updates))[0]


class Lora(Spectral):
    """Low-rank adapters on the body, and a new head."""

    @property
    def options(self) -> Mapping[str, Any]:
        """Of `dsbp_jax.spectral_lora`."""
        return {"start": "random"}

    def begin(self, origin: Origin) -> tuple[Any, Any]:
        """See `Method`."""
        null = self.options["start"] == "null"
        return dsbp_jax.spectral_lora(
            self.apply,
            self.config.rank,
            **self.options,
            source_bases=self.bases(origin) if null else None,
            whole=(f"{HEAD}/bias", f"{HEAD}/kernel"),
        ).init(origin.params, origin.rest, origin.target, key=origin.key)

    def logits(self, trained: Any, held: Any, *args: Any) -> jax.Array:
        """See `Method`."""
        return dsbp_jax.spectral_lora(self.apply).apply(trained, held, *args)

    def params(self, trained: Any, held: Any) -> Any:
        """See `Method`."""
        return dsbp_jax.spectral_lora(self.apply).merge(trained, held)


class SpectralLora(Lora):
    """The same, from an eigenspace."""

    @property
    def options(self) -> Mapping[str, Any]:
        """Of `dsbp_jax.spectral_lora`."""
        return {"start": self.config.start, "train": self.config.train}


KINDS: dict[str, type[Method]] = {
    "full": Method,
    "probe": Probe,
    "l2sp": L2SP,
    "ewc": EWC,
    "replay": Replay,
    "lora": Lora,
    "spectral_lora": SpectralLora,
    "spectral_transfer": SpectralTransfer,
    "project_away": ProjectAway,
}


def blank(held: Any, sources: int) -> Any:
    """What is held fixed of no source yet, with room for so many; for `joined`.

    Args:
      held: Of one source.
      sources: How many there will be.

    Returns:
      Zeros; eigenspaces have columns for all sources.
    """
    zeros = jax.tree.map(jnp.zeros_like, held)
    if "bases" not in held:
        return zeros
    room = {
        path: _padded(space, min(space.vectors.shape[-2], sources * space.rank))
        for path, space in zeros["bases"].items()
    }
    return {**zeros, "bases": room}


def _joined(before: Eigenspace, space: Eigenspace) -> Eigenspace:
    """The eigenspace of the sum of two covariances, in the first one's columns."""
    columns, found = before.rank, space
    used = int((before.values.reshape(-1, columns) > 0).any(axis=0).sum())
    if used:
        both = {"": before.leading(used)}, {"": space}
        (found,) = dsbp_jax.transfer.merge_bases(*both).values()
    return _padded(found.leading(columns), columns)


def _padded(space: Eigenspace, columns: int) -> Eigenspace:
    """The space with so many columns, of which the last ones are zero."""
    widen = lambda leaf: jnp.pad(
        leaf, [(0, 0)] * (leaf.ndim - 1) + [(0, columns - space.rank)]
    )
    basis = EigenBasis(widen(space.vectors), widen(space.values), space.trace)
    return dataclasses.replace(space, basis=basis)


def _body(params: Any) -> Any:
    return {name: part for name, part in params.items() if name != HEAD}


def _in_head(path: str) -> bool:
    return path.partition("/")[0] == HEAD
