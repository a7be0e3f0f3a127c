"""Draws Fig. 5b: the average squared weight of each layer against the inverse of its size.

Training makes the average squared magnitude of a layer, the score of magnitude pruning, inversely
proportional to its size. A conserved score looks like that (Fig. 4), and it is why iterative
magnitude pruning avoids the collapse of magnitude pruning. The paper's figure is VGG-19 on
CIFAR-10.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from paper.figures import curves, fig4, layout, titles
from paper.figures import rows as select
from paper.figures.rows import Row
from synflow_jax.experiments.pictures import BLUE, RED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The key in a row, its words, and the look of its dots.
_STAGES = (
    ("initial", "before training", BLUE, "o"),
    ("final", "after training", RED, "s"),
)


def draw(rows: Sequence[Row]) -> Figure:
    """Draws Fig. 5b. Dots are means over the seeds, bars reach from the lowest to the highest.

    Args:
      rows: training rows, from `rows.read_trained`. One run per seed at compression 1 is drawn.

    Raises:
      ValueError: no network was trained unpruned, there are several networks, or the rows do not
        hold the mean squares.
    """
    from matplotlib.figure import Figure

    runs = _unpruned_runs(rows)
    first = next(iter(runs.values()))
    sizes = [layer["size"] for layer in first["mean_squares"]]
    inverse = 1 / np.array(sizes, float)
    ends = np.array([inverse.min(), inverse.max()])

    figure = Figure(figsize=(5.6, 4.4), layout="constrained")
    ax = figure.subplots()
    for stage, words, color, marker in _STAGES:
        values = [[layer[stage] for layer in row["mean_squares"]] for row in runs.values()]
        mean, bars = _over_seeds(np.array(values))
        slope, offset = fig4.fit(inverse, mean)
        ax.errorbar(
            inverse,
            mean,
            yerr=bars,
            fmt=marker,
            color=color,
            markersize=5,
            capsize=2,
            linewidth=1,
            label=f"{words}: slope {slope:.2f}",
            zorder=3,
        )
        ax.plot(ends, 10**offset * ends**slope, color=color, linewidth=1.2)
    # The line of slope 1 goes through the geometric middle of the last dots, after training.
    middle = np.exp(np.mean(np.log(mean)) - np.mean(np.log(inverse)))
    ax.plot(ends, middle * ends, "--", color="black", linewidth=1, label="slope 1", zorder=2.5)
    _dress(ax, runs)
    return figure


def _unpruned_runs(rows: Sequence[Row]) -> dict[int, Row]:
    """Returns one unpruned run per seed."""
    unpruned = [row for row in rows if row["compression"] == 1]
    if not unpruned:
        raise ValueError(
            "no row is at compression 1, and the figure shows unpruned networks: see "
            "paper/configs/fig5b.py."
        )
    select.one_network(unpruned)
    runs = curves.unpruned_by_seed(unpruned)
    for row in runs.values():
        if "mean_squares" not in row:
            raise ValueError(
                f"row {row['run_id']} lacks mean_squares: it is of an earlier version. Train it "
                "again."
            )
    return runs


def _over_seeds(values: np.ndarray) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Returns the mean over the seeds, and the lengths of the bars below and above it.

    Args:
      values: [num_seeds, num_layers].
    """
    mean = values.mean(axis=0)
    return mean, (mean - values.min(axis=0), values.max(axis=0) - mean)


def _dress(ax: Axes, runs: Mapping[int, Row]) -> None:
    layout.logarithmic(ax)
    ax.set_xlabel("1 / layer size")
    ax.set_ylabel("average squared weight of a layer")
    layout.hide_frame(ax)
    ax.legend(frameon=False, fontsize=9)
    first = next(iter(runs.values()))
    network = f"{titles.of_network(first)} on {first['dataset']}"
    seeds = ", ".join(str(seed) for seed in sorted(runs))
    noun = "seeds" if len(runs) > 1 else "seed"
    ax.set_title(
        f"Average squared weight of each layer\n{network}\n"
        f"unpruned, {first['num_epochs']} epochs, {noun} {seeds}",
        fontsize=10,
    )
