"""Fig. 5b: the average squared weight of each layer against the inverse of its size, before and after training.

The paper's is VGG-19 on CIFAR-10: training makes a layer's average squared magnitude, the score of magnitude pruning,
inversely proportional to its size. That is what a conserved score looks like (Fig. 4), and why iterative magnitude
pruning avoids the collapse of magnitude pruning.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from paper.figures import accuracy, fig4
from paper.figures import rows as select
from paper.figures.rows import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(rows: Sequence[Row]) -> Figure:
    """Draws Fig. 5b. Dots are means over the seeds, bars reach from the least to the largest of them.

    Args:
      rows: of training, from `rows.read_trained`; those at compression 1 are drawn, one a seed.

    Raises:
      ValueError: no network was trained unpruned, there are several, or the rows lack the mean squares.
    """
    from matplotlib.figure import Figure

    dense = [row for row in rows if row["compression"] == 1]
    if not dense:
        raise ValueError(
            "no row is at compression 1, and the figure shows unpruned networks: see paper/configs/fig5b.py."
        )
    select.one_network(dense)
    runs = accuracy.first_dense(dense)
    for row in runs.values():
        if "mean_squares" not in row:
            raise ValueError(
                f"row {row['run_id']} lacks mean_squares: it is of an earlier version. Train it again."
            )
    first = next(iter(runs.values()))
    inverse = 1 / np.array([layer["size"] for layer in first["mean_squares"]], float)
    figure = Figure(figsize=(5.6, 4.4), layout="constrained")
    ax = figure.subplots()
    ends = np.array([inverse.min(), inverse.max()])
    for name, words, color, marker in (
        ("initial", "before training", select.BLUE, "o"),
        ("final", "after training", select.RED, "s"),
    ):
        values = np.array([[layer[name] for layer in row["mean_squares"]] for row in runs.values()])
        mean = values.mean(axis=0)
        slope, offset = fig4.fit(inverse, mean)
        ax.errorbar(
            inverse, mean, yerr=(mean - values.min(axis=0), values.max(axis=0) - mean), fmt=marker, color=color,
            markersize=5, capsize=2, linewidth=1, label=f"{words}: slope {slope:.2f}", zorder=3,
        )  # fmt: skip
        ax.plot(ends, 10**offset * ends**slope, color=color, linewidth=1.2)
    middle = np.exp(np.mean(np.log(mean)) - np.mean(np.log(inverse)))
    ax.plot(ends, middle * ends, "--", color="black", linewidth=1, label="slope 1", zorder=2.5)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("1 / layer size")
    ax.set_ylabel("average squared weight of a layer")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=9)
    seeds = sorted(runs)
    ax.set_title(
        f"Average squared weight of each layer\n{select.network_title(first)} on {first['dataset']}\nunpruned, "
        f"{first['num_epochs']} epochs, seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}",
        fontsize=10,
    )
    return figure
