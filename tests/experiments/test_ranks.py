"""Nuclear ranks of gradients and stable ranks of inputs, from one command."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import ranks
from experiments.config import ImageConfig, ModelConfig, ProbeConfig
from tests.experiments.commands import fails


def test_ranks_are_those_of_the_definitions():
    matrix = np.random.default_rng(0).standard_normal((7, 5)).astype(np.float32)
    values = np.linalg.svd(matrix, compute_uv=False)
    squares = np.sum(values**2)
    nuclear, stable = np.sum(values) ** 2 / squares, squares / values[0] ** 2
    np.testing.assert_allclose(ranks.nuclear_rank(matrix), nuclear, rtol=1e-5)
    np.testing.assert_allclose(ranks.stable_rank(matrix), stable, rtol=1e-5)
    for rank in (ranks.nuclear_rank, ranks.stable_rank):
        for scale in (1e-25, 1e25):
            np.testing.assert_allclose(rank(scale * matrix), rank(matrix), rtol=1e-5)
        rounded = rank(jnp.asarray(matrix, jnp.bfloat16))
        np.testing.assert_allclose(rounded, rank(matrix), rtol=0.05)
        assert rank(jnp.zeros((3, 2))) == 0


def test_layers_are_measured_where_the_loss_uses_them():
    """Against the gradient and the inputs of a network written out."""
    model = ModelConfig("mlp", {"hidden": (16,)})
    config = ImageConfig(model=model, probe=ProbeConfig(0), batch_size=64)
    task = config.make()
    state, (images, labels) = task.init(config), task.batch(config, 0)
    layout = task.uses().layout
    found = ranks.measure(task, layout, state.params, state.rest, images, labels)
    loss = lambda params: task.loss(params, state.rest, images, labels)[0]
    grads = jax.grad(loss)(state.params)
    first, last = layout
    inputs = np.asarray(images, np.float32).reshape(64, -1) / 255
    mean, std = task.dataset.mean, task.dataset.std
    inputs = (inputs - np.ravel(mean)) / np.ravel(std)
    kernels = [g for g in jax.tree.leaves(grads) if g.ndim == 2]
    by_shape = {kernel.shape: kernel for kernel in kernels}
    for path, shape in ((first, (64, 16)), (last, (16, 10))):
        nuclear = ranks.nuclear_rank(by_shape[shape])
        np.testing.assert_allclose(found[path][0], nuclear, rtol=1e-4)
    dense = state.params["layers"][0]
    hidden = jax.nn.relu(inputs @ dense["kernel"] + dense["bias"])
    for path, rows in ((first, jnp.asarray(inputs)), (last, hidden)):
        stable = ranks.stable_rank(rows)
        np.testing.assert_allclose(found[path][1], stable, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["digits", "text"])
def test_ranks_are_a_table_by_step_and_layer(preset, tmp_path):
    out = tmp_path / "ranks.json"
    words = f"{preset} --at 2 0 --steps 4 --batch-size 16 --out {out}"
    small = ["--width", "32", "--depth", "1", "--context", "16"]
    ranks.main([*words.split(), *(small if preset == "text" else [])])
    (table,) = json.loads(out.read_text(encoding="utf-8"))["tables"].values()
    steps = [row["step"] for row in table]
    half = len(table) // 2
    assert half >= 2
    assert steps == ["0"] * half + ["2"] * half
    assert [row["layer"] for row in table[:half]] == [
        row["layer"] for row in table[half:]
    ]


def test_what_is_not_accepted_is_said(capsys):
    line = fails("ranks", ["digits", "--steps", "5", "--at", "6"], capsys)
    assert "at=6; accepted are values up to 5" in line
    line = fails("ranks", ["sine"], capsys)
    assert "PRESET='sine' gives a FewshotConfig; accepted are presets of" in line
