"""The benchmark of coordinates and the model that does not fit, at small sizes."""

import json

import pytest

from experiments import large
from experiments.bench import coordinates


@pytest.mark.slow
def test_whole_periods_are_timed():
    config = coordinates.CoordinatesConfig(rank=8, periods=1)
    row = coordinates.measure("mlp", 64, 48, config)
    assert row["periods"] == 1
    assert row["state / Adam"] == pytest.approx(8 / 64)
    assert 0 < row["median ms"] < 1e4


def test_a_width_without_a_head_is_refused():
    with pytest.raises(ValueError, match=r"widths=\(32,\); accepted are 64 or more"):
        coordinates.CoordinatesConfig(model="transformer", widths=(32,))


@pytest.mark.slow
def test_a_large_model_is_planned_and_trained(tmp_path):
    out = tmp_path / "large.json"
    sizes = "--width 64 --depth 2 --rows 16 --rank 4 --steps 6 --fold-every 2"
    large.main([*sizes.split(), "--learning-rate", "0.01", "--out", str(out)])
    trained, plans = json.loads(out.read_text(encoding="utf-8"))["tables"].values()
    assert [row["step"] for row in trained] == ["init", *map(str, range(6))]
    assert trained[-1]["loss"] < trained[1]["loss"]
    held = {row["what"]: row["planned GB"] for row in plans}
    assert held["step"] < held["plain Adam"]
