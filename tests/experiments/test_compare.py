"""Comparisons: equal budgets, rates chosen on validation, paired statistics."""

import json

import pytest
import scipy.stats

from experiments import compare, comparison, data
from experiments.comparison import Contender, Outcome
from experiments.config import Config, ModelConfig
from experiments.optimizers import OptimizerConfig
from experiments.steps import Classifier, Trainer
from tests.experiments.small_runs import SMALL


def outcome(rate, accuracy, *, loss=1.0, diverged=None, seed=0, test=None):
    scores = {"loss": loss, "accuracy": accuracy}
    tested = None if test is None else {"loss": loss, "accuracy": test}
    return Outcome(seed, rate, scores, tested, [(1, accuracy)], 2.0, diverged)


def contender(name, evaluations=10, optimizer=None):
    config = Config(
        model=ModelConfig("mlp", {"hidden": (8,)}),
        optimizer=optimizer or OptimizerConfig("dsbp", rank=4),
        batch_size=256,
    )
    classifier = Classifier(data.load("digits"), config.model)
    return Contender(classifier, config, name, evaluations)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A comparison on digits, and the splits that were read, in order."""
    out = tmp_path_factory.mktemp("runs")
    read, evaluate = [], Trainer.evaluate

    def recording(self, state, split, *args):
        dataset = self.classifier.dataset
        read.append("test" if split is dataset.test else "validation")
        return evaluate(self, state, split, *args)

    args = [
        "--optimizers",
        "momentum",
        "sam",
        "adam",
        "--seeds",
        "2",
        "--learning-rates",
        "0.01",
        "0.1",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "evaluate", recording)
        compare.main([*SMALL, *args, "--out", str(out)])
    result = json.loads((out / "compare-digits" / "comparison.json").read_text())
    return result, read, out / "compare-digits"


def test_everyone_gets_the_same_evaluations(compared):
    result, _, _ = compared
    assert result["evaluations"] == 12
    steps = {row["name"]: row["steps"] for row in result["table"]}
    assert steps == {"momentum": 12, "sam": 6, "adam": 12}
    for outcomes in result["runs"].values():
        assert [run["seed"] for run in outcomes] == [0, 1]
        assert all(run["curve"][-1][0] == 12 for run in outcomes)


def test_the_test_split_is_read_once_for_each_run_that_counts(compared):
    result, read, _ = compared
    assert read.count("test") == 6
    for name, tried in result["tuning"].items():
        assert all(run["test"] is None for run in tried)
        assert [run["learning_rate"] for run in tried] == [0.01, 0.1]
        best = max(tried, key=lambda run: run["validation"]["accuracy"])
        assert {r["learning_rate"] for r in result["runs"][name]} == {
            best["learning_rate"]
        }


def test_rows_follow_from_the_runs(compared):
    result, _, folder = compared
    first = [run["test"]["accuracy"] for run in result["runs"]["momentum"]]
    for row in result["table"]:
        accuracies = [run["test"]["accuracy"] for run in result["runs"][row["name"]]]
        assert row["mean"] == pytest.approx(sum(accuracies) / 2)
        if row["name"] == "momentum":
            assert row["difference"] is None
        else:
            assert row["difference"] == pytest.approx(
                (sum(accuracies) - sum(first)) / 2
            )
    assert (folder / "report.html").read_text().count("<svg") == 1


def test_a_comparison_prints_every_row(compared, capsys, tmp_path):
    args = ["--optimizers", "sgd", "adam", "--seeds", "1", "--epochs", "1"]
    compare.main([*SMALL, *args, "--name", "one", "--out", str(tmp_path)])
    text = capsys.readouterr().out
    assert "sgd" in text
    assert "adam" in text
    assert "not tuned" in text
    with pytest.raises(SystemExit) as exit_:
        compare.main([*SMALL, *args, "--name", "one", "--out", str(tmp_path)])
    assert exit_.value.code == 2


def test_seeds_and_rates_share_one_compilation():
    adam = contender("adam")
    for seed in (0, 1):
        for rate in (1e-3, 1e-2):
            assert adam.run(seed, rate, test=False).test is None
    assert adam.trainer._step._cache_size() == 1


def test_a_diverged_run_counts_with_a_constant_answer():
    found = contender("sgd", evaluations=5).run(0, 1e30, test=True)
    labels = data.load("digits").test.labels
    assert "at step 2" in found.diverged
    assert found.test["accuracy"] == pytest.approx((labels == 0).mean())


def test_a_chosen_rate_belongs_to_its_optimizer():
    chosen = OptimizerConfig("momentum", learning_rate=0.123)
    assert contender("momentum", optimizer=chosen).config.optimizer.peak == 0.123
    assert contender("adam", optimizer=chosen).config.optimizer.peak == 1e-3


def test_the_best_rate_is_that_of_the_highest_accuracy():
    tried = [
        outcome(0.1, 0.8),
        outcome(0.1, 0.6),
        outcome(0.2, 0.75),
        outcome(0.3, 0.1),
    ]
    assert comparison.best_learning_rate(tried) == 0.2
    tie = [outcome(0.1, 0.8, loss=2.0), outcome(0.2, 0.8, loss=1.0)]
    assert comparison.best_learning_rate(tie) == 0.2
    broken = [outcome(0.1, 0.2), outcome(0.2, 0.9), outcome(0.2, 0.1, diverged="nan")]
    assert comparison.best_learning_rate(broken) == 0.1


def test_rows_pair_by_seed():
    contenders = [contender("sgd"), contender("sam")]
    finals = {
        "sgd": [
            outcome(0.1, 0.5, seed=s, test=t) for s, t in enumerate((0.5, 0.6, 0.7))
        ],
        "sam": [
            outcome(0.3, 0.5, seed=s, test=t, diverged="x" if s == 0 else None)
            for s, t in enumerate((0.6, 0.65, 0.8))
        ],
    }
    first, second = comparison.make_rows(contenders, finals, {"sam": (0.1, 0.3)})
    assert first.p_value is None
    assert not first.at_edge
    assert second.difference == pytest.approx(0.25 / 3)
    test = scipy.stats.ttest_rel((0.6, 0.65, 0.8), (0.5, 0.6, 0.7))
    assert second.p_value == pytest.approx(test.pvalue)
    assert (second.at_edge, second.steps, second.diverged) == (True, 5, 1)
    assert compare.cells(second)[:4] == (
        "sam (1 diverged)",
        "0.3 *",
        "68.33 ± 6.01",
        "+8.33 ± 1.67",
    )


def test_nothing_to_test_is_no_warning():
    assert comparison.paired_p_value([0.5], [0.6]) is None
    assert comparison.paired_p_value([0.5, 0.6], [0.6, 0.7]) is None
    assert comparison.mean_and_error([0.5]) == (0.5, None)
