"""Fig. 1: test accuracy against compression, a curve a rule; only SynFlow's reaches the maximal compression.

The paper's is VGG-16 on CIFAR-100 at 10^0 to 10^6, with the critical compression of each rule as an arrow at the axis
and the maximal compression as a dashed line.
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


def panels(rows: Sequence[Row], which: str) -> list[Panel]:
    """The panel of the only network, a curve a rule.

    Raises:
      ValueError: see `accuracy.panels`; the rows are of several networks.
    """
    return [accuracy.one_panel(accuracy.panels(rows, lambda row: row["pruner"], str, which))]


def draw(
    found: Sequence[Panel], which: str, behind: Mapping[Any, Published] | None = None
) -> Figure:
    """Draws Fig. 1 from `panels`, with published curves of the same network behind where there are any."""
    return accuracy.figure_of_one(
        found[0], accuracy.STYLES, "Accuracy against compression", which, behind
    )
