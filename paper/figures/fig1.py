"""Draws Fig. 1: test accuracy against compression, one curve per rule.

Only SynFlow's curve reaches the maximal compression. The paper's figure is VGG-16 on CIFAR-100 at
10^0 to 10^6.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from paper.figures import accuracy, curves
from paper.figures.accuracy import Behind
from paper.figures.curves import Panel
from paper.figures.rows import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def panels(rows: Sequence[Row], epoch: str) -> list[Panel]:
    """Returns the panel of the only network, with one curve per rule.

    Raises:
      ValueError: as `curves.panels`, or the rows are of several networks.
    """
    found = curves.panels(rows, lambda row: row["pruner"], str, epoch)
    return [curves.one_panel(found)]


def draw(found: Sequence[Panel], epoch: str, behind: Behind | None = None) -> Figure:
    """Draws Fig. 1 from its panel, over the published curves of the same network."""
    title = "Accuracy against compression"
    return accuracy.figure_of_one(found[0], accuracy.STYLES, title, epoch, behind)
