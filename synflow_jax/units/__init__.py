"""Units of any model: which axes of which parameters belong together, and trees of arrays without dead units."""

from synflow_jax.units.compaction import compact_tree as compact_tree
from synflow_jax.units.compaction import expand_tree as expand_tree
from synflow_jax.units.compaction import shrink_tree as shrink_tree
from synflow_jax.units.grouping import Axis as Axis
from synflow_jax.units.grouping import Group as Group
from synflow_jax.units.grouping import groups as groups
from synflow_jax.units.grouping import unit_scores as unit_scores
