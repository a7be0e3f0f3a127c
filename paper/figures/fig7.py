"""Draws Fig. 7: SynFlow and iterative pruning: SNIP and GraSP in many iterations, IMP in levels.

It shows test accuracy against compression. Of SynFlow and IMP the largest number of iterations or
levels in the rows is drawn, of SNIP and GraSP also a single iteration, dashed. Random and magnitude
pruning are left out. We did not have the paper's own figure: the choice is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from paper.figures import accuracy, curves, titles
from paper.figures.curves import Panel
from paper.figures.rows import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Key = tuple[str, int] | None  # a rule and its iterations; None: unpruned

_ALSO_ONCE = ("snip", "grasp")  # rules that are drawn with a single iteration as well
_RULES = (*_ALSO_ONCE, "synflow", "imp")


def panels(rows: Sequence[Row], epoch: str) -> list[Panel]:
    """Returns the panel of the only network, with a curve for each rule and its iterations.

    Raises:
      ValueError: as `curves.panels`, the rows are of several networks, or none is of an iterative
        rule.
    """
    shown = _shown(rows)
    unpruned = curves.unpruned_by_seed(rows)
    used = [row for row in rows if _key(row) in shown or row in unpruned.values()]
    panel = curves.one_panel(curves.panels(used, _key, _label, epoch))
    pruned = {key: curve for key, curve in panel.curves.items() if key is not None}
    if not pruned:
        raise ValueError(
            f"no row above compression 1 is of {', '.join(_RULES)}: see paper/configs/fig7.py."
        )
    return [panel._replace(curves=pruned)]


def _key(row: Row) -> Key:
    if row["compression"] == 1:
        return None
    return row["pruner"], row["config"]["prune"]["num_iterations"]


def _shown(rows: Sequence[Row]) -> set[Key]:
    """Returns the keys of the curves that are drawn."""
    found = {key for row in rows if (key := _key(row)) is not None and key[0] in _RULES}
    most: dict[str, int] = {}
    for rule, number in found:
        most[rule] = max(number, most.get(rule, 0))
    once = {(rule, 1) for rule in _ALSO_ONCE}
    return {key for key in found if key in most.items() or key in once}


def _label(key: Key) -> str:
    if key is None:
        return "unpruned"
    rule, number = key
    noun = "level" if rule == "imp" else "iteration"
    return f"{rule}, {titles.plural(number, noun)}"


def draw(found: Sequence[Panel], epoch: str) -> Figure:
    """Draws Fig. 7 from its panel."""
    order = list(accuracy.STYLES)
    styles = {}
    for rule, number in sorted(found[0].curves, key=lambda key: (order.index(key[0]), key[1])):
        line = "--" if number == 1 and rule != "imp" else "-"
        styles[rule, number] = accuracy.STYLES[rule]._replace(line=line)
    title = "SynFlow beside iterative pruning"
    return accuracy.figure_of_one(found[0], styles, title, epoch)
