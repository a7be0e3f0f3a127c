"""Checks values that were read from JSON against a schema, and names the first that does not fit.

A schema says which type each key has:

    TEXT                        a value of this kind
    [NATURAL]                   a list of such values
    [NATURAL, ...]              a list of at least one such value
    {"kept": NATURAL}           an object; it may have other keys
    Nullable(NUMBER)            null, or such a value

Files of earlier versions lack some keys. So each reader names the keys that it needs, and no others
are checked. A name that may be missing has a "?": in "size?.full" there may be no size, but a size
must be full.

>>> schema = {"layers": [{"name": TEXT, "kept": NATURAL, "score": Nullable(NUMBER)}]}
>>> row = {"layers": [{"name": "fc1", "kept": "3"}]}
>>> problem(row, schema, ["layers.name", "layers.score?"])
>>> problem(row, schema, ["layers.kept"])
"layers[0].kept='3' is not a whole number from 0"
>>> problem(row, schema, ["layers.score"])
'layers[0].score is missing'
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

# Larger counts are damage. Smaller ones fit into an int64.
_LARGEST = 2**63 - 1
_MOST_SHOWN = 60


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of value: its name in words, and a function that tells whether a value is of it."""

    words: str
    accepts: Callable[[Any], bool]


@dataclasses.dataclass(frozen=True)
class Nullable:
    """A value that may be null, which stands for NaN, for infinity or for none."""

    schema: Schema


Schema = Kind | Nullable | list[Any] | dict[str, Any]


def _between(words: str, lowest: float, highest: float, types: Any = int) -> Kind:
    """Returns the kind of a number of one of these types, within these bounds."""

    def accepts(value: Any) -> bool:
        # To Python, True is a whole number.
        if isinstance(value, bool) or not isinstance(value, types):
            return False
        # NaN is not between any two numbers.
        return lowest <= value <= highest

    return Kind(words, accepts)


_MAX = sys.float_info.max
_REAL = int | float
TEXT = Kind("text", lambda value: isinstance(value, str))
TRUTH = Kind("true or false", lambda value: isinstance(value, bool))
INTEGER = _between("a whole number", -_LARGEST, _LARGEST)
NATURAL = _between("a whole number from 0", 0, _LARGEST)
POSITIVE = _between("a whole number from 1", 1, _LARGEST)
NUMBER = _between("a finite number", -_MAX, _MAX, _REAL)
AT_LEAST_1 = _between("a finite number from 1", 1, _MAX, _REAL)
FRACTION = _between("a number from 0 to 1", 0, 1, _REAL)


def one_of(words: str, values: Iterable[str]) -> Kind:
    """Returns the kind of a text that is one of these values. words: what they are, e.g. "a rule".

    >>> problem({"pruner": "snop"}, {"pruner": one_of("a rule", ["snip"])}, ["pruner"])
    "pruner='snop' is not a rule (snip)"
    """
    known = tuple(values)
    listed = ", ".join(known)

    def accepts(value: Any) -> bool:
        return isinstance(value, str) and value in known

    return Kind(f"{words} ({listed})", accepts)


def read_object(path: pathlib.Path) -> dict[str, Any]:
    """Reads a file that holds one JSON object.

    Raises:
      ValueError: the file is missing, is no regular file or holds something else; names it.
    """
    # Reading a named pipe or a device would never end.
    if not path.is_file():
        kind = "not a file" if path.exists() else "missing"
        raise ValueError(f"{str(path)!r} is {kind}")
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{str(path)!r} cannot be read: {_not('it', value, 'an object')}")
    return value


def check(
    value: Any, schema: Schema, keys: Iterable[str], where: Callable[[], str], cure: str
) -> None:
    """Checks the keys that a reader needs.

    Args:
      value: as `json.loads` returns it.
      schema: of the value.
      keys: those that the reader needs, e.g. "layers.kept".
      where: returns the file and line, for the message.
      cure: what to do about it, for the message.

    Raises:
      ValueError: one is missing or of another kind; names the place, the key and the value.
    """
    found = problem(value, schema, keys)
    if found is not None:
        raise ValueError(f"{where()}: {found}. {cure}")


def problem(value: Any, schema: Schema, keys: Iterable[str]) -> str | None:
    """Says in words why a value does not fit a schema; None if it does. See `check`."""
    for key in keys:
        found = _follow(value, schema, key.split("."), "")
        if found is not None:
            return found
    return None


def _follow(value: Any, schema: Schema, names: Sequence[str], place: str) -> str | None:
    """Follows the names of a key to the values at its end. place: the key so far: "layers[0]"."""
    match schema:
        case Nullable(inner):
            if value is None:
                return None
            return _follow(value, inner, names, place)
        case Kind(words, accepts):
            assert not names, f"the schema has nothing below {place}"
            if accepts(value):
                return None
            return _not(place, value, words)
        case [inner, *rest]:
            if not isinstance(value, list):
                return _not(place, value, "a list")
            # With an ellipsis, at least one is needed.
            if rest and not value:
                return f"{place} is empty"
            items = (_follow(item, inner, names, f"{place}[{i}]") for i, item in enumerate(value))
            return next(filter(None, items), None)
        case dict():
            return _follow_into_object(value, schema, names, place)
    raise TypeError(f"{schema!r} is not a schema")


def _follow_into_object(
    value: Any, schema: Mapping[str, Any], names: Sequence[str], place: str
) -> str | None:
    if not isinstance(value, dict):
        return _not(place or "it", value, "an object")
    if not names:
        return None
    first, *others = names
    name = first.removesuffix("?")
    inner_place = f"{place}.{name}" if place else name
    if name in value:
        return _follow(value[name], schema[name], others, inner_place)
    return None if first.endswith("?") else f"{inner_place} is missing"


def _not(place: str, value: Any, words: str) -> str:
    """Returns the message for a value of another kind."""
    shown = repr(value)
    if len(shown) > _MOST_SHOWN:
        shown = f"{shown[:_MOST_SHOWN]}..."
    return f"{place}={shown} is not {words}"
