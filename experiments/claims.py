"""The paper's claims: which tables test each of them, and what these say.

One rule for all: a claim *holds* where ours is ahead in every test of it, *does not
hold* where theirs is ahead in one, and else is *open*. Who is ahead is said by paired
t-tests, their p-values adjusted for all tests of the page (Holm), below 0.05; intervals
are not adjusted. A claim that has no contenders has a verdict in words, typed here, of
what its files show.
"""

import dataclasses

import numpy as np

from experiments import headlines
from experiments.headlines import Duel, Ratio, Results
from experiments.study import printing, statistics


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim of arXiv 2505.23369, and what is asked of it.

    Attributes:
      words: The claim, in ours.
      tests: The paper's method against its rival.
      also: Another comparison that says more, of another variant or rival.
      verdict: Where there are no tests: what its files show.
      files: Of these.
    """

    words: str
    tests: tuple[Duel, ...] = ()
    also: Duel | Ratio | None = None
    verdict: str = ""
    files: tuple[str, ...] = ()


def verdicts(
    claims: tuple[Claim, ...], results: Results
) -> list[tuple[str, list[float | None]]]:
    """What the rule says of each claim, and the adjusted p-values of its tests."""
    there = [
        [duel for duel in claim.tests if duel.table in results] for claim in claims
    ]
    tested = [duel.p_value(results) for own in there for duel in own]
    adjusted = iter(statistics.holm(tested))
    said = []
    for claim, own in zip(claims, there, strict=True):
        p_values = [next(adjusted) for _ in own]
        # 1 where ours is ahead, -1 where theirs is, 0 where nobody.
        signs = [
            0
            if p is None or p >= 1 - statistics.LEVEL
            else int(np.sign(duel.gains(results).mean()))
            for duel, p in zip(own, p_values, strict=True)
        ]
        if not claim.tests:
            verdict = claim.verdict
        elif len(own) < len(claim.tests):
            verdict = "not tested"
        elif -1 in signs:
            verdict = "does not hold"
        else:
            verdict = "holds" if all(signs) else "open"
        said.append((verdict, p_values))
    return said


def markdown(claims: tuple[Claim, ...], results: Results) -> str:
    """The table of README.md."""
    head = ("claim", "verdict", "tests (p, Holm)", "also", "files")
    rows = []
    for claim, (said, p_values) in zip(claims, verdicts(claims, results), strict=True):
        there = [duel for duel in claim.tests if duel.table in results]
        tests = [
            _shown(duel, results) + ("" if p is None else f" ({p:.2g})")
            for duel, p in zip(there, p_values, strict=True)
        ]
        also = [claim.also] if claim.also else []
        files = dict.fromkeys([*map(_file, (*claim.tests, *also)), *claim.files])
        links = [headlines.link(file) for file in files if file in results]
        words = [claim.words, said, "; ".join(tests)]
        shown = "".join(_shown(test, results) for test in also)
        rows.append([*words, shown, ", ".join(links)])
    return "\n".join(printing.markdown_table(head, rows)) + "\n"


def _file(test: Duel | Ratio) -> str:
    return test.table if isinstance(test, Duel) else test.file


def _shown(test: Duel | Ratio, results: Results) -> str:
    """A test in a few words; empty where its file is not there."""
    if _file(test) not in results:
        return ""
    if isinstance(test, Ratio):
        _, ours, theirs, ratio, *_ = test.row(results)
        return f"{test.what}: {ours}, {theirs}, {ratio}"
    column, *_ = test.found(results)
    _, text = test.change(results)
    where = f"{test.what}, " if test.what else ""
    return f"{where}{column['metric']}, `{test.ours}` − `{test.theirs}`: {text}"


_LORA, _PENALTY = "lora:rank=8", "spectral_transfer:strength=1"
_NULL = "spectral_lora:start=null,train=output"

CLAIMS: tuple[Claim, ...] = (
    Claim(
        "gradients projected on the leading eigenspace train better models",
        (
            Duel("", "table-projection", "dsbp_paper", "momentum"),
            Duel("", "table-projection", "dsbp_paper", "sam"),
            Duel("", "table-projection", "dsbp_paper", "adam"),
            Duel("CIFAR-10", "table-cifar10", "dsbp_paper", "sam"),
            Duel("Tiny ImageNet", "table-tiny-imagenet", "dsbp_paper", "sam"),
        ),
        Duel("CIFAR-10", "table-cifar10", "spectral_muon", "sam"),
    ),
    Claim(
        "a step costs O(k·d) for a layer",
        verdict="in coordinates only, where gradient, state and update are that small",
        also=Ratio(
            "step of 4 layers 2048², ms",
            "bench-step-2core-cpu",
            "mlp, width 2048, 2048 tokens, rank 64, adam",
            "spectral_coordinates",
            "plain",
            "mean ms",
        ),
    ),
    Claim(
        "with SAM, minima are flatter than SAM's",
        (
            Duel("", "table-label-noise", "dsbp_sam", "sam", "hessian"),
            Duel("", "table-label-noise", "dsbp_sam", "sam", "trace"),
        ),
        Duel("", "table-label-noise", "spectral_sam", "sam", "hessian"),
    ),
    Claim(
        "with SAM, it is more accurate than SAM under noise",
        (Duel("", "table-label-noise", "dsbp_sam", "sam", "accuracy"),),
        Duel("", "table-label-noise", "spectral_sam", "sam", "accuracy"),
    ),
    Claim(
        "it generalises from few labels",
        (
            Duel("", "table-labels-1", "dsbp_paper", "sam"),
            Duel("", "table-labels-1", "dsbp_paper", "momentum"),
        ),
        Duel("", "table-labels-1", "spectral_muon", "adamw"),
    ),
    Claim(
        "it makes more of limited time",
        (Duel("", "table-fixed-time", "dsbp_paper", "sam", "accuracy", "time"),),
        Duel(
            "", "table-fixed-time", "spectral_muon:rank=16", "sam", "accuracy", "time"
        ),
    ),
    Claim(
        "few-shot learning is faster than MAML's (accuracy in equal time)",
        (Duel("", "table-fewshot", "spectral_maml", "maml"),),
        Duel("", "table-fewshot", "spectral_maml:spectral.residual=0.5", "maml"),
    ),
    Claim(
        "tuning for another task beats LoRA",
        (
            Duel("", "table-transfer", _PENALTY, _LORA, "accuracy"),
            Duel("", "table-transfer", _PENALTY, _LORA, "kept"),
        ),
        Duel("", "table-transfer", _NULL, _LORA, "kept"),
    ),
    Claim(
        "smaller architectures are better than pruned ones",
        (
            Duel("", "table-compression", "spectral", "magnitude", "accuracy"),
            Duel("", "table-compression", "spectral", "l1", "accuracy"),
            Duel("CNN", "table-compression-cnn", "spectral", "l1", "accuracy"),
            Duel("ResNet", "table-compression-resnet", "spectral", "l1", "accuracy"),
            Duel("ViT", "table-compression-vit", "spectral", "l1", "accuracy"),
            Duel("CNN", "table-compression-cnn", "spectral", "magnitude", "accuracy"),
            Duel(
                "ResNet",
                "table-compression-resnet",
                "spectral",
                "magnitude",
                "accuracy",
            ),
            Duel("ViT", "table-compression-vit", "spectral", "magnitude", "accuracy"),
        ),
        Duel("", "table-compression", "factors", "magnitude", "accuracy"),
    ),
    Claim(
        "models survive shifted data",
        (Duel("", "table-shifted", "spectral", "none"),),
        Duel("", "table-shifted", "spectral", "full_rank"),
    ),
    Claim(
        "a third-order stochastic differential equation describes it",
        verdict="holds as an expansion: weak errors fall with the orders that they "
        "should; on a small network the second already is inside the optimizer's own "
        "interval",
        files=("theory-sde",),
    ),
    Claim(
        "a PAC-Bayes bound explains why it generalises",
        verdict="certifies, tighter along the eigenspaces than with equal noise; it "
        "does not order optima as the test error does",
        files=("theory-pac-bayes-initial", "theory-pac-bayes-learned"),
    ),
)
