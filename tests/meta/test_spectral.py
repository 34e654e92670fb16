"""Spectral optimizers in the inner loop: bases of each task, and bases that are given.

Bases are so small that every refresh is a dense solve: what is compared is the use of
the bases, not the convergence.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dsbp_jax
from dsbp_jax import linalg, meta
from tests.meta import models
from tests.meta.models import close, equal, loss_fn, task

RANK, LEAVES = 2, ("body/kernel", "head/kernel")
projection = functools.partial(
    dsbp_jax.spectral_projection, RANK, side="input", num_blocks=3
)
ON_ACTIVATIONS = projection(source="activation", refresh_every=1)


def problem():
    """Both kernels have six inputs, so that one solve serves both."""
    return models.mlp(6, 6, 4), models.decaying(3, 12, 6, 4)


def given_bases():
    """Random ones."""
    return {
        path: models.labelled(
            linalg.EigenBasis(
                jnp.asarray(np.linalg.qr(models.normal(6, RANK, seed=seed))[0]),
                jnp.ones(RANK),
                jnp.ones(()),
            )
        )
        for seed, path in enumerate(LEAVES)
    }


def top(covariance):
    """The leading eigenvectors, constants to a derivative."""
    return jnp.linalg.eigh(jax.lax.stop_gradient(covariance))[1][..., -RANK:]


def project_with(basis_of):
    """A transformation `G ↦ VVᵀG`, V a function of path and G."""

    def project(updates, params):
        project_leaf = lambda path, g: (v := basis_of(path, g)) @ (v.T @ g)
        return dsbp_jax.layers.map_paths(project_leaf, updates)

    return optax.stateless(project)


def value_and_grad(meta_loss, params, tasks):
    return jax.jit(jax.value_and_grad(meta_loss))(params, tasks)


@pytest.mark.parametrize("options", [{"residual": 1.0}, {"rank": 6}], ids=str)
def test_what_projects_nothing_changes_no_bit(options):
    params, tasks = problem()
    tx = dsbp_jax.spectral_projection(**{"rank": RANK, "side": "input", **options})
    spectral = meta.maml(loss_fn, optax.chain(tx, optax.sgd(0.1)), 2)
    plain = meta.maml(loss_fn, optax.sgd(0.1), 2)
    actual = value_and_grad(spectral.meta_loss, params, tasks)
    equal(actual, value_and_grad(plain.meta_loss, params, tasks))


def test_bases_of_a_task_follow_its_gradient():
    params, tasks = problem()
    make = lambda tx: optax.chain(tx, optax.sgd(0.1))
    learner = meta.maml(loss_fn, make(projection(refresh_every=1)), 2)
    reference = make(project_with(lambda path, g: top(g @ g.T)))
    expected = models.unrolled(loss_fn, reference, 2)
    actual = value_and_grad(learner.meta_loss, params, tasks)
    close(actual, value_and_grad(expected, params, tasks), 1e-4, 1e-4)


def test_bases_of_a_task_follow_its_activations():
    params, tasks = problem()
    inner = optax.chain(projection(source="activation"), optax.sgd(1.0))
    learner = meta.maml(loss_fn, inner, 1)
    curve = jax.jit(lambda tasks: learner.curve(params, tasks, lambda p, _: p))
    ends = curve(tasks)

    def by_definition(support):
        x, _ = support
        rows = {LEAVES[0]: x, LEAVES[1]: jnp.tanh(x @ params["body"]["kernel"])}
        inputs = lambda path, g: top(rows[path].T @ rows[path])
        grads = jax.grad(loss_fn)(params, support)
        return project_with(inputs).update(grads, optax.EmptyState(), params)[0]

    steps = jax.jit(jax.vmap(by_definition))(tasks[0])
    close(jax.tree.map(lambda p: p[:, 0] - p[:, 1], ends), steps, 1e-4, 1e-4)


def test_given_bases_are_held_on_to(monkeypatch):
    def not_needed(*args, **kwargs):
        raise AssertionError

    monkeypatch.setattr(linalg, "refresh_with_info", not_needed)
    monkeypatch.setattr(meta.adaptation, "with_activations", not_needed)
    params, tasks = problem()
    bases = given_bases()
    momentum = optax.sgd(0.1, momentum=0.9)
    learner = meta.maml(loss_fn, optax.chain(ON_ACTIVATIONS, momentum), 3)
    reference = project_with(lambda path, g: bases[path].vectors)
    expected = models.unrolled(loss_fn, optax.chain(reference, momentum), 3)
    actual = value_and_grad(
        functools.partial(learner.meta_loss, bases=bases), params, tasks
    )
    close(actual, value_and_grad(expected, params, tasks), 1e-4, 1e-5)


def test_through_given_bases_against_finite_differences():
    with jax.enable_x64(True):
        (params, tasks), bases = problem(), given_bases()
        inner = optax.chain(ON_ACTIVATIONS, optax.sgd(0.1, momentum=0.9))
        meta_loss = meta.maml(loss_fn, inner, 2).meta_loss
        of_params = lambda params: meta_loss(params, tasks, bases=bases)
        # Projections are in float32, so that steps have to be long.
        differences = models.finite_differences(of_params, params, 1e-2)
        close(jax.jit(jax.grad(of_params))(params), differences, 1e-4, 1e-4)


def test_given_bases_are_constants():
    params, tasks = problem()
    inner = optax.chain(ON_ACTIVATIONS, optax.sgd(0.1))
    learner = meta.maml(loss_fn, inner, 1)
    numbers = {path: space.basis for path, space in given_bases().items()}

    def of_bases(numbers):
        bases = {path: models.labelled(basis) for path, basis in numbers.items()}
        return learner.meta_loss(params, tasks, bases=bases)

    for leaf in jax.tree.leaves(jax.jit(jax.grad(of_bases))(numbers)):
        np.testing.assert_array_equal(leaf, 0)


def test_given_bases_that_do_not_fit():
    params, tasks = problem()
    support = task(tasks[0], 0)
    adapt = meta.maml(loss_fn, optax.chain(ON_ACTIVATIONS, optax.sgd(0.1)), 1).adapt
    run = lambda bases: jax.eval_shape(adapt, params, support, bases=bases)
    bases = given_bases()
    basis = bases[LEAVES[0]].basis._replace(vectors=jnp.eye(6, 3))
    wide = {**bases, LEAVES[0]: models.labelled(basis)}
    with pytest.raises(ValueError, match=r"'body/kernel' must have .* shape \(6, 2\)"):
        run(wide)
    with pytest.raises(ValueError, match=f"bases has no entry for '{LEAVES[1]}'"):
        run({LEAVES[0]: bases[LEAVES[0]]})
    plain = meta.maml(loss_fn, optax.sgd(0.1), 1)
    with pytest.raises(ValueError, match="bases must be None with an inner optimizer"):
        plain.meta_loss(params, tasks, bases=bases)
    elsewhere = {f"model/{path}": basis for path, basis in bases.items()}
    with pytest.raises(
        ValueError, match=f"bases has no entry for '{LEAVES[0]}'.*model"
    ):
        adapt(meta.with_rates(params), support, bases=elsewhere)
    with pytest.raises(ValueError, match=r"bases must map paths .* got tuple"):
        adapt(params, support, bases=tuple(bases))
    both = meta.maml(loss_fn, dsbp_jax.spectral_projection(RANK, side="both"), 1)
    with pytest.raises(ValueError, match="must be of the input and the output side, w"):
        both.meta_loss(params, tasks, bases=bases)
    # Without a label nobody knows which side of a square kernel they are of.
    with pytest.raises(ValueError, match=r"side must be .* the kernel is square"):
        run({path: space.basis for path, space in bases.items()})


def test_bases_of_both_sides_of_an_outer_optimizer():
    params, tasks = problem()
    outer = dsbp_jax.track_bases(RANK, side="both", num_blocks=3)
    _, state = jax.jit(outer.update)(params, outer.init(params), params)
    spaces = dsbp_jax.eigenspaces(state)
    inner = dsbp_jax.spectral_projection(RANK, side="both")
    learner = meta.maml(loss_fn, optax.chain(inner, optax.sgd(0.1)), 1)

    def project(updates, params):
        change = lambda path, g: dsbp_jax.tracking.project(g, spaces[path])
        return dsbp_jax.layers.map_paths(change, updates)

    reference = optax.chain(optax.stateless(project), optax.sgd(0.1))
    expected = jax.jit(models.unrolled(loss_fn, reference, 1))(params, tasks)
    actual = jax.jit(learner.meta_loss)(params, tasks, bases=spaces)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


@pytest.mark.parametrize("options", [{"residual": 1.0}, {"rank": 99}])
def test_given_bases_of_a_projection_that_tracks_nothing(options):
    params, tasks = problem()
    tracking_none = dsbp_jax.spectral_projection(**{"rank": RANK, **options})
    learner = meta.maml(loss_fn, optax.chain(tracking_none, optax.sgd(0.1)), 1)
    plain = meta.maml(loss_fn, optax.sgd(0.1), 1)
    held = jax.jit(lambda params: learner.meta_loss(params, tasks, bases={}))
    assert held(params) == jax.jit(lambda p: plain.meta_loss(p, tasks))(params)


@pytest.mark.slow
def test_bases_of_an_outer_optimizer_that_learns_rates():
    params, tasks = problem()
    outer = dsbp_jax.track_bases(RANK, side="input")
    start = meta.with_rates(params)
    _, state = outer.update(start, outer.init(start), start)
    projected = projection(source="gradient", side="input")
    learner = meta.maml(loss_fn, optax.chain(projected, optax.sgd(0.1)), 1)
    bases = dsbp_jax.eigenspaces(state)
    named = {path.removeprefix("params/"): basis for path, basis in bases.items()}
    loss = jax.jit(lambda start, bases: learner.meta_loss(start, tasks, bases=bases))
    assert loss(start, bases) == loss(params, named) == loss(start, named)
    assert loss(start, bases) != jax.jit(learner.meta_loss)(params, tasks)


@pytest.mark.slow
def test_activations_for_an_outer_optimizer_that_learns_rates():
    """Variables as Flax linen has them, whose paths begin like those of a start."""
    plain, tasks = problem()
    variables_loss = lambda variables, batch: loss_fn(variables["params"], batch)
    projected = projection(source="activation")
    learner = meta.maml(variables_loss, optax.chain(projected, optax.sgd(0.1)), 1)
    outer = dsbp_jax.track_bases(RANK, source="activation", side="input")
    losses = []
    for start in ({"params": plain}, meta.with_rates({"params": plain})):

        @jax.jit
        def step(start, state):
            found = learner.activations(start, tasks)
            _, state = outer.update(start, state, start, activations=found)
            bases = dsbp_jax.eigenspaces(state)
            solved = dsbp_jax.activation_bases(found, RANK)
            held = [learner.meta_loss(start, tasks, bases=b) for b in (bases, solved)]
            return held, learner.meta_loss(start, tasks)

        held, of_the_tasks = step(start, outer.init(start))
        np.testing.assert_allclose(held[0], held[1], rtol=1e-4)
        assert abs(held[0] - of_the_tasks) > 1e-3
        losses.append(held[0])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_activations_of_a_loss_with_a_key():
    params, tasks = problem()

    def noisy(params, batch, *, key):
        x, y = batch
        return loss_fn(params, (x + jax.random.normal(key, x.shape), y))

    learner = meta.maml(noisy, optax.sgd(0.1), 1)
    found = lambda seed: learner.activations(params, tasks, key=jax.random.key(seed))
    first, second = (found(seed)[LEAVES[0]].inputs for seed in (0, 1))
    noise = np.asarray(first - second).reshape(len(tasks[0][0]), -1)
    assert len(np.unique(noise.round(4))) == noise.size  # none is shared by tasks
    with pytest.raises(ValueError, match="tasks must be a pair"):
        learner.activations(params, tasks[0][0])


def test_activations_of_all_support_sets():
    params, tasks = problem()
    learner = meta.maml(loss_fn, optax.sgd(0.1), 1)
    found = learner.activations(params, tasks)
    captured = dsbp_jax.capture_activations(loss_fn)
    number = jax.tree.leaves(tasks)[0].shape[0]
    alone = [captured(params, task(tasks[0], index))[1] for index in range(number)]
    for path in LEAVES:
        for side in ("inputs", "outputs"):
            rows = [np.asarray(getattr(one[path], side)) for one in alone]
            close(getattr(found[path], side), np.concatenate(rows), 1e-5, 1e-6)
        assert found[path].count == sum(one[path].count for one in alone)


@pytest.mark.promotes  # optax.adam
def test_bases_of_an_outer_optimizer():
    params, tasks = problem()
    inner = optax.sgd(0.1)
    learner = meta.maml(loss_fn, optax.chain(ON_ACTIVATIONS, inner), 2)
    tracking = dsbp_jax.track_bases(
        RANK, source="activation", side="input", num_blocks=3, refresh_every=5
    )
    outer = optax.chain(tracking, optax.adam(1e-2))
    pooled = jax.tree.map(lambda leaf: leaf.reshape(-1, leaf.shape[-1]), tasks[0])
    captured = dsbp_jax.capture_activations(loss_fn)

    @jax.jit
    def step(params, state):
        bases = dsbp_jax.eigenspaces(state)
        meta_loss = functools.partial(learner.meta_loss, tasks=tasks, bases=bases)
        loss, grads = jax.value_and_grad(meta_loss)(params)
        _, activations = captured(params, pooled)
        updates, state = outer.update(grads, state, params, activations=activations)
        return optax.apply_updates(params, updates), state, loss

    def expected(params, bases):
        """The meta-loss, projected on the bases if there are any."""
        fixed = project_with(lambda path, g: bases[path][0].vectors)
        tx = optax.chain(fixed, inner) if bases else inner
        return jax.jit(models.unrolled(loss_fn, tx, 2))(params, tasks)

    moved, state, first = step(params, outer.init(params))
    close(first, expected(params, None))  # cold bases project nothing
    x = pooled[0]
    vectors = dsbp_jax.bases(state)[LEAVES[0]].vectors
    close(vectors @ vectors.T, (v := top(x.T @ x)) @ v.T, atol=1e-5)
    *_, second = step(moved, state)
    close(second, expected(moved, dsbp_jax.eigenspaces(state)))
    for _ in range(20):
        moved, state, last = step(moved, state)
    assert last < 0.8 * second


@pytest.mark.slow
def test_checkpoint_and_anil_with_bases_of_the_tasks():
    params, tasks = problem()
    inner = optax.chain(projection(refresh_every=2), optax.sgd(0.1, momentum=0.9))
    plain = meta.maml(loss_fn, inner, 3)
    again = meta.maml(loss_fn, inner, 3, checkpoint=True)
    expected = value_and_grad(plain.meta_loss, params, tasks)
    close(value_and_grad(again.meta_loss, params, tasks), expected, 1e-4, 1e-5)

    head = {"head/kernel": given_bases()["head/kernel"]}
    anil = meta.anil(loss_fn, inner, 2, head="head", checkpoint=True)
    reference = project_with(lambda path, g: head[path].vectors)
    split = {"head": optax.chain(reference, optax.sgd(0.1, momentum=0.9))}
    split["body"] = optax.set_to_zero()
    labels = {name: dict.fromkeys(params[name], name) for name in params}
    expected = models.unrolled(loss_fn, optax.partition(split, labels), 2)
    held = functools.partial(anil.meta_loss, bases=head)
    actual = value_and_grad(held, params, tasks)
    close(actual, value_and_grad(expected, params, tasks), 1e-4, 1e-5)


@pytest.mark.parametrize("task_axis", ["vmap", "map"])
def test_refreshes_run_when_they_are_due(task_axis, monkeypatch):
    executed = []
    refresh = linalg.refresh_with_info

    def counted(*args, **kwargs):
        jax.debug.callback(lambda: executed.append(1))
        return refresh(*args, **kwargs)

    monkeypatch.setattr(linalg, "refresh_with_info", counted)
    kernel, tasks = models.normal(6, 4), models.decaying(5, 8, 6, 4)
    linear = lambda w, batch: jnp.mean((batch[0] @ w - batch[1]) ** 2)
    inner = optax.chain(projection(refresh_every=3), optax.sgd(0.01))
    learner = meta.maml(linear, inner, 6, task_axis=task_axis)
    run = jax.jit(jax.value_and_grad(learner.meta_loss))
    jax.block_until_ready(run(kernel, tasks))
    jax.effects_barrier()
    # The cold solve and its proof in step 0, and a warm refresh in step 3.
    assert len(executed) == 3 * (1 if task_axis == "vmap" else 5)


@pytest.mark.parametrize(
    "inner",
    [
        dsbp_jax.spectral_subspace(optax.sgd(0.1), RANK, num_blocks=3),
        dsbp_jax.dsbp(0.05, RANK, num_blocks=3),
    ],
    ids=["subspace", "dsbp"],
)
def test_other_spectral_optimizers_adapt(inner):
    params, (support, _) = problem()
    learner = meta.maml(loss_fn, inner, 6)
    curve = jax.jit(learner.curve)(params, (support, support))
    assert np.all(curve[:, -1] < 0.8 * curve[:, 0])
