"""Finds out how the arrays of a PyTorch state dict fit the variables of a model.

Each check returns the texts of what it found wrong, [] for nothing, so that one message can list
everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import numpy as np

from synflow_jax.storage.arrays import Arrays
from synflow_jax.storage.networks import flat, pytorch_layout, pytorch_names

# PyTorch counts the batches of each batch norm. Our networks have no use for the counter.
COUNTER = "num_batches_tracked"


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

    def wrong_names(self) -> list[str]:
        """Finds variables without an array and arrays without a variable."""
        wanted = set(self.names.values())
        missing = [name for name in self.names.values() if name not in self.state]
        others = [name for name in self.state if name not in wanted]
        unknown = [name for name in others if not name.endswith(COUNTER)]
        return [*_listed("missing", missing), *_listed("unknown", unknown)]

    def not_float(self) -> list[str]:
        """Finds arrays of integers or booleans."""
        wrong = []
        for ours, array in self.found.items():
            # NumPy does not count bfloat16 among the floating point types.
            if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
                wrong.append(self.names[ours])
        return _listed("not floating point", wrong)

    def other_rank(self, expected: flat.Shapes) -> list[str]:
        """Finds arrays with another number of axes than the variable."""
        wrong = []
        for ours, array in self.found.items():
            if array.ndim != len(expected[ours]):
                wrong.append(f"{self.names[ours]} {list(array.shape)}")
        return _listed("of another number of axes", wrong)

    def other_shape(self, expected: flat.Shapes) -> list[str]:
        """Finds arrays of another shape than the variable has in PyTorch."""
        wrong = []
        for ours, array in self.found.items():
            wanted = pytorch_layout.torch_shape(expected[ours])
            if array.shape != wanted:
                shape = list(array.shape)
                wrong.append(f"{self.names[ours]} {shape} in place of {list(wanted)}")
        return _listed("of another shape", wrong)

    def not_finite(self) -> list[str]:
        """Finds arrays with NaN or infinities."""
        wrong = []
        for ours, array in self.found.items():
            if not np.isfinite(array).all():
                wrong.append(self.names[ours])
        return _listed("NaN or infinite", wrong)


def match_state(model: nn.Module, expected: flat.Shapes, state: Arrays) -> Match:
    """Assigns the arrays of a state dict to the variables of a model by their names.

    Args:
      model: a network of this package.
      expected: the shapes of its variables; see `flat.shapes_of`.
      state: arrays by PyTorch's names.
    """
    names = pytorch_names.leaf_names(model, expected)
    found = {ours: state[theirs] for ours, theirs in names.items() if theirs in state}
    return Match(names, state, found)


def refuse(what: str, problems: Sequence[str]) -> None:
    """Raises ValueError if there are problems."""
    if problems:
        raise ValueError(
            f"{what}: {'; '.join(problems)}. Choose the network and the number of classes that the "
            "weights were made for; storage.networks.torch_names lists the names."
        )


def _listed(problem: str, names: Sequence[str], most: int = 6) -> list[str]:
    """Returns [] if there are no names, else one text that lists the first of them."""
    if not names:
        return []
    listed = ", ".join(names[:most])
    if len(names) > most:
        listed += f" and {len(names) - most} more"
    return [f"{problem}: {listed}"]
