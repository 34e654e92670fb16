import json

import numpy as np
import pytest

from experiments import compress
from experiments.compression_rivals import RIVALS
from experiments.data.loading import load


@pytest.fixture(scope="module")
def digits():
    return load("digits")


def config(tmp_path, **options):
    return compress.Compress(
        widths=(32, 24),
        epochs=12,
        tune_epochs=1,
        rate=3e-3,
        batch=64,
        images=500,
        batch_sizes=(8,),
        out=tmp_path,
        **options,
    )


def test_every_method_keeps_to_the_flops_and_ours_is_ahead(tmp_path, digits):
    own = config(tmp_path)
    net = compress.trained(own, digits, 0)
    whole = compress.accuracy(net, digits, digits.validation)
    assert whole > 0.8
    found = {}
    for method in ("spectral", *RIVALS):
        small, said = compress.cut(own, method, net, digits, 0.5, 0)
        assert said["flops"] <= 0.5 + 1e-9, method
        found[method] = compress.accuracy(small, digits, digits.validation)
    assert found["spectral"] >= max(found["random"], found["unrepaired"])
    assert set(RIVALS) == set(own.methods) - {"spectral"}


def test_a_cell_is_measured_before_and_after_tuning(tmp_path, digits, monkeypatch):
    monkeypatch.setattr(compress, "_TIMED", 2)
    own = config(tmp_path)
    net = compress.trained(own, digits, 0)
    again = compress.trained(own, digits, 0)  # from its file
    np.testing.assert_array_equal(
        net.params["head"]["kernel"][...], again.params["head"]["kernel"][...]
    )
    cells = [
        compress.cell(own, digits, net, "spectral", share, 0) for share in (0.6, 0.5)
    ]
    json.dumps(cells)
    for one in cells:
        assert set(one["accuracy"]) == {"validation"}
        assert set(one["accuracy"]["validation"]) == {"original", "cut", "tuned"}
        assert 0 < one["parameters"] < 1
        assert all(seconds > 0 for seconds in one["latency"]["8"])
    lines = compress.table(cells).splitlines()
    assert lines[0].split()[:3] == ["method", "share", "flops"]
    assert [line.split()[:2] for line in lines[1:]] == [
        ["spectral", "0.6"],
        ["spectral", "0.5"],
    ]
