"""Parameters, most of which only the slow tests try."""

from collections.abc import Iterable
from typing import Any

import pytest


def all_pairs(first: Iterable[Any], second: Iterable[Any]) -> list[Any]:
    """Return every pair of two lists, and mark as slow those that try no value for the first time."""
    firsts, seconds = list(first), list(second)
    quick = {(i % len(firsts), i % len(seconds)) for i in range(max(len(firsts), len(seconds)))}
    return [
        pytest.param(
            one,
            other,
            id=f"{_name(one)}-{_name(other)}",
            marks=[] if (i, j) in quick else [pytest.mark.slow],
        )
        for i, one in enumerate(firsts)
        for j, other in enumerate(seconds)
    ]


def quick(*values: Any, slow: Iterable[Any]) -> list[Any]:  # noqa: ANN401 - values of a parameter
    """Return the values, and those that are marked as slow."""
    return [*values, *(pytest.param(value, marks=pytest.mark.slow) for value in slow)]


def _name(value: object) -> str:
    return value.__name__ if isinstance(value, type) else str(value)
