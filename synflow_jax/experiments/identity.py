"""Declares which settings of a config are part of a run's identity.

A run is named by the settings that decide on its result. Two configs that prune alike have the same
name, and so find the same files. Each field of a config declares, in its metadata, whether it is
part of the name (`setting`), and `named_values` collects those that are.
"""

import dataclasses
import errno
import functools
import hashlib
import inspect
import os
import stat
from collections.abc import Callable
from typing import Any

import jax

from synflow_jax.experiments.expected import Expected, shown

# Says whether a setting is part of a run's name: identity(value, default, config).
Identity = Callable[[Any, Any, Any], bool]

_DIGEST = "sha256:"

# A seed stands for a network only together with the generator that draws it. The names of runs
# stand for this one, with these settings, which are JAX's defaults. With 64 bits, permutations and
# random integers are other ones.
_GENERATOR = "threefry2x32"
_GENERATOR_SETTINGS = {
    "jax_default_prng_impl": _GENERATOR,
    "jax_threefry_partitionable": True,
    "jax_random_seed_offset": 0,
    "jax_enable_x64": False,
}


def always(value: Any, default: Any, config: Any) -> bool:
    """Returns True: the setting decides on the result of every run."""
    del value, default, config
    return True


def never(value: Any, default: Any, config: Any) -> bool:
    """Returns False: the setting changes no result, for instance where the data is."""
    del value, default, config
    return False


def when_changed(value: Any, default: Any, config: Any) -> bool:
    """Returns True unless the setting has its default.

    Use it for a setting that is added to the config: runs that do not use it keep their names.
    """
    del config
    return bool(value != default)


def setting(
    default: Any,
    values: Expected | None = None,
    *,
    identity: Identity = always,
    named_by: Callable[[Any], Any] | None = None,
) -> Any:
    """Declares a field of a config.

    Args:
      default: the default of the field.
      values: the values that it may have.
      identity: says when the field is part of a run's name.
      named_by: turns the value into the one that stands in the name, e.g. a path into the digest of
        its file.
    """
    metadata = {"identity": identity, "named_by": named_by, "expected": values}
    return dataclasses.field(default=default, metadata=metadata)


def part(kind: type, *, identity: Identity = always) -> Any:
    """Declares a field that holds the dataclass `kind`, with its defaults."""
    metadata = {"identity": identity, "named_by": None}
    return dataclasses.field(default_factory=kind, metadata=metadata)


def named_values(settings: Any, config: Any) -> dict[str, Any]:
    """Returns the settings that are part of a run's name, nested as in the config.

    Args:
      settings: the config, or one of its parts.
      config: the config; whether a setting counts may depend on another one.
    """
    found = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        is_named: Identity = field.metadata["identity"]
        if is_named(value, field.default, config):
            found[field.name] = _named(field, value, config)
    return found


def deciding_values(config: Any) -> dict[str, Any]:
    """Returns, by key (e.g. "prune.pruner"), every setting that can decide on a result.

    Unlike `named_values`, this includes settings that this config does not use.
    """
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        # Such a setting may differ between runs that are compared.
        if field.metadata["identity"] is never:
            continue
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            inner = deciding_values(value)
            found |= {f"{field.name}.{key}": inner_value for key, inner_value in inner.items()}
        else:
            found[field.name] = _named(field, value, config)
    return found


def _named(field: dataclasses.Field[Any], value: Any, config: Any) -> Any:
    """Returns the value as it stands in the name of a run."""
    if dataclasses.is_dataclass(value):
        return named_values(value, config)
    named_by = field.metadata["named_by"]
    return value if named_by is None else named_by(value)


def file_digest(path: str | None) -> str | None:
    """Returns "sha256:..." of the content of a file, or None for None.

    A digest is returned unchanged: the config of a row has it in place of the path.

    Raises:
      ValueError: the file cannot be read.
    """
    if path is None or (path.startswith(_DIGEST) and not os.path.exists(path)):
        return path
    # A file of weights can be large, and a grid asks for its digest once per run.
    try:
        status = os.stat(path)
        # A pipe would be waited for without end.
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is not a file")
        return _file_digest(path, status.st_mtime_ns, status.st_size)
    except OSError as error:
        raise ValueError(
            f"init={shown(path)} cannot be read: {error.strerror}. Name a file of weights, or "
            "leave it out."
        ) from error


@functools.lru_cache(8)
def _file_digest(path: str, mtime_ns: int, size: int) -> str:
    del mtime_ns, size  # part of the cache's key: a file that changed is read again
    with open(path, "rb") as file:
        return _DIGEST + hashlib.file_digest(file, "sha256").hexdigest()


def source_digest(function: Any) -> Any:
    """Returns the name of a function and a hash of its source; other values are unchanged."""
    if not callable(function):
        return function
    # The name alone would not tell an edited function from the one that a run has used.
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):  # the function was not defined in a file
        source = repr(function)
    return f"{function.__name__} {hashlib.sha256(source.encode()).hexdigest()[:8]}"


# The generator of random numbers


def fix_generator() -> list[str]:
    """Makes this process draw by the generator that the names of runs stand for.

    Call it before anything is drawn. Commands do, so that a run is the same network on every
    machine: one that was pruned where JAX_DEFAULT_PRNG_IMPL is "rbg" can be trained elsewhere.

    Returns:
      The settings of JAX that were changed, e.g. "jax_default_prng_impl=rbg".
    """
    changed = []
    for name, value in _GENERATOR_SETTINGS.items():
        found = getattr(jax.config, name)
        if found != value:
            changed.append(f"{name}={found}")
            jax.config.update(name, value)
    return changed


def key(seed: int) -> jax.Array:
    """Returns the key of a seed, of the generator that the names of runs stand for.

    Raises:
      ValueError: a setting of JAX makes keys draw other numbers.
    """
    for name, value in _GENERATOR_SETTINGS.items():
        found = getattr(jax.config, name)
        # The kind of generator is given below, whatever the default is.
        if found != value and name != "jax_default_prng_impl":
            raise ValueError(
                f"{name}={found} makes keys draw other numbers, and so other networks than the "
                f"names of runs stand for. Set it to {value}: jax.config.update({name!r}, "
                f"{value})."
            )
    return jax.random.key(seed, impl=_GENERATOR)
