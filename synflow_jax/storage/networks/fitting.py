"""Checks how the arrays of a PyTorch state dict fit the variables of a model.

Each check returns a list of problems, as text. The list is empty if there are none. One message can
therefore name everything that is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from synflow_jax.storage.arrays import Arrays
from synflow_jax.storage.networks import flat, pytorch_layout

# PyTorch counts the batches that each batch norm has seen, and the models that were averaged. Our
# networks do not need the counters.
COUNTER = "num_batches_tracked"
_COUNTERS = (COUNTER, "n_averaged")


class Match(NamedTuple):
    """The arrays of a state dict, assigned to the variables of a model.

    Attributes:
      names: PyTorch's name of each variable of the model, by ours.
      state: all arrays, by PyTorch's name.
      found: the arrays that are variables of the model, by our name.
    """

    names: dict[str, str]
    state: Arrays
    found: Arrays


def match_state(names: dict[str, str], state: Arrays) -> Match:
    """Assigns the arrays of a state dict to the variables of a model by their names.

    Args:
      names: PyTorch's name of each variable of the model; see `pytorch_names.leaf_names`.
      state: arrays by PyTorch's names.
    """
    found = {}
    for ours, theirs in names.items():
        if theirs in state:
            found[ours] = state[theirs]
    return Match(names, state, found)


def wrong_names(match: Match) -> list[str]:
    """Finds variables without an array and arrays without a variable."""
    wanted = dict.fromkeys(match.names.values())  # a set that keeps the order of the layers
    missing = [name for name in wanted if name not in match.state]
    unknown = []
    for name in match.state:
        if name not in wanted and not name.endswith(_COUNTERS):
            unknown.append(name)
    return [
        *_listed("missing", missing),
        *_listed("unknown", unknown),
        *_prefixed(missing, unknown),
    ]


def _prefixed(missing: Sequence[str], unknown: Sequence[str]) -> list[str]:
    """Says that missing names are there with a prefix, as those of a module in another one are."""
    # The first one tells: a prefix is before all names of a module.
    for name in missing[:1]:
        for other in unknown:
            prefix = other.removesuffix(f".{name}")
            if prefix != other:
                return [f"names have the prefix '{prefix}.': pass those entries alone, without it"]
    return []


def not_float(match: Match) -> list[str]:
    """Finds arrays of integers or booleans."""
    wrong = []
    for ours, array in match.found.items():
        # NumPy does not count bfloat16 among the floating point types.
        is_float = array.dtype.kind == "f" or array.dtype.name == "bfloat16"
        if not is_float:
            wrong.append(match.names[ours])
    return _listed("not floating point", wrong)


def other_rank(match: Match, expected: flat.Shapes) -> list[str]:
    """Finds arrays with another number of axes than the variable."""
    wrong = []
    for ours, array in match.found.items():
        if array.ndim != len(expected[ours]):
            theirs = match.names[ours]
            shape = list(array.shape)
            wrong.append(f"{theirs} {shape}")
    return _listed("of another number of axes", wrong)


def other_shape(match: Match, expected: flat.Shapes) -> list[str]:
    """Finds arrays of another shape than the variable has in PyTorch."""
    wrong = []
    for ours, array in match.found.items():
        wanted = pytorch_layout.torch_shape(expected[ours])
        if array.shape != wanted:
            theirs = match.names[ours]
            shape = list(array.shape)
            wrong.append(f"{theirs} {shape} in place of {list(wanted)}")
    return _listed("of another shape", wrong)


def not_finite(match: Match) -> list[str]:
    """Finds arrays with NaN or infinities."""
    wrong = []
    for ours, array in match.found.items():
        # As they will be used: larger numbers of float64 are infinite in float32.
        with np.errstate(over="ignore"):
            single = np.asarray(array, np.float32)
        # Loaded weights are trusted from here on: a NaN would show up only as a bad score later.
        if not np.isfinite(single).all():
            wrong.append(match.names[ours])
    return _listed("NaN or infinite", wrong)


def refuse(what: str, problems: Sequence[str]) -> None:
    """Raises ValueError if there are problems."""
    if problems:
        listed = "; ".join(problems)
        raise ValueError(
            f"{what}: {listed}. Choose the network and the number of classes that the "
            "weights were made for; storage.networks.torch_names lists the names."
        )


def _listed(problem: str, names: Sequence[str], most: int = 6) -> list[str]:
    """Returns [] if there are no names, else one text that lists the first of them."""
    if not names:
        return []
    listed = ", ".join(names[:most])
    num_more = len(names) - most
    if num_more > 0:
        listed += f" and {num_more} more"
    return [f"{problem}: {listed}"]
