"""Few-shot runs from the command line, their report, and comparisons."""

import dataclasses
import functools
import json
import math

import jax
import numpy as np
import optax
import pytest

import dsbp_jax
from dsbp_jax import meta
from dsbp_jax.layers import leaves_by_path
from experiments import cli, compare, tasks, train
from experiments.config import ModelConfig
from experiments.fewshot_config import METHODS, FewshotConfig
from experiments.study import loop, runs
from experiments.study.cells import Spec, Store
from experiments.study.config import to_json
from experiments.tasks.fewshot import FewshotTask
from experiments.tasks.learner import Learner
from tests.experiments import fewshot_sets
from tests.experiments.small_runs import SMALL_FEWSHOT as SMALL, records
from tests.marks import quick


def parsed(*args):
    """The config of a command line."""
    return cli.parse(train.Train, [*SMALL, *args], "p").config


@pytest.fixture(scope="module", autouse=True)
def shared_tasks():
    """Compiled steps are shared by the runs of this file; they hold no state."""
    make, made = train.make_task, {}

    def make_once(config):
        key = repr(config.shared())  # rates are no part of what is compiled
        if key not in made:
            made[key] = make(config)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "make_task", make_once)
        yield


@pytest.mark.parametrize("method", quick(METHODS, ("maml", "spectral_maml")))
def test_every_method_learns_and_reports(method, tmp_path, capsys):
    train.main([*SMALL, "--method", method, "--out", str(tmp_path)])
    folder = tmp_path / f"sine-10shot-{method}-seed0"
    validations, test = records(folder)[:-1], records(folder)[-1]["test"]
    assert [record["step"] for record in validations] == [0, 2, 4]
    steps = 50 if method == "reptile" else 5
    assert len(test["curve"]["loss"]) == steps + 1
    assert test["curve"]["loss"][-1] == pytest.approx(test["loss"])
    assert test["ci95"]["loss"] > 0
    carried = method.startswith("spectral_")
    assert bool(validations[-1]["bases"]) == carried
    report = (folder / "report.html").read_text(encoding="utf-8")
    assert ("Spectra of these bases" in report) == carried
    assert "Adaptation" in report
    assert "squared error" in report
    assert method in capsys.readouterr().out


def test_a_basis_is_refreshed_in_its_period(tmp_path):
    args = ["--method", "spectral_maml", "--out", str(tmp_path)]
    train.main([*SMALL, *args])
    counts = [
        {basis["refreshes"] for basis in record["bases"].values()}
        for record in records(tmp_path / "sine-10shot-spectral_maml-seed0")[:-1]
    ]
    assert counts == [{0}, {1}, {2}]


@pytest.mark.slow
def test_bases_of_each_task(tmp_path):
    args = ["--method", "spectral_fomaml", "--spectral.basis", "task"]
    train.main([*SMALL, *args, "--out", str(tmp_path)])
    folder = tmp_path / "sine-10shot-spectral_fomaml-seed0"
    assert all(not record["bases"] for record in records(folder)[:-1])
    assert math.isfinite(records(folder)[-1]["test"]["loss"])


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.slow
def test_a_resumed_run_ends_the_same(tmp_path, monkeypatch):
    args = [*SMALL, "--method", "spectral_maml"]  # with learned rates, as the preset
    train.main([*args, "--out", str(tmp_path / "whole")])
    log = runs.Run.log

    def kill(self, record):
        if record["step"] == 4:
            raise Killed
        log(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(runs.Run, "log", kill)
        with pytest.raises(Killed):
            train.main([*args, "--out", str(tmp_path / "cut")])
    train.main([*args, "--out", str(tmp_path / "cut"), "--resume"])
    name = "sine-10shot-spectral_maml-seed0"
    without_time = lambda folder: [
        {k: v for k, v in record.items() if k not in ("seconds", "looks")}
        for record in records(folder / name)
    ]
    assert without_time(tmp_path / "cut") == without_time(tmp_path / "whole")


def test_training_stops_after_its_minutes(tmp_path):
    args = ["--minutes", "1e-6", "--out", str(tmp_path)]
    train.main([*SMALL, *args])
    assert records(tmp_path / "sine-10shot-maml-seed0")[-1]["step"] == 1


def test_a_diverged_run_says_at_which_step(tmp_path, capsys):
    args = ["--inner.learning-rate", "1e12", "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as exit_:
        train.main([*SMALL, *args])
    assert exit_.value.code == 1
    message = capsys.readouterr().err
    assert "after step 0; try a lower inner.learning_rate than 1e+12" in message


def test_a_diverged_step_is_named():
    config = parsed()
    task = train.make_task(config)
    state = task.init(config)
    rates = jax.tree.map(lambda rate: rate * np.nan, state.params.rates)
    broken = state._replace(params=state.params._replace(rates=rates))
    with pytest.raises(loop.Diverged, match="the loss is nan at step 1;"):
        loop.train(task, config, broken, first=0, until=2)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["sine", "--method", "mmaml"], "method='mmaml'; accepted are maml, fomaml"),
        (["sine", "--inner.steps", "0"], "inner.steps=0; accepted are values of 1"),
        (["sine", "--outer.task-axis", "0"], "outer.task_axis='0'; accepted are auto"),
        (["omniglott"], "PRESET='omniglott'; accepted are cifar10, cifar_fs"),
        (["omniglot"], "data_dir=None"),
        (["sine", "--spectral.basis", "own"], "spectral.basis='own'; accepted are"),
        (
            ["omniglot", "--method", "reptile", "--ways", "20"],
            "reptile.batch_size=10; accepted are multiples of ways=20",
        ),
    ],
)
def test_bad_input_is_one_line(args, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        train.main([*args, "--out", str(tmp_path)])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["sine", "omniglot", "cifar_fs"])
def test_presets(name):
    assert isinstance(cli.load_preset(name), FewshotConfig)
    text = (cli.PRESETS / f"{name}.py").read_text(encoding="utf-8")
    assert f"python -m experiments.train {name}" in text
    assert "test tasks" in text.split('"""')[1]  # and the figure that it reached


def test_methods_are_compared_in_equal_time(tmp_path):
    args = [*SMALL, "--contenders", "maml", "fomaml:inner.steps=1", "--seeds", "2"]
    args += [
        "--minutes",
        "2e-4",
        "--tune",
        "inner",
        "--most",
        "1",
        "--out",
        str(tmp_path),
    ]
    compare.main(args)
    result = json.loads((tmp_path / "compare-sine" / "table.json").read_text("utf-8"))
    for row in result["rows"]:
        column = row["columns"][0]
        assert len(column["values"]) == 2
        assert set(column["setting"]) == {"inner", "outer"}
    trials = [trial["setting"]["inner"] for trial in result["trials"]["maml"]]
    assert sorted(trials) == pytest.approx([0.0012, 0.003, 0.0075])


def test_whitened_methods_change_the_steps_of_hidden_layers_alone():
    step = {}
    for method in ("maml", "whitened_maml"):
        config = parsed("--method", method, "--inner.no-learned-rates")
        learner = Learner(config, None)
        params = learner.init(0).params
        inner = learner._inner(0.1)
        grads = optax.tree.random_like(jax.random.key(0), params)
        updates, _ = inner.update(grads, inner.init(params), params)
        step[method] = leaves_by_path(updates)
    for path, role in learner._roles.items():
        # The first kernel has one row, and so one direction.
        same = np.allclose(step["maml"][path], step["whitened_maml"][path], 1e-3)
        assert same == (role != "hidden"), path
    with pytest.raises(ValueError, match=r"option of whitened_maml='spectral\.side'"):
        parsed().with_contender("whitened_maml:spectral.side=input")


def test_the_outer_steps_may_be_whitened_but_not_those_of_learned_rates():
    words = ["outer.optimizer=spectral_muon", "inner.learned_rates=False"]
    parse = parsed().with_contender
    one, other = (parse("maml:" + ",".join(own)) for own in (words, words[::-1]))
    assert one == other
    config = dataclasses.replace(one, model=ModelConfig("mlp", {"hidden": (80, 80)}))
    learner = Learner(config, None)
    state, _ = learner.step(learner.init(0), learner.draw(0, 0), 0)
    hidden = {path for path, role in learner._roles.items() if role == "hidden"}
    assert set(dsbp_jax.bases(state.opt_state)) == hidden
    with pytest.raises(ValueError, match="accepted with inner"):
        dataclasses.replace(
            config, inner=dataclasses.replace(config.inner, learned_rates=True)
        )


def test_options_of_a_method():
    config = FewshotConfig().with_contender(
        "spectral_maml:spectral.rank=8,inner.steps=2"
    )
    assert (config.method, config.spectral.rank, config.inner.steps) == (
        "spectral_maml",
        8,
        2,
    )
    assert tasks.read({"task": "FewshotConfig", **to_json(config)}) == config
    with pytest.raises(ValueError, match=r"option of maml='spectral\.rnk'"):
        config.with_contender("maml:spectral.rnk=3")
    with pytest.raises(ValueError, match=r"spectral\.rank=0"):
        config.with_contender("maml:spectral.rank=0")


def test_a_cell_that_fails_on_its_test_tasks_diverged(tmp_path):
    config = parsed("--inner.test-steps", "80", "--inner.learning-rate", "1.0")
    config = dataclasses.replace(config, steps=1)
    (cell,) = Store(tmp_path).run([Spec(config)])
    assert "loss is" in cell.diverged
    assert cell.test == {"loss": 4.25}
    assert Store(tmp_path).run([Spec(config)]) == [cell]


def test_test_tasks_go_with_the_seed(tmp_path, monkeypatch):
    seen = set()
    evaluate = Learner.evaluate

    def note(self, state, **drawn):
        seen.add((drawn["part"], drawn.get("seed", 0)))
        return evaluate(self, state, **drawn)

    monkeypatch.setattr(Learner, "evaluate", note)
    config = parsed("--seed", "3")
    specs = [Spec(config), Spec(config, test=False)]
    Store(tmp_path).run(specs)
    assert seen == {("test", 3), ("validation", 0)}


@pytest.mark.slow
def test_images_end_to_end(tmp_path, capsys):
    """Classification by the network with batch statistics, on bases of its layers."""
    fewshot_sets.Drawings(data_dir=tmp_path).download_and_prepare()
    args = ["omniglot", "--data-dir", str(tmp_path), "--out", str(tmp_path / "runs")]
    args += [*SMALL[1:], "--model.options", "channels=4", "--ways", "3"]
    args += ["--spectral.source", "activation", "--spectral.side", "input"]
    train.main([*args, "--method", "spectral_fomaml", "--inner.steps", "1"])
    folder = tmp_path / "runs" / "omniglot-3way-1shot-spectral_fomaml-seed0"
    *validations, last = records(folder)
    assert 0 <= last["test"]["accuracy"] <= 1
    assert len(last["test"]["curve"]["accuracy"]) == 4
    bases = validations[-1]["bases"]
    assert sorted(bases) == [*(f"convs/{i}/kernel" for i in (1, 2, 3)), "head/kernel"]
    assert "test accuracy" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        train.main([*args, "--ways", "11"])
    assert "ways=11; accepted are 2 to 10, the classes for validation" in (
        capsys.readouterr().err
    )


def test_reptile_trains_on_tasks_of_its_own_and_is_tested_alike():
    config = parsed("--method", "reptile", "--reptile.train-shots", "25")
    learner = FewshotTask(config).learner
    points = lambda episodes: episodes.draw("train", 2, seed=0, step=0)["x"].shape[1]
    assert learner.draw(0, 0)["x"].shape[:2] == (learner.config.tasks, 25) == (5, 25)
    assert points(learner.training_episodes) == 25
    assert points(learner.episodes) == 20


@pytest.mark.slow
def test_tasks_are_split_over_the_devices(monkeypatch):
    # A third column goes by how sums are ordered.
    config = parsed(
        "--method", "spectral_maml", "--outer.tasks", "16", "--spectral.rank", "2"
    )

    def run():
        learner = Learner(config, None)
        state = learner.init(0)
        given = (state, learner.arrays, learner.draw(0, 0), True)
        flops = learner._step.lower(*given).compile().cost_analysis()["flops"]
        for step in range(3):
            state, _ = learner.step(state, learner.draw(0, step), step)
        return flops, state.params, learner.evaluate(state, "test", 16)

    part, *split = run()
    assert jax.local_device_count() == 8
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    whole, *expected = run()
    assert part < 0.3 * whole  # refreshes are done by each
    # Three steps of Adam divide what rounding left by its own size.
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=5e-5)
    jax.tree.map(close, split, expected)


@pytest.mark.parametrize(
    ("method", "build"),
    [
        ("maml", functools.partial(meta.maml, num_steps=2)),
        ("fomaml", functools.partial(meta.maml, num_steps=2, first_order=True)),
        ("anil", functools.partial(meta.anil, num_steps=2, head="head")),
        ("reptile", functools.partial(meta.reptile, num_steps=5, batch_size=10)),
    ],
)
def test_methods_are_what_they_are_called(method, build):
    config = parsed("--method", method, "--inner.no-learned-rates")
    learner = train.make_task(config).learner
    rate = config.inner.learning_rate
    expected = build(learner.loss, optax.sgd(rate))
    params = learner.init(0).params
    tasks = learner.training_episodes.build((), learner.draw(0, 0))
    gradients = [
        jax.jit(jax.grad(one.meta_loss))(params, tasks)
        for one in (learner.method(learner._own.steps, rate), expected)
    ]
    for mine, theirs in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)
