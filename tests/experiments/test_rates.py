"""Losses by rate and width, from one command."""

import json

import pytest

from experiments import rates
from experiments.config import ImageConfig, ModelConfig, TextConfig
from experiments.fewshot_config import FewshotConfig
from tests.experiments.commands import fails


@pytest.mark.slow
def test_the_best_rate_of_each_width_is_marked(tmp_path):
    out = tmp_path / "rates.json"
    words = "digits --contenders momentum --widths 8 16 --neighbours 2 --seeds 1"
    places = ["--cells", str(tmp_path / "cells"), "--out", str(out)]
    rates.main([*words.split(), "--steps", "20", *places])
    (table,) = json.loads(out.read_text(encoding="utf-8"))["tables"].values()
    assert len(table) == 2 * 5
    for width in ("8", "16"):
        own = [row for row in table if row["width"] == width]
        lowest = min(own, key=lambda row: row["loss"])
        assert [row["best"] for row in own].count("*") == 1
        assert lowest["best"] == "*"
        assert own[3]["rate"] == pytest.approx(3 * own[2]["rate"])
    assert out.with_suffix(".svg").read_text(encoding="utf-8").startswith("<?xml")


def test_widths_are_those_of_all_hidden_layers():
    model = ModelConfig("mlp", {"hidden": (8, 8, 8)})
    wide = rates.widened(ImageConfig(model=model), 16)
    assert wide.model.options["hidden"] == (16, 16, 16)
    assert rates.widened(TextConfig(), 64).width == 64
    with pytest.raises(ValueError, match="accepted are text, and images with"):
        rates.widened(FewshotConfig(), 64)


def test_what_is_not_accepted_is_said(capsys, tmp_path):
    cells = ["--cells", str(tmp_path)]
    line = fails("rates", ["digits", "--metric", "los", *cells], capsys)
    assert "metric='los'; accepted are" in line
    line = fails("rates", ["digits", "--widths", "0", *cells], capsys)
    assert "widths=(0,); accepted are" in line
