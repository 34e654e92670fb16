"""The suite's problems: each a function that makes one, hard in a way of its own.

`convex` has linear models, `landscapes` losses with one trap each, `networks` networks
on small data. None needs a download, and a run of each takes seconds.
"""

import functools
from collections.abc import Callable

from experiments import checks
from experiments.problems import convex, landscapes, networks
from experiments.problems.problem import Problem as Problem

PROBLEMS: dict[str, Callable[[], Problem]] = {
    make.__name__: make
    for make in (
        *(convex.ill_conditioned, convex.noisy, convex.rare_classes),
        *(landscapes.saddle, landscapes.plateau, landscapes.unequal_scales),
        *(networks.table, networks.digits, networks.characters, networks.modular_sum),
    )
}


@functools.cache
def make(name: str) -> Problem:
    """The problem of a name, made once.

    Raises:
      ValueError: If there is none.

    Example:
      >>> make("saddle").steps
      1000
    """
    checks.one_of("problem", name, PROBLEMS)
    return PROBLEMS[name]()
