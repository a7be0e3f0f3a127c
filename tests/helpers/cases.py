"""Marks the costly cases of a parametrized test.

The other cases stay in the fast set and still check the law of the test.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import pytest

# For tests that repeat a law, which a smaller test checks in CI, on a large network.
EXHAUSTIVE = (pytest.mark.slow, pytest.mark.exhaustive)


def slow_except(
    fast: Container[Any], cases: Iterable[Any], *, exhaustive: Container[Any] = ()
) -> list[Any]:
    """Returns the cases for `pytest.mark.parametrize`, marked `slow` unless they are in `fast`.

    Those in `exhaustive` are left out of CI. A case of several arguments is a tuple.
    """
    marked = []
    for case in cases:
        values = case if isinstance(case, tuple) else (case,)
        marks: Any = () if case in fast else pytest.mark.slow
        if case in exhaustive:
            marks = EXHAUSTIVE
        marked.append(pytest.param(*values, marks=marks))
    return marked
