"""Draws Fig. 5a: iterative magnitude pruning (IMP) needs many levels to avoid collapse.

It shows test accuracy against compression, one curve per number of levels. The paper's figure is
VGG-19 on CIFAR-10.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from paper.figures import accuracy, curves, titles
from paper.figures.accuracy import Style
from paper.figures.curves import Panel
from paper.figures.rows import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARKERS = "osD^vP<>"
_UNPRUNED = 0  # the key of the runs that another rule left unpruned


def panels(rows: Sequence[Row], epoch: str) -> list[Panel]:
    """Returns the panel of the only network, with one curve per number of levels.

    Rows of other rules serve at compression 1.

    Raises:
      ValueError: as `curves.panels`, the rows are of several networks, or none is of IMP.
    """
    imp = [row for row in rows if row["pruner"] == "imp"]
    if not imp:
        raise ValueError(
            "no row is of pruner 'imp', whose levels the figure compares: see "
            "paper/configs/fig5a.py."
        )
    unpruned = curves.unpruned_by_seed(row for row in rows if row["pruner"] != "imp")
    used = [row for row in rows if row["pruner"] == "imp" or row in unpruned.values()]
    found = curves.panels(used, _num_levels, lambda number: titles.plural(number, "level"), epoch)
    panel = curves.one_panel(found)
    by_level = {key: curve for key, curve in panel.curves.items() if key != _UNPRUNED}
    return [panel._replace(curves=by_level)]


def _num_levels(row: Row) -> int:
    if row["pruner"] != "imp":
        return _UNPRUNED
    return int(row["config"]["prune"]["num_iterations"])


def draw(found: Sequence[Panel], epoch: str) -> Figure:
    """Draws Fig. 5a from its panel."""
    import matplotlib

    colors = matplotlib.colormaps["viridis"]
    levels = sorted(found[0].curves)
    styles = {}
    for i, level in enumerate(levels):
        shade = i / max(1, len(levels) - 1) * 0.85
        styles[level] = Style(colors(shade), _MARKERS[i % len(_MARKERS)])
    title = "Iterative magnitude pruning by number of levels"
    return accuracy.figure_of_one(found[0], styles, title, epoch)
