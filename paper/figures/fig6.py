"""Fig. 6: test accuracy against compression by five rules, a panel for each network and data set.

The paper's has twelve panels (VGG-11, VGG-16, ResNet-18 and a wide ResNet-18; CIFAR-10, CIFAR-100 and Tiny ImageNet) at
10^0 to 10^3, mean, least and largest of three runs.
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
    """A panel for each network and data set, a curve a rule. Raises ValueError: see `accuracy.panels`."""
    return accuracy.panels(rows, lambda row: row["pruner"], str, which)


def draw(
    found: Sequence[Panel], which: str, behind: Mapping[Any, Published] | None = None
) -> Figure:
    """Draws Fig. 6 from `panels`: a row of panels for each data set, published curves behind ours."""
    from matplotlib.figure import Figure

    # Columns are networks, whatever the family's name before the first _ is.
    found = sorted(found, key=lambda panel: panel.model.partition("_")[2])
    datasets = sorted({panel.dataset for panel in found})
    by_dataset = [[panel for panel in found if panel.dataset == dataset] for dataset in datasets]
    num_columns = max(len(row) for row in by_dataset)
    if len(datasets) == 1 and num_columns > 3:
        num_columns = -(-num_columns // 2)
        by_dataset = [found[:num_columns], found[num_columns:]]
    figure = Figure(
        figsize=(2.9 * num_columns + 1.7, 2.6 * len(by_dataset) + 0.5), layout="constrained"
    )
    grid = figure.subplots(len(by_dataset), num_columns, squeeze=False)
    drawn = {}
    for axes, row in zip(grid, by_dataset, strict=True):
        for ax in axes[len(row) :]:
            ax.set_axis_off()
        for ax, panel in zip(axes, row, strict=False):
            there = (behind or {}).get((panel.model, panel.dataset))
            accuracy.draw(ax, panel, accuracy.STYLES, there)
            ax.set_title(accuracy.panel_title(panel, there), fontsize=8)
            drawn[ax] = there is not None
        axes[0].set_ylabel("top-1, %", fontsize=9)
    for column in range(num_columns):
        bottom = [ax for ax in grid[:, column] if ax in drawn][-1]
        bottom.set_xlabel("compression", fontsize=9)
    figure.suptitle(f"Accuracy against compression ({accuracy.ACCURACIES[which]})", fontsize=10)
    accuracy.add_legend(figure, list(drawn), published=any(drawn.values()))
    return figure
