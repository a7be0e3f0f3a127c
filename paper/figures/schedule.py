"""The schedules (appendix of the paper): prune size over cut size against the number of iterations."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from paper.figures import rows as select
from paper.figures.rows import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TICKS = [factor * 10.0**power for power in range(-4, 4) for factor in (1, 2, 5)]
_STYLES = {
    "exponential": (select.BLUE, "o"),
    "linear": (select.RED, "s"),
    "certified": (select.GREEN, "D"),
}


def draw(rows: Sequence[Row], folder: pathlib.Path) -> Figure:
    """Draws the largest prune size over cut size of each SynFlow run; below 1 no run can collapse (Theorem 3).

    Crosses are runs that have collapsed.

    Args:
      rows: SynFlow's of one network, at one compression.
      folder: not used.

    Raises:
      ValueError: the rows are of several networks or compressions, or lack the scores.
    """
    del folder
    from matplotlib.figure import Figure

    rows = [row for row in select.one_network(rows) if row["pruner"] == "synflow"]
    if not rows:
        raise ValueError(
            "no row is SynFlow's, whose schedules the figure compares. Make rows by paper/configs/schedule.py."
        )
    compressions = sorted({row["compression"] for row in rows})
    if len(compressions) != 1:
        raise ValueError(
            f"SynFlow's rows have {len(compressions)} compressions {compressions}; the figure shows one: use a folder "
            "for each."
        )
    figure = Figure(figsize=(6.2, 4), layout="constrained")
    ax = figure.subplots()
    for name, (color, marker) in _STYLES.items():
        runs = select.by(
            [row for row in rows if row["schedule"] == name], _num_done, "number of iterations"
        )
        if not runs:
            continue
        ratios = [ratio(row) for row in runs.values()]
        ax.plot(list(runs), ratios, color=color, marker=marker, markersize=5, label=name)
        for number, value in list(zip(runs, ratios, strict=True))[:: max(1, len(runs) - 1)]:
            ax.annotate(f"{value:.3g}", (number, value), xytext=(0, 8), textcoords="offset points", ha="center",
                        fontsize=8, color=color)  # fmt: skip
        for number, row in runs.items():
            if row["collapsed"]:
                ax.plot(number, ratio(row), marker="x", color="black", markersize=9, zorder=3)
    ax.axhline(1, color="black", linestyle="--", linewidth=1)
    ax.annotate("below: cannot collapse", (0.01, 1), xycoords=("axes fraction", "data"), xytext=(2, -4),
                textcoords="offset points", va="top", fontsize=8)  # fmt: skip
    if any(row["collapsed"] for row in rows):
        ax.plot([], [], "x", color="black", markersize=9, label="collapsed")
    numbers = sorted({_num_done(row) for row in rows if row["schedule"] != "certified"})
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xticks(numbers, [str(number) for number in numbers])
    ax.set_yticks(_TICKS, [f"{tick:g}" for tick in _TICKS])
    ax.minorticks_off()
    values = [1.0, *(ratio(row) for row in rows)]
    ax.set_ylim(min(values) / 1.5, max(values) * 1.5)
    ax.set_xlabel("iterations")
    ax.set_ylabel("prune size / cut size, largest of all iterations")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, title="schedule", title_fontsize=9, fontsize=9)
    ax.set_title(f"{select.title(rows[0])}: SynFlow, compression {compressions[0]:,g}", fontsize=10)
    return figure


def _num_done(row: Row) -> int:
    return len(row["iterations"]["kept"])  # the certified schedule takes as many as it needs


def ratio(row: Row) -> float:
    """The largest prune size over cut size of a run's iterations (Theorem 3).

    After a collapse no cut is left; those iterations count for nothing.

    Raises:
      ValueError: the row lacks the scores.
    """
    iterations = row["iterations"]
    if "log10_cut" not in iterations or "pruned_score" not in iterations:
        raise ValueError(
            f"row {row['run_id']} lacks iterations.pruned_score or log10_cut: it is of an earlier version. Run "
            "paper/configs/schedule.py into a new folder."
        )
    steps = zip(
        iterations["pruned_score"], iterations["log2_unit"], iterations["log10_cut"], strict=True
    )
    return max(
        pruned * 10 ** (unit * math.log10(2) - cut)
        for pruned, unit, cut in steps
        if cut is not None
    )
