"""Marks the costly cases of a parametrized test as `slow`.

The other cases stay in the fast set and still check the law of the test.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import pytest


def slow_except(fast: Container[Any], cases: Iterable[Any]) -> list[Any]:
    """Returns the cases for `pytest.mark.parametrize`, marked `slow` unless they are in `fast`.

    A case of several arguments is a tuple.
    """
    marked = []
    for case in cases:
        values = case if isinstance(case, tuple) else (case,)
        marks = () if case in fast else pytest.mark.slow
        marked.append(pytest.param(*values, marks=marks))
    return marked
