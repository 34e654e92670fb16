"""Writes pages from files of results: `python -m experiments.render [--check]`.

`experiments/results/README.md` gets every table that lies in its folder. In README.md,
what stands between `<!-- headlines -->` and `<!-- end -->` becomes the table of
`experiments.headlines`, and after `<!-- claims -->` that of `experiments.claims`. No
number is typed by hand; a test fails where pages and files
differ.
"""

import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import claims, cli, headlines
from experiments.study import printing, runs

PROG = "experiments.render"
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments" / "results"

_MARK = re.compile("<!-- (headlines|claims) -->\n.*?<!-- end -->", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Options:
    """Writes experiments/results/README.md and the marked tables of README.md."""

    check: bool = False
    """Write nothing; exit with 1 where a page is not what its files give."""


def load(folder: Path = RESULTS) -> dict[str, Any]:
    """The files of results, by name."""
    return {
        path.stem: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(folder.glob("*.json"))
    }


def benchmark(result: dict[str, Any]) -> str:
    """The tables of `experiments.bench`, as Markdown."""
    parts = []
    for title, rows in result["tables"].items():
        if not rows:
            continue
        shown = lambda x: x if isinstance(x, str) else f"{x:.4g}"
        lines = (map(shown, row.values()) for row in rows)
        parts += [f"{title}\n", *printing.markdown_table(list(rows[0]), lines), ""]
    if "ran_on" in result:
        made = printing.made(result)
    else:  # of an older form
        keys = ("device", "cores", "jax", "date")
        made = ", ".join(f"{key} {result[key]}" for key in keys)
    return "\n".join([*parts, made]) + "\n"


def results_page(results: dict[str, Any]) -> str:
    """`experiments/results/README.md`."""
    parts = [
        "# Results\n",
        "Written by `python -m experiments.render` from the files of this folder.\n",
    ]
    older = []
    for name, result in results.items():
        if "trials" in result:
            title, text = result["title"], printing.markdown(result)
        elif "tables" in result:
            title, text = name, benchmark(result)
        else:
            older.append(name)
            continue
        parts.append(f"## {title}\n\n[{name}.json]({name}.json)\n\n{text}")
    if older:
        links = ", ".join(f"[{name}.json]({name}.json)" for name in older)
        parts.append(f"## Files of an older form\n\n{links}\n")
    return "\n".join(parts)


def marked(text: str, results: dict[str, Any]) -> str:
    """A page with its marked tables written anew."""
    tables = {
        "headlines": lambda: headlines.markdown(headlines.HEADLINES, results),
        "claims": lambda: claims.markdown(claims.CLAIMS, results),
    }

    def written(found: re.Match[str]) -> str:
        return f"<!-- {found[1]} -->\n{tables[found[1]]()}<!-- end -->"

    return _MARK.sub(written, text)


def pages(root: Path = ROOT) -> dict[Path, str]:
    """What each page should be."""
    results = load(root / "experiments" / "results")
    readme = root / "README.md"
    return {
        root / "experiments" / "results" / "README.md": results_page(results),
        readme: marked(readme.read_text(encoding="utf-8"), results),
    }


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command; exits with code 2 on a user's error, 1 on a difference."""
    args = list(sys.argv[1:] if args is None else args)
    with cli.user_errors(PROG):
        options = cli.parse_options(Options, args, PROG)
        for path, text in pages().items():
            old = path.read_text(encoding="utf-8") if path.exists() else ""
            if old == text:
                continue
            if options.check:
                cli.fail(PROG, f"{path.name} is not what its files give", code=1)
            runs.write_atomically(path, text)


if __name__ == "__main__":
    main()
