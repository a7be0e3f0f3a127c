"""Fig. 7: SynFlow beside iterative pruning algorithms: SNIP and GraSP in many iterations, and IMP in several levels.

Test accuracy against compression. Of SynFlow and IMP the largest number of iterations or levels in the rows is drawn,
of SNIP and GraSP also a single iteration, dashed; random and magnitude pruning are left out.
The paper's own figure was not at hand: what is drawn, and how, is our choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from paper.figures import accuracy
from paper.figures.accuracy import Panel
from paper.figures.published import Published
from paper.figures.rows import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_BOTH = ("snip", "grasp")
_RULES = (*_BOTH, "synflow", "imp")


def panels(rows: Sequence[Row], which: str) -> list[Panel]:
    """The panel of the only network, a curve for each rule and number of iterations.

    Raises:
      ValueError: see `accuracy.panels`; the rows are of several networks; none is of an iterative rule.
    """
    number = lambda row: row["config"]["prune"]["num_iterations"]
    key = lambda row: (row["pruner"], number(row)) if row["compression"] != 1 else None
    found = {
        (row["pruner"], number(row))
        for row in rows
        if row["compression"] != 1 and row["pruner"] in _RULES
    }
    most = {rule: max(number for name, number in found if name == rule) for rule, _ in found}
    shown = {
        (rule, number)
        for rule, number in found
        if number == most[rule] or (rule in _BOTH and number == 1)
    }
    dense = accuracy.first_dense(rows)
    used = [row for row in rows if key(row) in shown or row in dense.values()]
    panel = accuracy.one_panel(accuracy.panels(used, key, _label, which))
    curves = {name: curve for name, curve in panel.curves.items() if name is not None}
    if not curves:
        raise ValueError(
            f"no row above compression 1 is of {', '.join(_RULES)}: see paper/configs/fig7.py."
        )
    return [panel._replace(curves=curves)]


def _label(key: tuple[str, int] | None) -> str:
    if key is None:
        return "unpruned"
    rule, number = key
    return (
        f"{rule}, {number} {'level' if rule == 'imp' else 'iteration'}{'s' if number > 1 else ''}"
    )


def draw(
    found: Sequence[Panel], which: str, behind: Mapping[Any, Published] | None = None
) -> Figure:
    """Draws Fig. 7 from `panels`."""
    del behind
    keys = sorted(found[0].curves, key=lambda key: (list(accuracy.STYLES).index(key[0]), key[1]))
    styles = {
        key: accuracy.STYLES[key[0]]._replace(line="--" if key[1] == 1 and key[0] != "imp" else "-")
        for key in keys
    }
    return accuracy.figure_of_one(found[0], styles, "SynFlow beside iterative pruning", which)
