"""Fig. 4: the average score of a layer against the inverse of its size, a panel a rule."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from paper.figures import rows as select
from paper.figures.rows import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(rows: Sequence[Row], folder: pathlib.Path) -> Figure:
    """Draws Fig. 4. Scores are those before anything is pruned; averages are of their absolute values.

    Args:
      rows: of one network, one or more for each rule.
      folder: not used.

    Raises:
      ValueError: the rows are of several networks, or lack what is drawn.
    """
    del folder
    import matplotlib

    by_rule = select.by_rule(select.one_network(rows))
    figure, axes = select.panels(len(by_rule), (3.0, 2.7))
    colors = matplotlib.colormaps["viridis"]
    for ax, row in zip(axes, by_rule.values(), strict=False):
        inverse, average = inverse_sizes(row), averages(row)
        slope, offset = fit(inverse, average)
        ends = np.array([inverse.min(), inverse.max()])
        middle = np.exp(
            np.mean(np.log(average))
        )  # of the dots, where the line of slope 1 is put through
        ax.plot(
            ends,
            middle * ends / np.exp(np.mean(np.log(inverse))),
            "--",
            color="black",
            linewidth=1,
            zorder=2.5,
        )
        ax.plot(ends, 10**offset * ends**slope, color=select.RED, linewidth=1.2)
        ax.scatter(inverse, average, c=colors(np.linspace(0, 0.9, len(average))), s=26, zorder=3)
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_title(f"{select.rule_title(row)}\nslope {round(slope, 2) + 0:.2f}", fontsize=9)
        ax.set_xlabel("1 / layer size", fontsize=8)
        ax.set_ylabel("average |score|", fontsize=8)
        low, high = ax.get_ylim()
        if high / low < 100:  # so that a level cloud looks level
            ax.set_ylim(middle / 10, middle * 10)
    spare = axes[len(by_rule)]
    spare.plot([], [], "--", color="black", linewidth=1, label="slope 1")
    spare.plot([], [], color=select.RED, linewidth=1.2, label="fitted slope")
    spare.scatter([], [], color=colors(0.0), s=26, label="first layer")
    spare.scatter([], [], color=colors(0.9), s=26, label="last layer")
    spare.legend(frameon=False, fontsize=8, loc="center")
    figure.suptitle(
        f"Average score of each layer before pruning: {select.title(rows[0])}", fontsize=10
    )
    return figure


def inverse_sizes(row: Row) -> np.ndarray:
    """1 / the size of each layer."""
    return 1 / np.array([layer["size"] for layer in row["layers"]], float)


def averages(row: Row) -> np.ndarray:
    """The average |score| of each layer. Raises ValueError if the row lacks it, or if it is not positive."""
    totals = [layer.get("initial_magnitude") for layer in row["layers"]]
    if any(total is None for total in totals):
        raise ValueError(
            f"row {row['run_id']} lacks initial_magnitude: signed scores have it in runs of one iteration alone "
            "(--config.prune.num_iterations=1), and rows of earlier versions never. Run paper/configs/fig4.py into a new "
            "folder."
        )
    if min(totals) <= 0:
        raise ValueError(
            f"row {row['run_id']} has a layer whose scores are all 0; there is no logarithm of that."
        )
    unit = row["iterations"].get("log2_unit", [0])[0]
    scale = (
        2.0**unit if abs(unit) < 900 else 1.0
    )  # beyond that no float holds them; the slope is the same
    return np.array(totals) * inverse_sizes(row) * scale


def fit(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """(slope, offset) of the line through log10 y over log10 x, by least squares.

    >>> slope, offset = fit(np.array([1.0, 10.0, 100.0]), np.array([3.0, 30.0, 300.0]))
    >>> round(slope, 6), round(offset, 3)
    (1.0, 0.477)
    """
    if len(set(x.tolist())) < 2:
        raise ValueError("all layers have the same size: no slope can be fitted.")
    slope, offset = np.polyfit(np.log10(x), np.log10(y), 1)
    return float(slope), float(offset)
