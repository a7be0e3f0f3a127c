"""Checks a whole config against the declarations of its fields, before anything else is done.

A config comes from a config file, from flags, from a program or from a row. `checked` is the one
place that looks at the types and the ranges of its values. What a combination of values needs is
checked by `checks.py`.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from synflow_jax.experiments import expected
from synflow_jax.experiments.config import Config, Grid
from synflow_jax.experiments.expected import Refused, shown

# The fields of a grid, in words and as flags.
_PLURALS = {int: "whole numbers", float: "numbers", str: "words", bool: "True or False"}
_EXAMPLES = {int: "0,1", float: "10,100", str: "\"('snip','grasp')\"", bool: "True,False"}
_ITEMS = {
    int: expected.whole(-(2**63), 2**64),
    float: expected.number(-expected.LARGEST),
    str: expected.text("a word"),
    bool: expected.flag(),
}


# Values


def checked(config: Any) -> Config:
    """Returns a copy of a config whose values have Python's own types, or says what is wrong.

    >>> import numpy as np
    >>> checked(Config(seed=np.int64(3))).seed
    3
    >>> checked(Config(seed=2**32))
    Traceback (most recent call last):
    ValueError: seed=4294967296 must be a whole number of at least 0 and at most 4294967295.

    Raises:
      ValueError: a value has another type or is out of its range, or a key is unknown; names the
        key, the value and what is expected.
    """
    if not isinstance(config, Config):
        raise ValueError(f"config={shown(config)} must be a synflow_jax.experiments.config.Config.")
    found = _checked_part(config, Config, "")
    return typing.cast(Config, found)


def from_values(values: Any) -> Config:
    """Returns the config of the values of a row, checked. Those that are missing have defaults.

    Raises:
      ValueError: as `checked`.
    """
    unchecked = _read_part(values, Config, "")
    return checked(unchecked)


# The parts of a config. Each is named by its key; the config itself by "".


def _checked_part(part: Any, kind: type, key: str) -> Any:
    """Returns the checked copy of a config or of one of its parts, a dataclass `kind`."""
    if not isinstance(part, kind):
        raise ValueError(
            f"{key}={shown(part)} must be a {kind.__name__}: set {key}={kind.__name__}(...) in the "
            "config file, or leave it out."
        )
    own = _own_fields(kind)
    # A misspelled name that a config file sets would otherwise have no effect.
    _check_names(vars(part), own, key)
    found = {}
    for name, field in own.items():
        value = getattr(part, name)
        found[name] = _checked_value(value, field, _joined(key, name))
    return kind(**found)


def _checked_value(value: Any, field: dataclasses.Field[Any], key: str) -> Any:
    """Returns the checked value of a field."""
    part = part_of(field)
    if part is Grid:
        return _checked_grid(value, key)
    if part is not None:
        return _checked_part(value, part, key)
    if key == "grids":
        return _checked_grids(value)
    return read(value, field, key)


def read(value: Any, field: dataclasses.Field[Any], key: str) -> Any:
    """Returns the value of a field that is no part of the config, as Python's own type.

    Raises:
      ValueError: the field declares other values.
    """
    declared = field.metadata["expected"]
    try:
        return declared.read(value)
    except Refused:
        raise ValueError(f"{key}={shown(value)} {declared.otherwise}") from None


def _read_part(values: Any, kind: type, key: str) -> Any:
    """Makes a config or one of its parts, a dataclass `kind`, of a row's values, unchecked."""
    if not isinstance(values, Mapping):
        named = f"{key}={shown(values)}" if key else shown(values)
        raise ValueError(f"{named} must be an object with the values of its keys.")
    own = _own_fields(kind)
    _check_names(values, own, key)
    found = {}
    for name, value in values.items():
        part = part_of(own[name])
        if part is None:
            found[name] = value
        else:
            found[name] = _read_part(value, part, _joined(key, name))
    return kind(**found)


# Grids


def _checked_grids(value: Any) -> tuple[Grid, ...]:
    """Returns the grids of a config, checked."""
    try:
        grids = expected.sequence(value)
        if not all(isinstance(grid, Grid) for grid in grids):
            raise Refused
    except Refused:
        raise ValueError(
            f"grids={shown(value)} must be a tuple of Grid(...), set in the config file."
        ) from None
    return tuple(_checked_grid(grid, f"grids[{i}]") for i, grid in enumerate(grids))


def _checked_grid(grid: Any, key: str) -> Grid:
    """Returns a grid whose values have the types of the fields that they are for."""
    if not isinstance(grid, Grid):
        raise ValueError(f"{key}={shown(grid)} must be a Grid(...).")
    own = _own_fields(Grid)
    _check_names(vars(grid), own, key)
    found = {}
    for name, field in own.items():
        kind, _ = typing.get_args(field.type)  # of tuple[kind, ...]
        values = getattr(grid, name)
        found[name] = _items(values, kind, _joined(key, name))
    return Grid(**found)


def _items(values: Any, kind: type, key: str) -> tuple[Any, ...]:
    """Returns the values of a field of a grid."""
    cure = f"written as --config.{key}={_EXAMPLES[kind]}."
    if key.startswith("grids"):
        cure = "set in the config file."
    try:
        items = expected.sequence(values)
    except Refused:
        wanted = f"must be a tuple of {_PLURALS[kind]}"
        raise ValueError(f"{key}={shown(values)} {wanted}, {cure}") from None
    return tuple(_item(item, kind, key, cure) for item in items)


def _item(value: Any, kind: type, key: str, cure: str) -> Any:
    """Returns a value of a grid as the config's field would hold it: 10 and 10.0 are one run."""
    try:
        # A list of words without quotes arrives as a single word.
        if isinstance(value, str) and "," in value:
            raise Refused
        found = _ITEMS[kind].read(value)
    except Refused:
        wanted = f"Its values must be {_PLURALS[kind]}"
        raise ValueError(f"{key} holds {shown(value)}. {wanted}, {cure}") from None
    return kind(found)


# Keys


def keys() -> dict[str, Any]:
    """Returns the keys of a config and their types. Keys within its parts have a dot."""
    return {key: field.type for key, field in fields().items()}


def fields(kind: type = Config, key: str = "") -> dict[str, dataclasses.Field[Any]]:
    """Returns the fields of a config by their keys, e.g. "prune.compression"."""
    found: dict[str, dataclasses.Field[Any]] = {}
    for name, field in _own_fields(kind).items():
        part = part_of(field)
        inner_key = _joined(key, name)
        if part is None:
            found[inner_key] = field
        else:
            found |= fields(part, inner_key)
    return found


def _own_fields(kind: type) -> dict[str, dataclasses.Field[Any]]:
    """Returns the fields of a dataclass by name."""
    return {field.name: field for field in dataclasses.fields(kind)}


def _joined(key: str, name: str) -> str:
    """Returns the key of a field of the part that has a key."""
    return f"{key}.{name}" if key else name


def part_of(field: dataclasses.Field[Any]) -> type | None:
    """Returns the dataclass of a field that holds a part of the config, or None."""
    is_part = isinstance(field.type, type) and dataclasses.is_dataclass(field.type)
    return typing.cast(type, field.type) if is_part else None


def nearest(unknown: str, known: Iterable[str]) -> str | None:
    """Returns the key that was probably meant, if one is close."""
    is_grid = unknown.startswith("grid.")
    candidates = [key for key in known if key.startswith("grid.") == is_grid]
    # Keys are compared without their part, which may be missing or wrong: "compression" means
    # "prune.compression", and "grid.prune.pruner" means "grid.pruner", as a grid's keys have none.
    by_name: dict[str, str] = {}
    for key in candidates:
        by_name.setdefault(key.rpartition(".")[2], key)
    name = unknown.rpartition(".")[2]
    close = difflib.get_close_matches(name, by_name, n=1, cutoff=0.6)
    if not close:
        return None
    # Some names are those of two keys, e.g. batch_size in prune and train: the part decides.
    same_part = unknown.rpartition(".")[0] + "." + close[0]
    return same_part if same_part in candidates else by_name[close[0]]


def unknown_key(unknown: str, known: Sequence[str], prefix: str = "") -> str:
    """Returns the predicate of a sentence about a key that does not exist.

    Args:
      unknown: the key.
      known: the keys that there are.
      prefix: written before a key that is suggested.
    """
    inner = [key for key in known if key.startswith(f"{unknown}.")]
    if inner:
        return f"is a group of keys: {', '.join(inner)}."
    close = nearest(unknown, known)
    if close:
        return f"is not a key of the config. Did you mean {prefix}{close}?"
    return f"is not a key of the config. The keys are: {', '.join(known)}."


def _check_names(names: Iterable[Any], own: Mapping[str, Any], key: str) -> None:
    """Raises ValueError for a name that is no field of the part that has a key."""
    for name in names:
        if name not in own:
            unknown = _joined(key, str(name))
            predicate = unknown_key(unknown, list(keys()))
            raise ValueError(f"{shown(unknown)[1:-1]} {predicate}")
