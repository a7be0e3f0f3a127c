"""Fig. 5a: iterative magnitude pruning (IMP) needs many levels of training and pruning not to collapse.

Test accuracy against compression, a curve for each number of levels; the paper's is VGG-19 on CIFAR-10.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from paper.figures import accuracy
from paper.figures.accuracy import Panel, Style
from paper.figures.published import Published
from paper.figures.rows import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARKERS = "osD^vP<>"


def panels(rows: Sequence[Row], which: str) -> list[Panel]:
    """The panel of the only network, a curve for each number of IMP's levels; other rules serve at compression 1.

    Raises:
      ValueError: see `accuracy.panels`; the rows are of several networks; none is IMP's.
    """
    if not any(row["pruner"] == "imp" for row in rows):
        raise ValueError(
            "no row is of pruner 'imp', whose levels the figure compares: see paper/configs/fig5a.py."
        )
    dense = accuracy.first_dense(row for row in rows if row["pruner"] != "imp")
    used = [row for row in rows if row["pruner"] == "imp" or row in dense.values()]
    key = lambda row: row["config"]["prune"]["num_iterations"] if row["pruner"] == "imp" else 0
    panel = accuracy.one_panel(
        accuracy.panels(used, key, lambda n: f"{n} level{'s' if n > 1 else ''}", which)
    )
    return [panel._replace(curves={name: curve for name, curve in panel.curves.items() if name})]


def draw(
    found: Sequence[Panel], which: str, behind: Mapping[Any, Published] | None = None
) -> Figure:
    """Draws Fig. 5a from `panels`."""
    del behind
    import matplotlib

    colors = matplotlib.colormaps["viridis"]
    levels = sorted(found[0].curves)
    places = [i / max(1, len(levels) - 1) * 0.85 for i in range(len(levels))]
    styles = {
        level: Style(colors(place), _MARKERS[i % len(_MARKERS)])
        for i, (level, place) in enumerate(zip(levels, places, strict=True))
    }
    return accuracy.figure_of_one(
        found[0], styles, "Iterative magnitude pruning by number of levels", which
    )
