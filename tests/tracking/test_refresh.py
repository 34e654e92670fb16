import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsbp_jax
from dsbp_jax.tracking import refresh
from tests.layers.models import normal


def test_a_leaf_that_never_gets_a_signal_is_not_solved_for(monkeypatch):
    """Frozen, or an expert that no token was routed to: cold, and free of charge."""
    entered = []
    real = refresh._solve

    def counted(entry, *args, **kwargs):
        jax.debug.callback(lambda: entered.append(1))
        return real(entry, *args, **kwargs)

    monkeypatch.setattr(refresh, "_solve", counted)
    tx = dsbp_jax.spectral_projection(2, refresh_every=100)
    params = {"frozen": jnp.ones((8, 6)), "live": jnp.ones((9, 7))}
    grads = {"frozen": jnp.zeros((8, 6)), "live": normal(9, 7)}
    update, state = jax.jit(tx.update), tx.init(params)
    for _ in range(20):
        _, state = update(grads, state)
    jax.effects_barrier()
    refreshes = {k: int(d.refreshes) for k, d in dsbp_jax.diagnostics(state).items()}
    assert refreshes == {"frozen": 0, "live": 1}
    # One cold solve; at most the turn of the frozen leaf beside it.
    assert len(entered) <= 2
    _, state = update({**grads, "frozen": normal(8, 6)}, state)
    assert dsbp_jax.diagnostics(state)["frozen"].refreshes == 1


def test_one_expert_of_a_stack_may_stay_cold():
    tx = dsbp_jax.spectral_projection(2)
    stack = normal(3, 8, 6).at[1].set(0)
    state = tx.init({"w": stack})
    for _ in range(3):
        _, state = jax.jit(tx.update)({"w": stack}, state)
    np.testing.assert_array_equal(
        dsbp_jax.diagnostics(state)["w"].refreshes > 0, [True, False, True]
    )
    (space,) = dsbp_jax.eigenspaces(state)["w"]
    np.testing.assert_array_equal(space.solved, [True, False, True])


def test_a_period_without_end_costs_nothing_to_plan():
    tx = dsbp_jax.spectral_projection(2, refresh_every=10**9)
    params = {"a": normal(8, 6), "b": normal(7, 5, seed=1)}
    state = tx.init(params)
    for step in range(3):
        grads = {name: normal(*p.shape, seed=step) for name, p in params.items()}
        _, state = jax.jit(tx.update)(grads, state, params)
    counts = {int(info.refreshes) for info in dsbp_jax.diagnostics(state).values()}
    assert counts == {1}


@pytest.mark.parametrize("slots", [2, 3])
def test_leaves_solved_together_are_those_solved_in_turn(slots, monkeypatch):
    """As accelerators do it; slots left over and leaves without a signal do nothing."""
    names = "abcde"
    params = {name: normal(8, 6, seed=i) for i, name in enumerate(names)}
    tx = dsbp_jax.spectral_projection(2, refresh_every=3)

    def run():
        update, state = (
            jax.jit(lambda grads, state: tx.update(grads, state)),
            tx.init(params),
        )
        for step in range(4):
            grads = {
                name: normal(8, 6, seed=10 * step + i) for i, name in enumerate(names)
            }
            # Cold for a while, and for ever.
            grads["b"] = grads["b"] * float(step > 1)
            grads["d"] = jnp.zeros((8, 6))
            updates, state = update(grads, state)
        return updates, state

    in_turn = run()
    together = lambda self, first, entries: self.solved_together(first, entries, slots)
    monkeypatch.setattr(refresh._Group, "solved", together)
    at_once = run()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        in_turn,
        at_once,
    )
    done = {k: int(d.refreshes) for k, d in dsbp_jax.diagnostics(at_once[1]).items()}
    assert done["d"] == 0
    assert min(done[name] for name in "abce") > 0
