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
import jax.numpy as jnp

# A program of a small network takes about 6 MB and 200 memory mappings.
_NUM_PROGRAMS = 16


def bounded_jit(
    function: Callable[..., Any], *, num_programs: int = _NUM_PROGRAMS
) -> Callable[..., Any]:
    """Compiles a function as `jax.jit` does, but keeps only the programs that were used last.

    Positional arguments are trees of arrays, as for `jax.jit`. Keyword arguments are constants of
    the program, and must be hashable. A program is reused for arguments of the same structure,
    shapes and dtypes.

    Args:
      function: pure.
      num_programs: how many programs to keep.

    >>> power = bounded_jit(lambda x, *, exponent: x**exponent)
    >>> power(jnp.array([1.0, 2.0]), exponent=3)
    Array([1., 8.], dtype=float32)
    """
    programs: collections.OrderedDict[Any, Any] = collections.OrderedDict()
    lock = threading.Lock()

    def program_for(structure: Any, leaves: list[Any], options: dict[str, Any]) -> Any:
        types = tuple((jnp.shape(leaf), getattr(leaf, "dtype", type(leaf))) for leaf in leaves)
        key = structure, types, tuple(sorted(options.items()))
        with lock:
            if key not in programs:
                programs[key] = _jitted(function, structure, options)
            programs.move_to_end(key)
            if len(programs) > num_programs:
                _, oldest = programs.popitem(last=False)
                oldest.clear_cache()
            return programs[key]

    @functools.wraps(function)
    def compiled(*args: Any, **options: Any) -> Any:
        leaves, structure = jax.tree.flatten(args)
        return program_for(structure, leaves, options)(*leaves)

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
