"""The suite: problems that are what they say, and who is ahead of whom."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

from experiments import problems, render, suite
from experiments.problems import convex, landscapes, networks
from experiments.study.cells import Spec, Store
from experiments.study.config import what
from experiments.suite_config import SuiteConfig
from experiments.tasks import read
from tests.experiments.commands import MAIN, fails
from tests.marks import quick


def descend(problem, transform, steps, params=None):
    """Parameters after some steps."""
    params = problem.init(jax.random.key(0)) if params is None else params
    state = transform.init(params)

    @jax.jit
    def step(params, state, *batch):
        grads = jax.grad(problem.loss)(params, *batch)
        updates, state = transform.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for number in range(steps):
        params, state = step(params, state, *problem.batch(0, number))
    return params


def measured(problem, params):
    return float(problem.measure(params, *problem.parts["test"]))


def norm(tree):
    return float(optax.tree.norm(tree))


@pytest.mark.parametrize(
    "name", quick(problems.PROBLEMS, {*problems.PROBLEMS} - {"digits", "characters"})
)
def test_the_loss_falls(name):
    problem = problems.make(name)
    start = problem.init(jax.random.key(0))
    end = descend(problem, optax.adam(1e-2), 80 if name == "modular_sum" else 40)
    assert measured(problem, end) < 0.9 * measured(problem, start)
    assert measured(problem, end) < problem.chance


@pytest.mark.parametrize("name", problems.PROBLEMS)
def test_a_seed_chooses_start_and_steps_and_nothing_else(name):
    problem, again = problems.make(name), problems.PROBLEMS[name]()
    starts = [problem.init(jax.random.key(seed)) for seed in (0, 0, 1)]
    same, other = (
        all(map(np.array_equal, *map(jax.tree.leaves, (starts[0], start))))
        for start in starts[1:]
    )
    assert (same, other) == (True, False)
    for part in ("validation", "test"):
        for mine, theirs in zip(problem.parts[part], again.parts[part], strict=True):
            np.testing.assert_array_equal(mine, theirs)
    for mine, theirs in zip(problem.batch(3, 5), again.batch(3, 5), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_the_valley_is_as_steep_as_it_says():
    x, _ = problems.make("ill_conditioned").batch(0, 0)
    values = np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)
    condition = (values[0] / values[-1]) ** 2
    assert condition == pytest.approx(convex.CONDITION, rel=1e-2)


def test_noise_is_all_that_a_step_sees_at_the_best_weights():
    problem = problems.make("noisy")
    root, y = problem.parts["test"]
    best = {"kernel": jnp.linalg.solve(root, y)}
    assert measured(problem, best) < 1e-6
    gradient = jax.jit(jax.grad(problem.loss))
    grads = [
        gradient(best, *problem.batch(0, number))["kernel"] for number in range(200)
    ]
    assert norm(sum(grads) / 200) < 0.1 * np.mean([norm(grad) for grad in grads])
    values = jax.jit(problem.loss)
    losses = [values(best, *problem.batch(0, number)) for number in range(200)]
    assert np.mean(losses) == pytest.approx(convex.NOISE**2, rel=0.05)


def test_most_classes_are_rare():
    problem = problems.make("rare_classes")
    _, labels = problem.parts["test"]
    counts = np.bincount(labels, minlength=convex.CLASSES)
    assert counts[0] > 100 * np.median(counts) / 2
    assert counts[convex.CLASSES // 2 :].sum() < 0.15 * counts.sum()
    zero = {"kernel": jnp.zeros((convex.WIDTH, convex.CLASSES))}
    shares = jnp.log(1 / jnp.arange(1.0, convex.CLASSES + 1))
    prior = measured(problem, zero | {"bias": shares})
    assert prior == pytest.approx(problem.chance, rel=0.02)


def test_zero_is_a_saddle_beside_which_the_net_begins():
    problem = problems.make("saddle")
    _, wanted = problem.batch(0, 0)
    left, _, right = jnp.linalg.svd(wanted)
    start = problem.init(jax.random.key(0))
    zero = jax.tree.map(jnp.zeros_like, start)
    gradient = jax.grad(problem.loss)
    assert norm(gradient(zero, *problem.batch(0, 0))) == 0
    # Along the largest singular vectors the loss falls on one side, and rises on the
    # other.
    last = landscapes.DEPTH - 1
    along = {name: jnp.eye(landscapes.WIDTH) for name in start} | {
        "layer_0": jnp.outer(left[:, 0], left[:, 0]),
        f"layer_{last}": jnp.outer(left[:, 0], right[0]),
    }
    down = jax.tree.map(lambda leaf: 0.5 * leaf, along)
    up = down | {"layer_0": -down["layer_0"]}
    assert measured(problem, down) < measured(problem, zero) < measured(problem, up)
    # Beside it the gradient is small, and grows before it falls.
    path = [descend(problem, optax.adam(3e-3), steps) for steps in (0, 20, 200)]
    first, later, last = (norm(gradient(x, *problem.batch(0, 0))) for x in path)
    assert later > 10 * first > 10 * last


def test_units_that_are_alike_stay_so_on_a_plateau():
    problem = problems.make("plateau")

    def alike(tree):
        columns = tree["units"] / jnp.linalg.norm(tree["units"], axis=0)
        return float((columns.T @ columns).min())

    start = problem.init(jax.random.key(0))
    assert alike(start) > 0.99
    assert alike(jax.grad(problem.loss)(start, *problem.batch(0, 0))) > 0.99
    # Adam makes no difference between them; Muon, which does, goes on.
    stuck = descend(problem, optax.adam(3e-3), 400)
    assert alike(stuck) > 0.9
    assert measured(problem, stuck) > 0.06
    muon = optax.contrib.muon(3e-3, consistent_rms=0.2)
    freed = descend(problem, muon, 400, descend(problem, muon, 400))
    assert alike(freed) < 0.5
    assert measured(problem, freed) < 0.03


def test_layers_of_unequal_scales_are_a_usual_network():
    problem = problems.make("unequal_scales")
    start = problem.init(jax.random.key(0))
    for kernel, scale in zip(start.values(), landscapes.SCALES, strict=True):
        spread = float(kernel.std()) * scale * kernel.shape[0] ** 0.5
        assert spread == pytest.approx(1, rel=0.1)
    grads = jax.grad(problem.loss)(start, *problem.batch(0, 0))
    assert norm(grads["first"]) > 30 * norm(grads["third"])


def test_half_of_the_tables_columns_say_nothing():
    problem = problems.make("table")
    x, y = problem.parts["test"]
    z = (x + 1) / 2
    friedman = 10 * np.sin(np.pi * z[:, 0] * z[:, 1]) + 20 * (z[:, 2] - 0.5) ** 2
    friedman += 10 * z[:, 3] + 5 * z[:, 4]
    assert np.corrcoef(friedman, y[:, 0])[0, 1] > 0.9999
    assert y.std() == pytest.approx(1, abs=0.1)


def test_all_sums_are_judged_and_most_are_seen():
    problem = problems.make("modular_sum")
    pairs = lambda x: set(map(tuple, np.asarray(x).astype(int)))
    seen, whole = pairs(problem.batch(0, 0)[0]), pairs(problem.parts["test"][0])
    assert len(whole) == networks.MODULUS**2
    assert seen < whole
    assert len(seen) == round(networks.SEEN * len(whole))
    x, y = problem.parts["test"]
    one, other = np.split(np.asarray(x), 2, axis=1)
    total = one.argmax(1) + other.argmax(1)
    np.testing.assert_array_equal(total % networks.MODULUS, np.argmax(y, axis=1))


def test_uniform_answers_count_at_chance():
    for name in ("digits", "characters"):
        problem = problems.make(name)
        start = problem.init(jax.random.key(0))
        zero = jax.tree.map(jnp.zeros_like, start)
        assert measured(problem, zero) == pytest.approx(problem.chance, rel=1e-5)


# --- the task -----------------------------------------------------------------------


def test_a_problem_is_a_task_of_the_engine(tmp_path):
    config = SuiteConfig(problem="saddle", steps=20).with_contender("adamw")
    assert read(what(config)) == config
    (cell,) = Store(tmp_path).run([Spec(config)])
    assert cell.steps == 20
    assert len(cell.curve) == 11
    assert cell.test["loss"] == cell.validation["loss"] < 0.99


TEXTS = (
    "dsbp:rank=8,source=activation",
    "soap",
    "adam+coordinates:rank=8",
    "sam",
    "sumo:rank=4",
)


@pytest.mark.slow
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", problems.PROBLEMS)
def test_every_problem_takes_every_kind_of_optimizer(name, text):
    config = SuiteConfig(problem=name, steps=3).with_contender(text)
    task = config.make()
    state = task.init(config)
    for number in range(3):
        state, report = task.step(state, config, number)
    assert np.isfinite(report["loss"])


# --- who is ahead -------------------------------------------------------------------

LOSSES = {
    "one": {"a": [0.1, 0.2], "b": [0.2, 0.4], "c": [0.3, 0.1]},
    "two": {"a": [1.0, 1.0], "b": [2.0, 1.0], "c": [3.0, 5.0]},
    "three": {"a": [0.1, 0.1, 0.5], "b": [0.3, 0.3]},
}


def test_pairs_are_of_one_problem_and_seed():
    found = suite.pairs(LOSSES, "abc")
    assert (found["a", "b"]["wins"], found["a", "b"]["losses"]) == (5, 0)
    assert (found["c", "a"]["wins"], found["c", "a"]["losses"]) == (1, 3)
    for one, other in (("a", "b"), ("a", "c"), ("b", "c")):
        assert found[one, other]["holm"] == found[other, one]["holm"]
        assert found[one, other]["holm"] >= found[one, other]["p"]
    means = [-np.log(2), -np.log(2) / 2, -np.log(3)]
    expected = scipy.stats.wilcoxon(means).pvalue
    assert found["a", "b"]["p"] == pytest.approx(expected)


def test_more_seeds_are_no_more_problems():
    once = {f"p{n}": {"a": [1.0], "b": [1.1 + n]} for n in range(5)}
    often = {p: {name: 9 * x for name, x in by.items()} for p, by in once.items()}
    assert suite.pairs(often, "ab")["a", "b"]["wins"] == 45
    p_values = [suite.pairs(some, "ab")["a", "b"]["p"] for some in (once, often)]
    assert p_values == [0.0625, 0.0625]


def test_ranks_are_of_problems_that_all_have():
    assert suite.ranks(LOSSES, "abc") == {"a": 1.375, "b": 2.125, "c": 2.5}
    assert np.isnan(suite.ranks({"one": {"a": [0.1]}}, "ab")["a"])


def test_losses_that_float32_cannot_tell_apart_are_equal():
    column = lambda x: {"columns": [{"values": [x]}]}
    rows = [column(1e-12) | {"contender": "a"}, column(1e-9) | {"contender": "b"}]
    rows.append({"contender": "c", "columns": [], "failed": "no data"})
    losses = suite.values({"saddle": {"rows": rows}})
    assert set(losses["saddle"]) == {"a", "b"}
    found = suite.pairs(losses, "abc")
    assert (found["a", "b"]["wins"], found["a", "b"]["losses"]) == (0, 0)
    assert found["a", "b"]["holm"] is found["a", "c"]["holm"] is None


def test_a_problem_without_a_result_is_said():
    column = {"mean": 0.5, "low": 0.4, "high": 0.6, "diverged": [], "interior": True}
    column |= {"values": [0.5], "setting": {"rate": 0.1}, "milliseconds": 2.0}
    rows = [
        {"contender": "a", "columns": [column]},
        {"contender": "b", "columns": [], "failed": "no data"},
    ]
    result = {"rows": rows, "seeds": 1, "tuned": [], "budget": {"used": 0.1}}
    losses, wins, rates = suite.summary({"saddle": result}, "ab").values()
    assert losses[0] == {"problem": "saddle", "a": "0.5 ± 0.1", "b": "no result"}
    assert losses[1] == {"problem": "mean rank", "a": "nan", "b": "nan"}
    assert wins[0] == {"ahead of": "a", "a": "", "b": "0 : 0"}
    assert rates == [{"problem": "saddle", "a": "0.1; 2 ms", "b": "no result"}]


# --- the command --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--problems", "sadle"], ["problems='sadle'", "(nearest: saddle)"]),
        (["--problems", "saddle", "saddle"], ["accepted are one or more different"]),
        (["--optimizers", "adm"], ["optimizer='adm'", "(nearest: adam)"]),
        (["--optimizers", "optax.lions"], ["optimizer='optax.lions'"]),
        (["--optimizers", "adam", "adam"], ["one or more different values"]),
        (["--seeds", "0"], ["seeds=0"]),
        (["--tune", "betas"], ["tune='betas'; accepted are rate, decay"]),
        (["--most", "-1"], ["most=-1"]),
        (["--scale", "full"], ["full"]),
    ],
)
def test_a_mistake_is_one_line(args, words, tmp_path, capsys):
    message = fails("suite", [*args, "--out", str(tmp_path / "out")], capsys)
    assert all(word in message for word in words), message
    assert not (tmp_path / "out").exists()


def smoke(folder, *names):
    MAIN["suite"](
        [
            *("--optimizers", "adamw", "optax.lion"),
            *("--scale", "smoke"),
            *("--problems", *names),
            *("--out", str(folder)),
        ]
    )
    return json.loads((folder / "suite.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_the_whole_suite(tmp_path, capsys):
    result = smoke(tmp_path, *problems.PROBLEMS)
    assert {"command", "commit", "date", "ran_on"} <= set(result)
    assert list(result["problems"]) == list(problems.PROBLEMS)
    for found in result["problems"].values():
        for row in found["rows"]:
            assert len(row["columns"][0]["values"]) == 2
    losses, wins, _ = result["tables"].values()
    assert [row["problem"] for row in losses] == [*problems.PROBLEMS, "mean rank"]
    assert list(losses[0]) == ["problem", "adamw", "optax.lion"]
    ours, theirs = wins[0]["optax.lion"], wins[1]["adamw"]
    assert ours.partition(",")[0] == " : ".join(
        reversed(theirs.partition(",")[0].split(" : "))
    )
    page = render.results_page({"suite": result})
    assert "## suite" in page
    assert "| problem | adamw | optax.lion |" in page
    capsys.readouterr()
    again = smoke(tmp_path, *problems.PROBLEMS)
    assert again["tables"] == result["tables"]
    assert ", seed " not in capsys.readouterr().out  # nothing is computed twice
