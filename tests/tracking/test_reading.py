import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dsbp_jax
from dsbp_jax import Layout, MatrixView
from tests.layers.models import normal

PARAMS = {"w": normal(8, 6), "v": normal(5, 7, seed=1)}


def test_eigenspaces_come_with_their_labels_from_anywhere():
    tx = optax.chain(
        optax.clip(1.0),
        optax.masked(dsbp_jax.track_bases(2, side="both"), {"w": True, "v": False}),
        dsbp_jax.add_spectral_decay(0.1, source="gradient"),
    )
    _, state = jax.jit(tx.update)(PARAMS, tx.init(PARAMS), PARAMS)
    spaces = dsbp_jax.eigenspaces(state)
    labels = lambda found: [(one.side, one.rank) for one in found]
    assert labels(spaces["w"]) == [("input", 2), ("output", 2), ("output", 1)]
    assert labels(spaces["v"]) == [("output", 1)]
    assert all(one.solved for found in spaces.values() for one in found)


def test_nothing_is_solved_before_the_first_signal():
    state = dsbp_jax.spectral_projection(2).init(PARAMS)
    assert not any(one.solved for (one,) in dsbp_jax.eigenspaces(state).values())


def test_a_state_without_bases_is_named():
    state = optax.adam(0.1).init(PARAMS)
    for read in (dsbp_jax.eigenspaces, dsbp_jax.bases, dsbp_jax.diagnostics):
        with pytest.raises(ValueError, match="opt_state must hold the state of a spec"):
            read(state)


def test_labels_survive_serialisation_jit_and_flax():
    serialization = pytest.importorskip("flax.serialization")
    layout = Layout((("w", MatrixView((1,), (0,))), ("v", MatrixView((0,), (1,)))))
    tx = dsbp_jax.spectral_projection(2, layout=layout)
    _, state = jax.jit(tx.update)(PARAMS, tx.init(PARAMS))
    text = serialization.to_bytes(state)
    restored = serialization.from_bytes(tx.init(PARAMS), text)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    (space,) = dsbp_jax.eigenspaces(jax.jit(lambda s: s)(restored))["w"]
    assert space.view == layout["w"]


def test_a_state_of_another_rank_or_other_leaves_is_one_clear_line():
    tx = dsbp_jax.spectral_projection(2)
    state = tx.init({"w": normal(8, 6)})
    with pytest.raises(ValueError, match="updates must have the leaves that the st"):
        tx.update({"w": normal(8, 9)}, state)
    with pytest.raises(ValueError, match=r"'w' had shape \(8, 6\), got \(6,\)"):
        tx.update({"w": normal(6)}, state)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_an_old_checkpoint_opens(tmp_path, dtype):
    """The arrays of a state are called what they were before it had labels."""
    import orbax.checkpoint as ocp

    params = {name: leaf.astype(dtype) for name, leaf in PARAMS.items()}
    tx = dsbp_jax.dsbp(0.1, 2)
    _, state = jax.jit(tx.update)(params, tx.init(params), params)
    as_dict = lambda entry: {
        "basis": dict(entry.basis._asdict()),
        **{name: getattr(entry, name) for name in ("drift", "refreshes", "failures")},
    }
    old = {
        "spectral": {
            "count": state.spectral.count,
            "tracked": {
                side: {path: as_dict(entry) for path, entry in entries.items()}
                for side, entries in state.spectral.tracked.items()
            },
        },
        "descent": [{"trace": state.descent[0].trace}, None],
    }
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "old", old)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "old", tx.init(params))
    jax.tree.map(np.testing.assert_array_equal, restored, state)
