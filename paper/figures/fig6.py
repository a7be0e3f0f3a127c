"""Draws Fig. 6: test accuracy against compression, a panel for each network and data set.

The paper's figure has twelve panels (VGG-11, VGG-16, ResNet-18 and a wide ResNet-18; CIFAR-10,
CIFAR-100 and Tiny ImageNet) at 10^0 to 10^3, with the mean, lowest and highest of three runs.
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
    """Returns a panel for each network and data set, with one curve per rule.

    Raises:
      ValueError: as `curves.panels`.
    """
    return curves.panels(rows, lambda row: row["pruner"], str, epoch)


def draw(found: Sequence[Panel], epoch: str, behind: Behind | None = None) -> Figure:
    """Draws Fig. 6: a row of panels for each data set, over the published curves."""
    from matplotlib.figure import Figure

    rows = _in_rows(found)
    num_columns = max(len(row) for row in rows)
    figsize = (2.9 * num_columns + 1.7, 2.6 * len(rows) + 0.5)
    figure = Figure(figsize=figsize, layout="constrained")
    grid = figure.subplots(len(rows), num_columns, squeeze=False)

    drawn = []
    any_published = False
    for axes, row in zip(grid, rows, strict=True):
        for ax in axes[len(row) :]:
            ax.set_axis_off()
        for ax, panel in zip(axes, row, strict=False):
            published = accuracy.of_panel(behind, panel)
            accuracy.draw(ax, panel, accuracy.STYLES, published)
            ax.set_title(accuracy.panel_title(panel, published), fontsize=8)
            drawn.append(ax)
            any_published |= published is not None
        axes[0].set_ylabel("top-1, %", fontsize=9)
    # The lowest panel of each column has the label of the axis.
    for column in range(num_columns):
        bottom = [ax for ax in grid[:, column] if ax in drawn][-1]
        bottom.set_xlabel("compression", fontsize=9)
    figure.suptitle(f"Accuracy against compression ({accuracy.LABELS[epoch]})", fontsize=10)
    accuracy.add_legend(figure, drawn, published=any_published)
    return figure


def _in_rows(found: Sequence[Panel]) -> list[list[Panel]]:
    """Returns the panels by row: one row per data set, one column per network."""
    # Sort by the network alone: what is before the first _ is its family, which depends on the
    # data set.
    in_order = sorted(found, key=lambda panel: panel.model.partition("_")[2])
    datasets = sorted({panel.dataset for panel in found})
    rows = [[panel for panel in in_order if panel.dataset == dataset] for dataset in datasets]
    if len(rows) == 1 and len(in_order) > 3:
        # Many networks on one data set fit better in two rows.
        half = -(-len(in_order) // 2)
        return [in_order[:half], in_order[half:]]
    return rows
