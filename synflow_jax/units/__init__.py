"""Finds the units of any model, and removes dead ones from its parameters.

`groups` says which axes of which parameters are the same neurons or channels. `compact_tree`
removes the units that a mask has left without use. `shrink_tree` and `expand_tree` do the same to
other trees of the network, such as the state of an optimizer, and undo it.
"""

from synflow_jax.units.compaction import compact_tree as compact_tree
from synflow_jax.units.compaction import expand_tree as expand_tree
from synflow_jax.units.compaction import shrink_tree as shrink_tree
from synflow_jax.units.connections import Collapsed as Collapsed
from synflow_jax.units.grouping import Axis as Axis
from synflow_jax.units.grouping import Group as Group
from synflow_jax.units.grouping import groups as groups
from synflow_jax.units.grouping import unit_scores as unit_scores
from synflow_jax.units.tracing import Cause as Cause
from synflow_jax.units.tracing import Reason as Reason
