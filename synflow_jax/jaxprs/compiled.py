"""Compiles functions, and forgets the programs that were not used for long.

`jax.jit` keeps a program for every structure of its arguments. A structure holds the functions
inside of it, such as the `apply_fn` of a rule. So a process that prunes many networks would keep
the programs of all of them, until its memory or the number of its memory mappings is used up.
"""

from __future__ import annotations

import collections
import functools
import threading
from collections.abc import Callable
from typing import Any

import jax

# A program of a small network takes about 6 MB and 200 memory mappings.
_NUM_PROGRAMS = 16


def bounded_jit(
    function: Callable[..., Any], *, num_programs: int = _NUM_PROGRAMS
) -> Callable[..., Any]:
    """Compiles a function as `jax.jit` does, but keeps only the programs that were used last.

    Positional arguments are trees of arrays, as for `jax.jit`. Keyword arguments are constants of
    the program, and must be hashable. A program is reused for arguments of the same structure,
    shapes and dtypes. `bounded_jit(function).trace(*args)` is that of `jax.jit`.

    Args:
      function: pure.
      num_programs: how many programs to keep.

    >>> power = bounded_jit(lambda x, *, exponent: x**exponent)
    >>> power(jax.numpy.array([1.0, 2.0]), exponent=3)
    Array([1., 8.], dtype=float32)
    """
    programs: collections.OrderedDict[Any, Any] = collections.OrderedDict()
    lock = threading.Lock()

    def program_for(structure: Any, leaves: list[Any], options: dict[str, Any]) -> Any:
        types = tuple(map(jax.typeof, leaves))
        key = structure, types, tuple(sorted(options.items()))
        with lock:
            if key not in programs:
                programs[key] = _jitted(function, structure, options)
            programs.move_to_end(key)
            if len(programs) > num_programs:
                _, oldest = programs.popitem(last=False)
                oldest.clear_cache()
            return programs[key]

    def prepared(args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, list[Any]]:
        leaves, structure = jax.tree.flatten(args)
        # NumPy arrays and numbers. The transfer is explicit, as jax_transfer_guard demands.
        leaves = [x if isinstance(x, jax.Array) else jax.device_put(x) for x in leaves]
        return program_for(structure, leaves, options), leaves

    @functools.wraps(function)
    def compiled(*args: Any, **options: Any) -> Any:
        program, leaves = prepared(args, options)
        return program(*leaves)

    def trace(*args: Any, **options: Any) -> Any:
        program, leaves = prepared(args, options)
        return program.trace(*leaves)

    compiled.trace = trace  # type: ignore[attr-defined]
    return compiled


def _jitted(function: Callable[..., Any], structure: Any, options: dict[str, Any]) -> Any:
    """Compiles a function for arguments of one structure, as a function of the leaves.

    JAX remembers the structures of arguments, with the functions inside of them. It forgets what
    belongs to a function that is gone.
    """

    @functools.wraps(function)
    def of_leaves(*leaves: Any) -> Any:
        args = jax.tree.unflatten(structure, leaves)
        return function(*args, **options)

    return jax.jit(of_leaves)
