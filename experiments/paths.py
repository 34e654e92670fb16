"""Paths as people type them."""

import os
from pathlib import Path


def expand(path: str | Path) -> Path:
    """A path with `~`, `~user` and `$VARIABLE` expanded.

    A shell leaves them in quotes, and `~` wherever it does not begin a word, as in
    `--out=~/runs`.

    Args:
      path: The path as it was typed. Variables that are not set are left as they are.

    Returns:
      The path.

    Raises:
      ValueError: If the path is empty, or there is no such user.

    Example:
      >>> expand("~/runs") == expand("$HOME/runs") == Path.home() / "runs"
      True
    """
    if not str(path):
        raise ValueError("the path is empty; accepted are a folder or a file")
    try:
        return Path(os.path.expandvars(path)).expanduser()
    except RuntimeError:
        raise ValueError(
            f"{str(path)!r}; there is no user of that name: accepted are ~ for the own "
            "home folder, ~USER for another's, or ./~... for a name that begins so"
        ) from None
