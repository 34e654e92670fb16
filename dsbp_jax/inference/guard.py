"""Whether moved answers are to be trusted, seen beside the plain ones."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsbp_jax.inference.settings import Settings

_LEAST = 16.0  # images of the probe before anything is said


class Guard(NamedTuple):
    """What was seen of both models' answers on the probe.

    Attributes:
      trusted: Whether moved answers are.  # shape=(), dtype=bool
      since: Images of the probe since that changed.  # shape=(), dtype=float32
      seen: Images that the means below are of.  # shape=(), dtype=float32
      entropy: Mean entropy of the plain and of the moved answers, as a share of the
        logarithm of the number of classes.  # shape=(2,), dtype=float32
      agreement: Share of answers that agree.  # shape=(), dtype=float32
      repeats: Share of the plain and of the moved answers whose class is that of the
        one before.  # shape=(2,), dtype=float32
      last: The classes of the last answers.  # shape=(2,), dtype=int32
      plain: Shares of the classes among the plain answers; empty without logits.
        # shape=(classes,), dtype=float32
      moved: Likewise of the moved ones.  # shape=(classes,), dtype=float32
      shares: Likewise of the moved ones of all rows, the probe's and others.
        # shape=(classes,), dtype=float32
    """

    trusted: jax.Array
    since: jax.Array
    seen: jax.Array
    entropy: jax.Array
    agreement: jax.Array
    repeats: jax.Array
    last: jax.Array
    plain: jax.Array
    moved: jax.Array
    shares: jax.Array


def start(classes: jax.Array) -> Guard:
    """A guard that has seen nothing; `classes` are the source's probabilities."""
    zero = jnp.float32(0)
    none = jnp.zeros(2, jnp.float32)
    one, last = jnp.float32(1), jnp.zeros(2, jnp.int32)
    return Guard(
        jnp.array(True), zero, zero, none, one, none, last, classes, classes, classes
    )


def entropy(probabilities: jax.Array) -> jax.Array:
    """Along the last axis, as a share of the logarithm of its length.

    Example:
      >>> print(entropy(jnp.array([[0.5, 0.5], [0.9, 0.1]])).round(2))
      [1.   0.47]
    """
    logs = jnp.log(jnp.maximum(probabilities, 1e-30))
    size = probabilities.shape[-1]
    return jnp.sum(probabilities * -logs, axis=-1) / jnp.log(jnp.float32(size))


def probabilities(logits: jax.Array) -> jax.Array:
    """Of classes, in float32."""
    return jax.nn.softmax(logits.astype(jnp.float32), axis=-1)


def agreement(plain: Any, moved: Any) -> jax.Array:
    """Of outputs that are no logits: 1 where equal, 0 where unrelated."""
    pairs = zip(jax.tree.leaves(plain), jax.tree.leaves(moved), strict=True)
    apart = together = jnp.float32(0)
    for left, right in pairs:
        left, right = left.astype(jnp.float32), right.astype(jnp.float32)
        apart += jnp.sum(jnp.square(left - right))
        together += jnp.sum(jnp.square(left)) + jnp.sum(jnp.square(right))
    return 1 - apart / jnp.maximum(together, 1e-30)


def compared(
    guard: Guard,
    plain: Any,
    moved: Any,
    images: float,
    settings: Settings,
    classes: jax.Array,
    usual: jax.Array,
    answers: Any,
) -> Guard:
    """The guard after both models answered the same images.

    Args:
      guard: The guard before.
      plain: Logits `(n, classes)`, or any outputs where `source` is empty.
      moved: Likewise.
      images: n.
      settings: Its window and its limits.
      classes: Mean class probabilities on source data; empty where outputs are no
        logits.
      usual: Mean entropy on source data: moved answers may be as unsure as that.
      answers: Moved outputs of the whole batch that the images are of.

    Returns:
      The guard after; the same where an answer is not finite, but not trusted.
    """
    weight = images / (images + jnp.minimum(guard.seen, settings.window))
    mix = lambda old, new: (1 - weight) * old + weight * new
    entropies, means = guard.entropy, [guard.plain, guard.moved]
    repeats, shares = guard.repeats, guard.shares
    if classes.size:
        pair = [probabilities(plain), probabilities(moved)]
        found = jnp.stack([one.argmax(-1).astype(jnp.int32) for one in pair])
        share = lambda hits: jnp.mean(hits, axis=-1, dtype=jnp.float32)
        common = mix(guard.agreement, share(found[0] == found[1]))
        entropies = mix(entropies, jnp.stack([jnp.mean(entropy(p)) for p in pair]))
        means = [
            mix(old, jnp.mean(jax.nn.one_hot(new, classes.size), axis=0))
            for old, new in zip(means, found, strict=True)
        ]
        before = jnp.concatenate([guard.last[:, None], found[:, :-1]], axis=1)
        repeats, last = mix(repeats, share(found == before)), found[:, -1]
        doubt = entropies[1] - jnp.maximum(entropies[0], usual)
        plain_balance, balance = (entropy(mean) for mean in means)
        chance = jnp.stack([jnp.sum(jnp.square(mean)) for mean in means])
        of = images + jnp.minimum(guard.seen, settings.window)
        rest = jnp.maximum(1 - chance, 0.1)
        excess = (repeats - chance) / rest
        noise = jnp.sqrt(chance * (1 - chance) / of) / rest
        # Plain answers also come in turns where shifts do. Moved ones then do not, and
        # are nearly as sure as usual: where classes come in turns, they are not.
        unsure = entropies[1] - usual > settings.unsure
        turns = jnp.where((excess[1] > noise[1]) | unsure, excess[0] - 2 * noise[0], 0)
        bad = (doubt > settings.doubt) | (turns > settings.turns)
        bad |= plain_balance - balance > settings.balance
        balanced = plain_balance > 1 - settings.balance
        counted = jnp.mean(jax.nn.one_hot(answers.argmax(-1), classes.size), axis=0)
        shares = mix(shares, counted)
        # By chance so many counts are as far apart as that, in the mean.
        spread = jnp.sum(
            jnp.sqrt(classes * (1 - classes) / (of * len(answers) / images))
        )
        away = jnp.sum(jnp.abs(shares - classes)) / 2 - 0.4 * spread
        bad |= away > settings.shares
        # At first it cannot be seen that classes come in turns.
        early = guard.seen < settings.window
        odd = (early & unsure) | (balanced & (doubt > settings.doubt / 2))
        bad |= (common < settings.agreement) & odd
        good = (doubt < settings.doubt / 2) & (turns < settings.turns / 2) & ~bad
    else:
        last = guard.last
        common = mix(guard.agreement, agreement(plain, moved))
        bad = common < settings.agreement
        good = common > (1 + settings.agreement) / 2
    seen = guard.seen + images
    since = guard.since + images
    ready = seen >= _LEAST
    late = since >= settings.patience
    trusted = jnp.where(guard.trusted, ~bad | ~ready, good & late & ready)
    since = jnp.where(trusted == guard.trusted, since, 0)
    new = Guard(
        trusted,
        since,
        seen,
        entropies,
        common,
        repeats,
        last,
        means[0],
        means[1],
        shares,
    )
    sound = jnp.isfinite(jnp.sum(entropies) + common)
    kept = guard._replace(trusted=jnp.array(False), since=jnp.float32(0))
    return jax.tree.map(lambda a, b: jnp.where(sound, a, b), new, kept)


def ready(guard: Guard) -> jax.Array:
    """Whether enough was seen to trust moved answers, and they are trusted."""
    return guard.trusted & (guard.seen >= _LEAST)
