"""Marks for parameters of tests."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def quick(values: Iterable[Any], few: Collection[Any]) -> list[Any]:
    """Values of which all but a few are slow."""
    slow = lambda value: pytest.param(value, marks=pytest.mark.slow)
    return [value if value in few else slow(value) for value in values]
