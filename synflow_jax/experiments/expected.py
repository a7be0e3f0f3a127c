"""Declares which values a setting of a config may have, and how a message says so.

Each field of the config names one of these (see `config.py`). `settings.checked` applies them.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import os
import re
from collections.abc import Callable
from typing import Any

import numpy as np

MOST = 2**31 - 1  # the largest whole number that a program holds
MOST_ITEMS = 10**6
LARGEST = float(np.finfo(np.float32).max)

# How `identity.source_digest` names a function in a row.
_NAMED_FUNCTION = re.compile(r"\S+ [0-9a-f]{8}")


class Refused(Exception):
    """Says that a value is not one of those that are expected."""


@dataclasses.dataclass(frozen=True)
class Expected:
    """The values that a setting may have.

    read: returns the value as Python's own type (of a NumPy number or a list, for instance), or
      raises Refused.
    otherwise: the rest of the sentence about a value that is refused, e.g. "must be ...".
    """

    read: Callable[[Any], Any]
    otherwise: str


def shown(value: Any) -> str:
    """Returns a value for a message: on one line, and not too long.

    >>> shown("x"), len(shown("x" * 1000))
    ("'x'", 80)
    """
    try:
        words = repr(value).split()
    # `repr` is the user's own for a user's own class, and gives up on a list in a list in a list...
    except Exception:
        return f"a {type(value).__name__}"
    text = " ".join(words)
    return text if len(text) <= 80 else f"{text[:77]}..."


# Numbers


def whole(low: int, high: int = MOST, why: str = "") -> Expected:
    """Expects a whole number from low to high."""

    def read(value: Any) -> int:
        # To Python, True is a whole number.
        is_whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        return int(value) if is_whole and low <= value <= high else _refuse()

    otherwise = f"must be a whole number of at least {low} and at most {high}"
    return Expected(read, _sentence(otherwise, why))


def steps() -> Expected:
    """Expects a number of steps, which may be 0."""
    return Expected(whole(0).read, f"must not be negative: a whole number of at most {MOST} steps.")


def number(low: float, high: float = math.inf, *, above: bool = False, why: str = "") -> Expected:
    """Expects a finite number: low <= value < high.

    Args:
      low, high: the range.
      above: the value must not be `low` itself.
      why: what the number means, for the message.
    """

    def read(value: Any) -> float:
        found = _number(value)
        is_low = found > low if above else found >= low
        # Programs compute in float32, where a larger number is infinite.
        return found if is_low and found < high and found <= LARGEST else _refuse()

    if above and low == 0 and high == math.inf:
        otherwise = "must be a number, positive and finite"
    elif high == math.inf:
        otherwise = f"must be a number, finite and at least {low:g}"
    else:
        otherwise = (
            f"must be a number {'above' if above else 'of at least'} {low:g} and below {high:g}"
        )
    return Expected(read, _sentence(otherwise, why))


def _number(value: Any) -> Any:
    """Returns a number: an integer as int, any other as float."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return _refuse()
    # An integer stays one. It is written into the name of a run, where 10 is not 10.0.
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value)


# Words


def one_of(*choices: str | None) -> Expected:
    """Expects one of a few words."""

    def read(value: Any) -> str | None:
        if value is None and None in choices:
            return None
        return _text(value) if isinstance(value, str) and value in choices else _refuse()

    listed = ", ".join(map(str, choices))
    return Expected(read, f"is unknown. Choose one of {listed}.")


def text(what: str) -> Expected:
    """Expects a str."""
    return Expected(_text, f"must be {what}, a str.")


def _text(value: Any) -> str:
    return str.__str__(value) if isinstance(value, str) else _refuse()


def pattern() -> Expected:
    """Expects a regular expression."""

    def read(value: Any) -> str:
        found = _text(value)
        try:
            re.compile(found)
        except (re.error, OverflowError, RecursionError):
            _refuse()
        return str(found)

    return Expected(read, "must be a regular expression, a str.")


def path(what: str) -> Expected:
    """Expects a path: a str or a pathlib.Path, in which ~ stands for the user's home."""

    def read(value: Any) -> str:
        name = os.fspath(value) if isinstance(value, os.PathLike) else value
        if not isinstance(name, str) or not name or "\0" in name:
            _refuse()
        expanded = expand_user(name)
        # There is no such user, and a folder named ~USER is not what was meant.
        return _refuse() if expanded.startswith("~") else expanded

    return Expected(read, f"must be the name of {what}, a str.")


def expand_user(name: str) -> str:
    """Returns a path with the home folder in place of ~ or ~USER, as a shell does it.

    A shell replaces it only at the beginning of a word, and not in --workdir=~/runs.
    """
    return os.path.expanduser(name)


# Other types


def flag() -> Expected:
    """Expects True or False."""

    def read(value: Any) -> bool:
        return bool(value) if isinstance(value, bool | np.bool_) else _refuse()

    return Expected(read, "must be True or False.")


def epochs() -> Expected:
    """Expects numbers of epochs that increase."""

    def read(value: Any) -> tuple[int, ...]:
        found = tuple(epoch(item) for item in sequence(value))
        return found if list(found) == sorted(set(found)) else _refuse()

    epoch = whole(1).read
    return Expected(
        read,
        "must be epoch numbers, from 1, in increasing order: a tuple of whole numbers, e.g. (60, "
        "120), or () for none.",
    )


def function(what: str) -> Expected:
    """Expects a function, which only a config file can set."""

    def read(value: Any) -> Any:
        # A row holds the name of the function.
        is_named = isinstance(value, str) and _NAMED_FUNCTION.fullmatch(value)
        return value if callable(value) or is_named else _refuse()

    return Expected(read, f"must be a function {what}, set in the config file.")


def sequence(value: Any) -> tuple[Any, ...]:
    """Returns the items of a list, a tuple, a range or an array of one axis, or raises Refused."""
    is_array = isinstance(value, np.ndarray) and value.ndim == 1
    if not is_array and not isinstance(value, list | tuple | range):
        _refuse()
    # A range may name more items than fit into memory, or than `len` can say.
    if len(value[MOST_ITEMS : MOST_ITEMS + 1]):
        _refuse()
    return tuple(value.tolist()) if is_array else tuple(value)


def optional(expected: Expected) -> Expected:
    """Expects None, or what `expected` does."""

    def read(value: Any) -> Any:
        return None if value is None else expected.read(value)

    return Expected(read, f"{expected.otherwise[:-1]}, or None.")


def _refuse() -> Any:
    """Raises Refused; an expression, so that it can stand in one."""
    raise Refused


def _sentence(words: str, why: str) -> str:
    return f"{words}: {why}." if why else f"{words}."
