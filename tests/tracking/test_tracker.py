import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dsbp_jax
from tests.transforms import models


def gradients(step, shape=(12, 10)):
    """A gradient of decaying spectrum that turns slowly."""
    generator = np.random.default_rng(0)
    fixed, drift = generator.normal(size=(2, *shape))
    turned = (fixed + 0.05 * step * drift) * 0.7 ** np.arange(shape[-1])
    return jnp.asarray(turned, jnp.float32)


def refreshes(state):
    return {
        path: np.asarray(info.refreshes).tolist()
        for path, info in dsbp_jax.diagnostics(state).items()
    }


def test_every_leaf_is_solved_first_and_refreshed_once_per_period():
    params = {f"layer{i}": gradients(0) for i in range(4)}
    tx = dsbp_jax.spectral_projection(2, refresh_every=4)
    state = tx.init(params)
    update = jax.jit(tx.update)
    history = []
    for step in range(13):
        _, state = update({name: gradients(step) for name in params}, state)
        history.append(refreshes(state))
    assert set(history[0].values()) == {1}
    for earlier, later in itertools.pairwise(history):
        # Four leaves, a period of four: one refresh a step.
        moved = [later[name] - earlier[name] for name in params]
        assert sorted(moved) == [0, 0, 0, 1]
    assert set(history[-1].values()) == {1 + 12 // 4}


def test_uneven_leaves_are_spread_by_cost():
    params = {"large": jnp.ones((40, 30)), **{f"s{i}": jnp.ones((6, 5)) for i in "abc"}}
    tx = dsbp_jax.spectral_projection(2, refresh_every=2)
    state = tx.init(params)
    noise = lambda step: jax.tree.map(
        lambda p: jax.random.normal(jax.random.key(step), p.shape), params
    )
    update = jax.jit(tx.update)
    _, state = update(noise(0), state)
    before = refreshes(state)
    _, state = update(noise(1), state)
    moved = {name for name, n in refreshes(state).items() if n > before[name]}
    assert moved in ({"large"}, {"sa", "sb", "sc"})


@pytest.mark.parametrize("refresh_every", [5, 2], ids=["one by one", "two at a time"])
def test_leaves_of_one_shape_share_a_solve(refresh_every):
    params = {f"layer{i}": gradients(3 * i) for i in range(4)}
    tx = dsbp_jax.spectral_projection(2, refresh_every=refresh_every)

    def run(params):
        update = jax.jit(lambda grads, state: tx.update(grads, state, refresh=True))
        state = tx.init(params)
        for step in range(2):
            grads = jax.tree.map(
                lambda p, step=step: (1 + jnp.cos(p + step)) * p, params
            )
            updates, state = update(grads, state)
        return updates, update.lower(params, state).as_text().count("syevd")

    together, solves = run(params)
    for name, leaf in params.items():
        alone, solves_of_one = run({name: leaf})
        np.testing.assert_allclose(together[name], alone[name], atol=1e-4)
    assert solves == solves_of_one > 0


def test_refresh_can_be_commanded():
    params = {"kernel": gradients(0)}
    tx = dsbp_jax.spectral_projection(2, refresh_every=3)
    _, state = tx.update(params, tx.init(params), refresh=True)
    for _ in range(6):
        _, state = tx.update(params, state, refresh=False)
    assert refreshes(state) == {"kernel": 1}
    assert state.count == 7
    _, state = tx.update(params, state, refresh=True)
    assert refreshes(state) == {"kernel": 2}
    for wrong in ("now", 0, jnp.array(False)):
        with pytest.raises(ValueError, match="refresh must be a static True, False"):
            tx.update(params, state, refresh=wrong)
    # Without a refresh the compiled step holds no branch and no loop.
    text = jax.jit(lambda u, s: tx.update(u, s, refresh=False)).lower(params, state)
    assert "stablehlo.case" not in text.as_text()
    assert "stablehlo.while" not in text.as_text()


def test_a_leaf_without_a_signal_stays_cold():
    params = {"kernel": gradients(0)}
    tx = dsbp_jax.spectral_projection(2, refresh_every=100)
    state = tx.init(params)
    for _ in range(3):
        _, state = jax.jit(tx.update)({"kernel": jnp.zeros((12, 10))}, state)
    info = dsbp_jax.diagnostics(state)["kernel"]
    assert (info.refreshes, info.failures) == (0, 0)
    _, state = jax.jit(tx.update)(params, state)
    info = dsbp_jax.diagnostics(state)["kernel"]
    assert info.refreshes == 1
    assert info.captured > 0.7


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_gradients_never_reach_the_basis(bad):
    params = {"kernel": gradients(0)}
    tx = dsbp_jax.spectral_projection(2, refresh_every=1)
    update = jax.jit(tx.update)
    _, good = update(params, tx.init(params))
    _, after = update({"kernel": gradients(1).at[3, 4].set(bad)}, good)
    jax.tree.map(
        np.testing.assert_array_equal, dsbp_jax.bases(after), dsbp_jax.bases(good)
    )
    info = dsbp_jax.diagnostics(after)["kernel"]
    assert (info.refreshes, info.failures) == (1, 1)
    updates, recovered = update({"kernel": gradients(2)}, after)
    assert dsbp_jax.diagnostics(recovered)["kernel"].refreshes == 2
    assert np.isfinite(updates["kernel"]).all()
    # From the very first step, too.
    _, cold = update({"kernel": gradients(0).at[0, 0].set(bad)}, tx.init(params))
    assert dsbp_jax.diagnostics(cold)["kernel"].failures == 1
    assert np.isfinite(cold.tracked["output"]["kernel"].basis.vectors).all()


def test_one_bad_layer_of_a_stack_fails_alone():
    stack = jnp.stack([gradients(0), gradients(1)])
    tx = dsbp_jax.spectral_projection(2, refresh_every=1)
    _, state = jax.jit(tx.update)({"w": stack}, tx.init({"w": stack}))
    _, state = jax.jit(tx.update)({"w": stack.at[1, 0, 0].set(jnp.nan)}, state)
    info = dsbp_jax.diagnostics(state)["w"]
    np.testing.assert_array_equal(info.refreshes, [2, 1])
    np.testing.assert_array_equal(info.failures, [0, 1])


def test_diagnostics_describe_the_spectrum():
    values = np.array([4.0, 3.0, 2.0, 1.0])
    params = {"kernel": jnp.diag(jnp.sqrt(jnp.asarray(values, jnp.float32)))}
    tx = dsbp_jax.spectral_projection(2, refresh_every=1)
    _, state = jax.jit(tx.update)(params, tx.init(params))
    info = dsbp_jax.diagnostics(state)["kernel"]
    np.testing.assert_allclose(info.captured, 0.7, rtol=1e-5)
    np.testing.assert_allclose(info.tail, 3.0, rtol=1e-5)
    np.testing.assert_allclose(info.drift, 0.0, atol=1e-6)
    # One of two directions is replaced: half of the basis has turned by 90°.
    turned = jnp.diag(jnp.sqrt(jnp.asarray([4.0, 0.1, 3.0, 0.1])))
    _, state = jax.jit(tx.update)({"kernel": turned}, state)
    np.testing.assert_allclose(
        dsbp_jax.diagnostics(state)["kernel"].drift, 0.5, atol=1e-5
    )


def test_tolerance_keeps_the_space_and_not_the_values():
    params = {"kernel": gradients(0)}
    tx = dsbp_jax.spectral_projection(4, tolerance=0.1, refresh_every=1)
    update = jax.jit(tx.update)
    projector = lambda state: (lambda v: np.asarray(v @ v.T))(
        dsbp_jax.bases(state)["kernel"].vectors
    )
    _, state = update(params, tx.init(params))
    assert dsbp_jax.diagnostics(state)["kernel"].captured > 0.5
    _, smaller = update({"kernel": 0.1 * gradients(0)}, state)
    np.testing.assert_allclose(projector(smaller), projector(state), atol=1e-5)
    values = dsbp_jax.bases(state)["kernel"].values
    np.testing.assert_allclose(
        dsbp_jax.bases(smaller)["kernel"].values, 0.01 * values, rtol=1e-2
    )
    _, moved = update({"kernel": gradients(0)[:, ::-1]}, smaller)
    assert np.abs(projector(moved) - projector(smaller)).max() > 0.1


def test_a_dead_task_or_layer_leaves_the_schedule_of_others_alone():
    tx = dsbp_jax.spectral_projection(2, refresh_every=10)
    pair = jnp.stack([gradients(0), jnp.zeros((12, 10))])
    state = jax.vmap(tx.init)({"w": pair})
    update = jax.jit(jax.vmap(tx.update))
    for _ in range(5):
        _, state = update({"w": pair}, state)
    np.testing.assert_array_equal(dsbp_jax.diagnostics(state)["w"].refreshes, [1, 0])
    # The same as layers of one stack; and the second is solved when it wakes.
    update = jax.jit(tx.update)
    state = tx.init({"w": pair})
    for _ in range(3):
        _, state = update({"w": pair}, state)
    np.testing.assert_array_equal(dsbp_jax.diagnostics(state)["w"].refreshes, [1, 0])
    _, state = update({"w": jnp.stack([gradients(1), gradients(2)])}, state)
    info = dsbp_jax.diagnostics(state)["w"]
    np.testing.assert_array_equal(info.refreshes, [1, 1])
    assert info.captured.min() > 0.5


def test_gradient_by_the_state_is_zero_through_the_basis():
    params = {"kernel": gradients(0)}
    tx = dsbp_jax.spectral_projection(2, refresh_every=1)
    state = tx.init(params)

    def total(vectors):
        entry = state.tracked["output"]["kernel"]
        entry = entry._replace(basis=entry.basis._replace(vectors=vectors))
        moved = state._replace(tracked={"output": {"kernel": entry}})
        return jnp.sum(tx.update(params, moved)[0]["kernel"])

    slope = jax.grad(total)(state.tracked["output"]["kernel"].basis.vectors)
    np.testing.assert_array_equal(slope, 0)


def test_vmapped_tasks_share_the_schedule():
    """Under vmap(init) and vmap(update) the refresh stays behind a branch."""
    tx = dsbp_jax.spectral_projection(2, refresh_every=5)
    tasks = {"kernel": jnp.stack([gradients(i) for i in range(3)])}
    state = jax.vmap(tx.init)(tasks)
    update = jax.jit(jax.vmap(tx.update))
    text = update.lower(tasks, state).as_text()
    assert "stablehlo.case" in text
    update_one = jax.jit(tx.update)
    single = [tx.init({"kernel": tasks["kernel"][i]}) for i in range(3)]
    for _ in range(7):
        updates, state = update(tasks, state)
        for i in range(3):
            alone, single[i] = update_one({"kernel": tasks["kernel"][i]}, single[i])
            np.testing.assert_allclose(updates["kernel"][i], alone["kernel"], atol=1e-4)
    np.testing.assert_array_equal(
        dsbp_jax.diagnostics(state)["kernel"].refreshes, [2, 2, 2]
    )


@pytest.mark.slow
def test_differentiable_through_scanned_and_vmapped_updates():
    """The basis is a constant: d update = P d gradient."""
    tx = dsbp_jax.spectral_projection(2)
    start = gradients(0)

    def outer(scale, task):
        def body(carry, _):
            params, state = carry
            updates, state = tx.update({"kernel": scale * params["kernel"]}, state)
            return (optax.apply_updates(params, updates), state), None

        params = {"kernel": start + task}
        (params, _), _ = jax.lax.scan(body, (params, tx.init(params)), length=3)
        return jnp.sum(params["kernel"] ** 2)

    tasks = jnp.arange(3.0)
    total = lambda scale: jnp.sum(jax.vmap(outer, (None, 0))(scale, tasks))
    slope = jax.jit(jax.grad(total))(0.1)
    step = 1e-2
    numeric = (total(0.1 + step) - total(0.1 - step)) / (2 * step)
    np.testing.assert_allclose(slope, numeric, rtol=1e-2)


def test_state_can_be_donated_and_is_not_recompiled():
    traces = []
    params = models.params()
    tx = dsbp_jax.spectral_projection(2)

    def step(updates, state):
        traces.append(1)
        return tx.update(updates, state)

    step = jax.jit(step, donate_argnums=1)
    state = tx.init(params)
    for _ in range(3):
        _, state = step(params, state)
    assert len(traces) == 1


def test_bases_of_states_without_or_with_two_sides():
    params = {"kernel": gradients(0)}
    with pytest.raises(ValueError, match="opt_state must hold the state of a spectral"):
        dsbp_jax.bases(optax.adam(1e-3).init(params))
    state = dsbp_jax.spectral_projection(2, side="both").init(params)
    with pytest.raises(ValueError, match="side must be 'input' or 'output' where both"):
        dsbp_jax.bases(state)
    assert dsbp_jax.bases(state, side="input")["kernel"].vectors.shape == (12, 2)
    with pytest.raises(ValueError, match="side must be one of 'input', 'output'"):
        dsbp_jax.bases(state, side="left")


def test_activations_that_contradict_the_layout_are_an_error():
    """Of a square kernel no shape would tell."""
    model = lambda p, x: x @ p["w"].T
    params, x = {"w": gradients(0, (6, 6))}, gradients(1, (20, 6))
    _, activations = dsbp_jax.capture_activations(model)(params, x)
    wrong = dsbp_jax.Layout({"w": dsbp_jax.MatrixView((0,), (1,))})
    make = functools.partial(dsbp_jax.spectral_projection, 2, source="activation")
    tx = make(layout=wrong)
    with pytest.raises(ValueError, match="layout must say how leaves are used: 'w' is"):
        tx.update(params, tx.init(params), activations=activations)
    with pytest.warns(UserWarning, match="'w' keeps its plain gradient"):
        updates, _ = make().update(params, make().init(params), activations=activations)
    np.testing.assert_array_equal(updates["w"], params["w"])
    right = make(layout=dsbp_jax.layout(model, params, x))
    _, state = right.update(params, right.init(params), activations=activations)
    assert refreshes(state) == {"w": 1}


def test_leaves_that_are_no_layers_stay_and_where_they_cannot_are_named():
    params = {"w": gradients(0), "positions": gradients(1, (9, 7))}
    model = lambda p, x: x @ p["w"]
    _, activations = dsbp_jax.capture_activations(model)(params, gradients(2, (20, 12)))
    tx = dsbp_jax.spectral_projection(2, source="activation")
    updates, _ = jax.jit(tx.update)(params, tx.init(params), activations=activations)
    np.testing.assert_array_equal(updates["positions"], params["positions"])
    inside = dsbp_jax.spectral_subspace(optax.sgd(0.1), 2, source="activation")
    with pytest.raises(ValueError, match="activations has no entry for 'positions'"):
        inside.update(params, inside.init(params), params, activations=activations)


def test_members_of_an_ensemble_captured_under_vmap():
    member = dsbp_jax.capture_activations(lambda p, x: x @ p["w"])
    stack = {"w": jnp.stack([gradients(i) for i in range(3)])}
    _, activations = jax.vmap(member, in_axes=(0, None))(stack, gradients(9, (20, 12)))
    tx = dsbp_jax.spectral_projection(2, source="activation")
    _, state = jax.jit(tx.update)(stack, tx.init(stack), activations=activations)
    np.testing.assert_array_equal(refreshes(state)["w"], [1, 1, 1])


@pytest.mark.x64
@pytest.mark.promotes
@pytest.mark.parametrize("scale", [2e-14, 2e-16, 1.0, 1e14, 1e16])
def test_eigenvalues_of_float64_gradients_do_not_jump(scale):
    with jax.enable_x64(True):
        g = jnp.diag(jnp.array([3.0, 1.0, 0.5])) * scale
        tx = dsbp_jax.spectral_projection(1)
        _, state = jax.jit(tx.update)({"w": g}, tx.init({"w": g}))
        value = float(dsbp_jax.bases(state)["w"].values[0])
        expected = np.clip((3 * scale) ** 2, 1e-30, 1e30)
        np.testing.assert_allclose(value, expected, rtol=1e-4)
