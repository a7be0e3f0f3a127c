"""Draws the schedules (appendix of the paper): prune size over cut size against iterations.

Theorem 3: an iteration that prunes less score than the smallest cut holds cannot disconnect the
network. The ratio is below 1 where a schedule uses enough iterations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from paper.figures import layout, titles
from paper.figures import rows as select
from paper.figures.rows import Row
from synflow_jax.experiments.pictures import BLUE, GREEN, RED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TICKS = [factor * 10.0**power for power in range(-4, 4) for factor in (1, 2, 5)]
_STYLES = {
    "exponential": (BLUE, "o"),
    "linear": (RED, "s"),
    "certified": (GREEN, "D"),
}


def draw(rows: Sequence[Row]) -> Figure:
    """Draws the largest prune size over cut size of each SynFlow run.

    Crosses are runs that have collapsed.

    Args:
      rows: SynFlow's pruning rows of one network at one compression; other rules are left out.

    Raises:
      ValueError: the rows are of several networks or compressions, or do not hold the scores.
    """
    from matplotlib.figure import Figure

    rows = [row for row in select.one_network(rows) if row["pruner"] == "synflow"]
    compression = _only_compression(rows)
    figure = Figure(figsize=(6.2, 4), layout="constrained")
    ax = figure.subplots()
    for name in _STYLES:
        of_schedule = [row for row in rows if row["schedule"] == name]
        if of_schedule:
            runs = select.by(of_schedule, _num_iterations, "number of iterations")
            _draw_schedule(ax, name, runs)
    _draw_bound(ax)
    if any(row["collapsed"] for row in rows):
        ax.plot([], [], "x", color="black", markersize=9, label="collapsed")
    _dress(ax, rows)
    title = f"{titles.of_run(rows[0])}: SynFlow, compression {compression:,g}"
    ax.set_title(title, fontsize=10)
    return figure


def _only_compression(rows: Sequence[Row]) -> float:
    if not rows:
        raise ValueError(
            "no row is SynFlow's, whose schedules the figure compares. Make rows by "
            "paper/configs/schedule.py."
        )
    compressions = sorted({row["compression"] for row in rows})
    if len(compressions) != 1:
        raise ValueError(
            f"SynFlow's rows have {len(compressions)} compressions {compressions}; the figure "
            "shows one: use a folder for each."
        )
    return float(compressions[0])


def _num_iterations(row: Row) -> int:
    # The certified schedule uses as many as it needs, so they are counted.
    return len(row["iterations"]["kept"])


def _draw_schedule(ax: Axes, name: str, runs: Mapping[int, Row]) -> None:
    """Draws the line of a schedule, and writes its first and last ratio."""
    color, marker = _STYLES[name]
    ratios = {number: ratio(row) for number, row in runs.items()}
    numbers = list(ratios)
    ax.plot(numbers, list(ratios.values()), color=color, marker=marker, markersize=5, label=name)
    for number in dict.fromkeys((numbers[0], numbers[-1])):
        ax.annotate(
            f"{ratios[number]:.3g}",
            (number, ratios[number]),
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=color,
        )
    for number, row in runs.items():
        if row["collapsed"]:
            ax.plot(number, ratios[number], marker="x", color="black", markersize=9, zorder=3)


def _draw_bound(ax: Axes) -> None:
    ax.axhline(1, color="black", linestyle="--", linewidth=1)
    ax.annotate(
        "below: cannot collapse",
        (0.01, 1),
        xycoords=("axes fraction", "data"),
        xytext=(2, -4),
        textcoords="offset points",
        va="top",
        fontsize=8,
    )


def _dress(ax: Axes, rows: Sequence[Row]) -> None:
    numbers = sorted({_num_iterations(row) for row in rows if row["schedule"] != "certified"})
    layout.logarithmic(ax)
    ax.set_xticks(numbers, [str(number) for number in numbers])
    ax.set_yticks(_TICKS, [f"{tick:g}" for tick in _TICKS])
    ax.minorticks_off()
    values = [1.0, *(ratio(row) for row in rows)]
    ax.set_ylim(min(values) / 1.5, max(values) * 1.5)
    ax.set_xlabel("iterations")
    ax.set_ylabel("prune size / cut size, largest of all iterations")
    layout.hide_frame(ax)
    ax.legend(frameon=False, title="schedule", title_fontsize=9, fontsize=9)


def ratio(row: Row) -> float:
    """Returns the largest prune size over cut size of a run's iterations (Theorem 3).

    After a collapse there is no cut, so those iterations do not count.

    Raises:
      ValueError: the row does not hold the scores.
    """
    iterations = row["iterations"]
    if any(key not in iterations for key in ("log10_cut", "pruned_score", "log2_unit")):
        raise ValueError(
            f"row {row['run_id']} lacks iterations.pruned_score, log10_cut or log2_unit: it is of "
            "an earlier version. Run paper/configs/schedule.py into a new folder."
        )
    pruned, units = iterations["pruned_score"], iterations["log2_unit"]
    ratios = []
    for score, unit, log10_cut in zip(pruned, units, iterations["log10_cut"], strict=True):
        if log10_cut is not None and score is not None:
            # The pruned score is in units of 2^unit.
            ratios.append(score * 10 ** (unit * math.log10(2) - log10_cut))
    if not ratios:
        raise ValueError(f"row {row['run_id']} has no cut in any iteration, to compare with.")
    return max(ratios)
