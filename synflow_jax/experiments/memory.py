"""Keeps memory small: frees unused memory, and caches only the last of several results."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable
from typing import Any, TypeVar, TypeVarTuple

import jax

_Args = TypeVarTuple("_Args")
_Result = TypeVar("_Result")


def free() -> None:
    """Returns the memory that compiling has left unused in glibc's arenas.

    It is a third of the peak of a pruning run. Other C libraries are left alone.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def free_programs() -> None:
    """Drops all compiled programs of this process. Those that are used again are compiled again.

    JAX keeps every program, and each takes memory mappings, of which Linux allows a process 65,530.
    A grid calls this between networks of different shapes, which share no program. No thread may
    use JAX meanwhile.
    """
    jax.clear_caches()
    free()


def check_fits(num_values: int, what: str) -> None:
    """Checks that an array of float32 is not larger than the memory of this machine.

    Raises:
      ValueError: it is; names `what`.
    """
    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not a POSIX system
        return
    num_bytes = 4 * num_values
    if num_bytes > size:
        raise ValueError(
            f"{what} has {num_values} weights: {num_bytes / 1e9:.0f} GB, and this machine has "
            f"{size / 1e9:.0f} GB of memory. Choose a smaller network."
        )


def keep_last(
    make: Callable[[*_Args], _Result], key: Callable[[*_Args], Any]
) -> Callable[[*_Args], _Result]:
    """Wraps a function so that it keeps its last result, for further calls with an equal key.

    One result is enough, since runs that share it follow one another.

    >>> square = keep_last(lambda x: print("computed") or x * x, key=abs)
    >>> square(3), square(-3)
    computed
    (9, 9)

    Args:
      make: makes a result.
      key: of the same arguments; equal for calls that have the same result.
    """
    last: tuple[Any, _Result] | None = None

    def call(*args: *_Args) -> _Result:
        nonlocal last
        wanted = key(*args)
        # Read once: another thread may replace it at any moment.
        found = last
        if found is not None and found[0] == wanted:
            return found[1]
        # Frees the last result before the next one is made: two may not fit into memory.
        found = last = None
        made = make(*args)
        last = wanted, made
        return made

    return call
