"""Draws Fig. 4: the average score of each layer against the inverse of its size.

There is one panel per rule. A rule that conserves saliency has the same total score in every layer,
so that the average is inversely proportional to the size: slope 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from paper.figures import layout, titles
from paper.figures import rows as select
from paper.figures.rows import Row
from synflow_jax.experiments.pictures import RED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw(rows: Sequence[Row]) -> Figure:
    """Draws Fig. 4 from the scores before pruning. Averages are of absolute values.

    Args:
      rows: the pruning rows of one network.

    Raises:
      ValueError: the rows are of several networks, or do not hold the scores before pruning.
    """
    rows = select.one_network(rows)
    by_rule = select.of_lowest_compression(rows)
    figure, axes = layout.panels(len(by_rule), (3.0, 2.7))
    for ax, row in zip(axes, by_rule.values(), strict=False):
        _draw_panel(ax, row)
    _add_legend(axes[len(by_rule)])
    title = f"Average score of each layer before pruning: {titles.of_run(rows[0])}"
    figure.suptitle(title, fontsize=10)
    return figure


def _draw_panel(ax: Axes, row: Row) -> None:
    import matplotlib

    inverse, average = inverse_sizes(row), averages(row)
    slope, offset = fit(inverse, average)
    ends = np.array([inverse.min(), inverse.max()])
    # The line of slope 1 goes through the geometric middle of the dots.
    middle = np.exp(np.mean(np.log(average)))
    proportional = middle * ends / np.exp(np.mean(np.log(inverse)))
    ax.plot(ends, proportional, "--", color="black", linewidth=1, zorder=2.5)
    ax.plot(ends, 10**offset * ends**slope, color=RED, linewidth=1.2)
    colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(average)))
    ax.scatter(inverse, average, c=colors, s=26, zorder=3)
    layout.logarithmic(ax)
    # Adding 0 turns -0.0 into 0.0.
    ax.set_title(f"{titles.of_rule(row)}\nslope {round(slope, 2) + 0:.2f}", fontsize=9)
    ax.set_xlabel("1 / layer size", fontsize=8)
    ax.set_ylabel("average |score|", fontsize=8)
    low, high = ax.get_ylim()
    if high / low < 100:  # so that equal averages look equal
        ax.set_ylim(middle / 10, middle * 10)


def _add_legend(spare: Axes) -> None:
    import matplotlib

    colors = matplotlib.colormaps["viridis"]
    spare.plot([], [], "--", color="black", linewidth=1, label="slope 1")
    spare.plot([], [], color=RED, linewidth=1.2, label="fitted slope")
    spare.scatter([], [], color=colors(0.0), s=26, label="first layer")
    spare.scatter([], [], color=colors(0.9), s=26, label="last layer")
    spare.legend(frameon=False, fontsize=8, loc="center")


def inverse_sizes(row: Row) -> np.ndarray:
    """Returns 1 / size of each layer."""
    return 1 / np.array([layer["size"] for layer in row["layers"]], float)


def averages(row: Row) -> np.ndarray:
    """Returns the average |score| of each layer.

    Raises:
      ValueError: the row does not hold the scores before pruning, or those of a layer are all 0.
    """
    totals = [layer.get("initial_magnitude") for layer in row["layers"]]
    if any(total is None for total in totals):
        raise ValueError(
            f"row {row['run_id']} lacks initial_magnitude: runs with signed scores record it only "
            "in one iteration (--config.prune.num_iterations=1), and earlier versions never did. "
            "Run paper/configs/fig4.py into a new folder."
        )
    if min(totals) <= 0:
        raise ValueError(
            f"row {row['run_id']} has a layer whose scores are all 0, which has no logarithm."
        )
    # Scores are in units of 2^log2_unit. Where no float holds that, leave it out: the slope is the
    # same.
    unit = row["iterations"].get("log2_unit", [0])[0]
    scale = 2.0**unit if abs(unit) < 900 else 1.0
    return np.array(totals) * inverse_sizes(row) * scale


def fit(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Fits a line to log10 y over log10 x by least squares, and returns (slope, offset).

    >>> slope, offset = fit(np.array([1.0, 10.0, 100.0]), np.array([3.0, 30.0, 300.0]))
    >>> round(slope, 6), round(offset, 3)
    (1.0, 0.477)

    Raises:
      ValueError: all x are the same.
    """
    if len(set(x.tolist())) < 2:
        raise ValueError("all layers have the same size: no slope can be fitted.")
    slope, offset = np.polyfit(np.log10(x), np.log10(y), 1)
    return float(slope), float(offset)
