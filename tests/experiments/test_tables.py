"""Tables by name, and the pages that are written from their files."""

import gc
import json
import sys
import time

import pytest

from experiments import claims, cli, headlines, render, tables
from experiments.study import printing
from experiments.study.config import what
from tests.experiments.commands import fails

NAMES = cli.preset_names(cli.TABLES)


@pytest.mark.parametrize("name", NAMES)
def test_every_table_says_its_command_and_has_every_scale(name):
    text = (cli.TABLES / f"{name}.py").read_text(encoding="utf-8")
    assert f"python -m experiments.tables {name}" in text.split('"""')[1]
    cpu, full, smoke = (tables.load(name, scale) for scale in ("cpu", "full", "smoke"))
    assert cpu.contenders == full.contenders
    kinds = [name.partition(":")[0] for name in cpu.contenders]
    assert [name.partition(":")[0] for name in smoke.contenders] == [
        *dict.fromkeys(kinds)
    ]
    assert {*smoke.contenders} <= {*cpu.contenders}
    assert cpu.minutes <= 60
    assert cpu.seeds >= (3 if name in FEW else 5)
    assert cpu.tune or name == "shifted"  # nothing to search
    assert smoke.config.steps <= 6
    assert getattr(smoke.config, "data", None) is None or (
        smoke.config.data.name in ("digits", "sine")
    )


# A run, or the model that it begins with, takes minutes.
FEW = (
    "fewshot",
    "fewshot_whitened",
    "compression_ratios",
    "compression_resnet",
    "text_long",
    "tiny_imagenet",
)

MINE = """
from experiments.config import *
from experiments.study.tables import Table

def table(scale):
    config = ImageConfig(probe=ProbeConfig(0), batch_size=256, epochs=1)
    views = ("evaluations", "time", "loss")
    return Table("Mine", "A claim.", config, ("sgd", "momentum"), views=views)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a table that was made."""
    folder = tmp_path_factory.mktemp("tables")
    (folder / "mine.py").write_text(MINE, encoding="utf-8")
    args = [str(folder / "mine.py"), "--scale", "smoke", "--out", str(folder / "out")]
    tables.main(args)
    return folder, args


def test_a_table_is_a_file_and_a_page(made, capsys):
    folder, args = made
    result = json.loads((folder / "out" / "mine.json").read_text(encoding="utf-8"))
    assert result["scale"] == "smoke"
    assert [c["view"] for c in result["columns"]] == ["evaluations", "time", "loss"]
    assert {"command", "commit", "date", "ran_on", "config", "trials"} <= set(result)
    assert all(len(c["values"]) == 2 for row in result["rows"] for c in row["columns"])
    page = (folder / "out" / "mine.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 1
    # Further processes compute cells only, and here there are none left.
    before = (folder / "out" / "mine.json").stat().st_mtime_ns
    tables.main([*args, "--cells-only"])
    assert (folder / "out" / "mine.json").stat().st_mtime_ns == before
    assert "after" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_jobs_compute_cells(made, tmp_path):
    """Without SLURM submitit runs its jobs on this machine."""
    pytest.importorskip("submitit")
    _, (file, *_) = made
    options = tables.Options((file,), "smoke", tmp_path, slurm=1)
    with tables.workers([file, "--scale", "smoke", "--out", str(tmp_path)], options):
        cells = tmp_path / "cells"
        until = time.monotonic() + 60
        while not any(cells.glob("*[0-9a-f].json")) and time.monotonic() < until:
            time.sleep(0.2)
    assert any(path.stem != "version" for path in cells.glob("*.json"))
    gc.collect()  # submitit leaves a process that was ended to its destructor


def test_jobs_without_submitit_are_refused(made, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "submitit", None)
    _, args = made
    line = fails("tables", [*args, "--slurm", "2"], capsys)
    assert "slurm=2 needs submitit; accepted is 0, or after pip install" in line
    line = fails("tables", [*args, "--slurm", "2", "--slurm-options", "gpu"], capsys)
    assert "slurm_options='gpu'; accepted are words NAME=VALUE" in line
    line = fails("tables", [*args, "--slurm-options", "gpus=1"], capsys)
    assert "slurm_options=gpus=1 are for jobs of SLURM; accepted with slurm" in line


def test_jobs_end_where_a_later_one_cannot_be_submitted(made, monkeypatch):
    """The queue takes one job of two."""
    ended = []

    class Job:
        def cancel(self):
            ended.append(self)

    queue = [Job()]
    monkeypatch.setattr(tables, "submitter", lambda *_: queue.pop)
    options = tables.Options((), "smoke", slurm=2)
    with pytest.raises(IndexError), tables.workers([], options):
        pass
    assert len(ended) == 1


def test_pages_are_what_their_files_give():
    """`python -m experiments.render` mends it."""
    for path, text in render.pages().items():
        assert path.read_text(encoding="utf-8") == text, path


def test_headlines_are_read_from_files(made):
    results = render.load(made[0] / "out") | {
        "speed": {"tables": {"A": [{"w": "us", "ms": 1.0}, {"w": "adam", "ms": 4.0}]}}
    }
    (column, *_), (first, second, *_) = (
        results["mine"]["columns"],
        [row["contender"] for row in results["mine"]["rows"]],
    )
    duel = headlines.Duel("Which", "mine", second, first, column["metric"])
    ratio = headlines.Ratio("Fast", "speed", "A", "us", "adam", "ms")
    text = headlines.markdown((duel, ratio), results)
    entry = results["mine"]["rows"][1]["columns"][0]
    assert printing.number(entry["difference"], entry["digits"], "+") in text
    assert "| us: 1 | adam: 4 | × 0.25 |  | [speed]" in text


def test_headlines_of_the_readme_are_of_what_is_there():
    results = render.load()
    for headline in headlines.HEADLINES:
        what, *_ = headline.row(results)
        assert headline.what in what


def test_results_are_of_the_tables_that_are_declared():
    for name, result in render.load().items():
        if "trials" not in result:
            continue
        table = cli.load_table(result["name"], result["scale"])
        for word in ("title", "claim", "caption", "seeds"):
            assert result[word] == getattr(table, word), (name, word)
        assert result["tuned"] == list(table.tune), name
        assert result.get("margin") == table.margin, name
        # Files of before it could be chosen do not say it.
        assert result.get("trial_length", 1 / 3) == table.trial_length, name
        columns = [(column["view"], column["metric"]) for column in result["columns"]]
        metrics = table.metrics or tuple(dict.fromkeys(m for _, m in columns))
        assert columns == [(v, m) for m in metrics for v in table.views], name
        rows = tuple(row["contender"] for row in result["rows"])
        assert rows == table.contenders, name
        assert result["config"] == what(table.config), name


def contest(ours, theirs, *, higher):
    """A table of two contenders, by their values."""
    column = {"metric": "m", "view": "evaluations", "unit": "%", "higher": higher}
    entry = lambda values: {"contender": "", "columns": [{"values": values}]}
    rows = [entry(ours) | {"contender": "us"}, entry(theirs) | {"contender": "them"}]
    return {"columns": [column], "rows": rows}


def test_claims_are_judged_by_one_rule():
    better, as_good = [1.0, 1.1, 0.9, 1.05], [2.0, 0.2, 1.2, 0.6]
    base = [0.0, 0.0, 0.01, 0.0]
    results = {
        "win": contest(better, base, higher=True),
        "loss": contest(better, base, higher=False),
        "even": contest(as_good, better, higher=True),
    }
    duel = lambda table: headlines.Duel("", table, "us", "them")
    claim = lambda *names: claims.Claim("", tuple(map(duel, names)))
    made = (
        *(claim("win"), claim("win", "loss"), claim("win", "even"), claim("absent")),
        claims.Claim("", verdict="seen", files=("win",)),
    )
    said = [verdict for verdict, _ in claims.verdicts(made, results)]
    assert said == ["holds", "does not hold", "open", "not tested", "seen"]


def test_p_values_of_claims_are_adjusted_for_all_of_them():
    near = contest([1.0, 1.4, 0.5, 1.3], [0.0] * 4, higher=True)  # p is 0.02
    duel = headlines.Duel("", "near", "us", "them")
    one, results = claims.Claim("", (duel,)), {"near": near}
    ((verdict, (p,)),) = claims.verdicts((one,), results)
    assert (verdict, p < 0.05) == ("holds", True)
    for verdict, (five,) in claims.verdicts((one,) * 5, results):
        assert (verdict, five) == ("open", pytest.approx(5 * p))


def test_folds_widen_what_is_said_of_them():
    values = [1.0, 1.4, 0.5, 1.3], [0.0, 0.2, 0.1, 0.0]
    plain = contest(*values, higher=True)
    results = {"plain": plain, "folds": plain | {"overlap": 0.25}}
    duels = [headlines.Duel("", name, "us", "them") for name in results]
    for entry in plain["rows"]:
        entry["columns"][0] |= {"digits": 2, "seconds": [1.0] * 4}
    widths = [duel.change(results)[0].half for duel in duels]
    assert widths[1] == pytest.approx(2**0.5 * widths[0])
    assert [duel.row(results)[1] for duel in duels] != [duels[0].row(results)[1]] * 2
    p_values = [
        claims.verdicts((claims.Claim("", (duel,)),), results)[0][1][0]
        for duel in duels
    ]
    assert p_values[1] > p_values[0]


def test_the_results_page_has_every_file(made):
    results = render.load(made[0] / "out") | {
        "speed": {
            "tables": {"A speed": [{"what": "adam", "ms": 1.23456}]},
            **dict(device="cpu", cores=2, jax="1", date="2026-01-01"),
        },
        "old": {"table": []},
    }
    page = render.results_page(results)
    assert "## Mine" in page
    assert "| adam | 1.235 |" in page
    assert "[old.json](old.json)" in page


def test_a_page_that_differs_is_said(tmp_path, monkeypatch, capsys):
    (tmp_path / "experiments" / "results").mkdir(parents=True)
    (tmp_path / "README.md").write_text("# Title\n", encoding="utf-8")
    pages = render.pages
    monkeypatch.setattr(render, "pages", lambda: pages(tmp_path))
    line = fails("render", ["--check"], capsys, code=1)
    assert "is not what its files give" in line
    render.main([])
    render.main(["--check"])
