"""One set of defaults, for all models and streams."""

import dataclasses

from dsbp_jax import checks


@dataclasses.dataclass(frozen=True)
class Settings:
    """What `fit` and `adapt` go by.

    Counts of images are counts of rows of the model's input.

    Attributes:
      rank: Leading directions of each layer that are modelled.
      rows: Rows of a layer and batch whose statistics are taken, at most.
      prior: Images that the source's model counts for in a model that begins.
      horizon: Images that a model remembers; those of the probe count as many.
      limit: No direction is stretched or shrunk by more than this factor; 1 or more.
      watched: Layers whose drift is followed, at most.
      moved: Layers that are moved, at most.
      gain: What each further layer must take off the loss under the four shifts.
      probe: The plain model runs beside the moved one on one row of so many.
      false_alarms: Share of source batches whose drift is called one; in (0, 1).
      quiet: An alarm ends below this share of the threshold.
      window: Images of the probe over which the guard compares.
      doubt: Entropy, as a share of log classes, by which the moved model may be less
        sure than the plain one.
      agreement: Share of answers, at least, that both have in common where the plain
        ones are of all classes and the moved model is in half of such doubt, and in the
        first window where it is `unsure`; without logits, always.
      balance: How much more one-sided the moved answers' classes may be than those of
        the plain ones, in the same unit.
      turns: Excess, over chance and its noise, of plain answers of the class of the
        one before, over which classes are taken to come in turns.
      unsure: How much more entropy than on source data moved answers may have, in the
        unit of `doubt`, where they differ from most of the first plain ones, or the
        plain ones come in turns.
      shares: How far the moved answers' classes may be from those on source data, in
        total variation over what is chance.
      patience: Images of the probe for which a model that is not trusted stays so.
      reset_every: Images after which all models begin anew.

    Example:
      >>> Settings(prior=0)
      Traceback (most recent call last):
      ...
      ValueError: prior must be a finite number above 0, got 0
    """

    rank: int = 32
    rows: int = 2048
    prior: float = 16.0
    horizon: float = 200.0
    limit: float = 10.0
    watched: int = 8
    moved: int = 24
    gain: float = 0.01
    probe: int = 8
    false_alarms: float = 0.01
    quiet: float = 0.7
    window: float = 100.0
    doubt: float = 0.25
    agreement: float = 0.5
    balance: float = 0.15
    turns: float = 0.1
    unsure: float = 0.22
    shares: float = 0.08
    patience: float = 25.0
    reset_every: int = 20_000

    def __post_init__(self) -> None:
        for name in ("rank", "rows", "watched", "moved", "probe", "reset_every"):
            checks.positive_int(name, getattr(self, name))
        for name in ("prior", "horizon", "window", "patience"):
            checks.positive(name, getattr(self, name))
        checks.at_least_one("limit", self.limit)
        checks.in_unit_interval(
            "false_alarms", self.false_alarms, open_left=True, open_right=True
        )
        shares = (
            *("gain", "quiet", "doubt", "agreement"),
            *("balance", "turns", "unsure", "shares"),
        )
        for name in shares:
            checks.in_unit_interval(name, getattr(self, name))

    def stride(self, images: int) -> int:
        """Of a batch, every so manieth row is of the probe."""
        return self.probe if images >= self.probe else 1
