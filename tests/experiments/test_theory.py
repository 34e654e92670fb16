"""The two theory commands, small."""

import json

import numpy as np
import pytest

from experiments.theory import __main__ as command, known, training


@pytest.mark.slow
def test_a_certificate_of_digits_and_its_files(tmp_path, capsys):
    out, cells = tmp_path / "bound.json", tmp_path / "cells"
    words = [
        *("pac_bayes", "--pac-bayes.dataset", "digits", "--pac-bayes.seeds", "1"),
        *("--pac-bayes.hidden", "16", "--pac-bayes.families", "eigenbasis"),
        *("--pac-bayes.priors", "learned", "--pac-bayes.optimizers"),
        *("--pac-bayes.epochs", "20", "--pac-bayes.posterior-epochs", "2"),
        *("--pac-bayes.cells", str(cells), "--out", str(out)),
    ]
    command.main(words)
    result = json.loads(out.read_text(encoding="utf-8"))
    (cell,) = result["cells"]
    assert cell["num_examples"] == cell["draws"] == 719
    assert cell["sampled"] < cell["empirical"] < cell["bound"]
    assert cell["test_error_of_the_posterior"] < cell["bound"] < 0.8
    assert result["command"].startswith("python -m experiments.theory pac_bayes")
    assert "learned" in capsys.readouterr().out
    assert out.with_suffix(".svg").exists()
    assert "<table>" in out.with_suffix(".html").read_text(encoding="utf-8")
    # Called again, it takes the cell that is there; with other options it says so.
    before = (cells / "learned-eigenbasis-momentum-0.json").stat().st_mtime_ns
    command.main(words)
    after = (cells / "learned-eigenbasis-momentum-0.json").stat().st_mtime_ns
    assert before == after
    with pytest.raises(SystemExit) as error:
        command.main([*words, "--pac-bayes.passes", "2"])
    assert error.value.code == 2
    assert "accepted is another folder" in capsys.readouterr().err


def test_weak_errors_of_one_method_and_their_slopes(tmp_path, monkeypatch):
    monkeypatch.setattr(known, "METHODS", {"sgd": known.METHODS["sgd"]})
    out = tmp_path / "sde.json"
    command.main(
        [
            *("sde", "--sde.etas", "0.01", "0.005", "--sde.nodes", "12"),
            *("--sde.cells", str(tmp_path / "parts"), "--out", str(out)),
            "--sde.networks",
        ]
    )
    result = json.loads(out.read_text(encoding="utf-8"))
    slopes = {row["correction"]: row["slope"] for row in result["by_eta"]}
    assert abs(slopes[False] - 1) < 0.1
    assert abs(slopes[True] - 2) < 0.1
    assert set(result["seconds"]) == {"by_eta", "by_rho"}


def test_bad_options_are_refused(capsys):
    for words, message in [
        (["sde", "--sde.steps", "15"], "accepted are multiples of 10"),
        (["sde", "--sde.etas", "0.1"], "accepted are two or more"),
        (["pac_bayes", "--pac-bayes.families", "round"], "accepted are isotropic"),
        (["sde", "--out", "result.txt"], "a file that ends in .json"),
    ]:
        with pytest.raises(SystemExit) as error:
            command.main(words)
        assert error.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_optimizers_of_the_table_of_optima_lower_the_loss(monkeypatch):
    monkeypatch.setattr(training, "RANK", 4)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 20)).astype(np.float32)
    y = (x[:, 0] > 0).astype(np.int32)
    start = training.init(0, 8, 20, 2)
    before = float(training.cross_entropy(start, x, y))
    for name in training.OPTIMIZERS:
        params = training.train(name, start, x, y, 10, seed=0)
        assert float(training.cross_entropy(params, x, y)) < 0.8 * before, name
