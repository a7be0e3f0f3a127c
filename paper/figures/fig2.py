"""Draws Fig. 2, where collapse occurs: the fraction of weights kept in each layer.

There is one panel per rule and one line per compression.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from paper.figures import layout, titles
from paper.figures import rows as select
from paper.figures.rows import Row
from synflow_jax.experiments.pictures import GREY, RED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

Color = Callable[[float], Any]  # of a compression


def draw(rows: Sequence[Row]) -> Figure:
    """Draws Fig. 2.

    A line is dashed where a layer is empty. There it goes down to the lower end of the axis, and a
    cross has the colour of the lowest compression that empties the layer.

    Args:
      rows: the pruning rows of one network, at any compressions.

    Raises:
      ValueError: the rows are of several networks, two rows of a rule have the same compression, or
        no compression is above 1.
    """
    import matplotlib
    from matplotlib.colors import LogNorm

    rows = [row for row in select.one_network(rows) if row["compression"] > 1]
    if not rows:
        raise ValueError("no row has a compression above 1: Fig. 2 shows what pruning leaves.")
    compressions = sorted({row["compression"] for row in rows})
    # The factor keeps the highest compression out of the palest yellow.
    norm = LogNorm(compressions[0], compressions[-1] * 1.3)
    colors = matplotlib.colormaps["viridis"]

    by_rule = _by_rule(rows)
    floor = _floor(rows)
    figure, axes = layout.panels(len(by_rule), (3.3, 2.9))
    for ax, runs in zip(axes, by_rule.values(), strict=False):
        _draw_panel(ax, runs, lambda compression: colors(norm(compression)), floor)
        _add_title(ax, runs)
    spare = axes[len(by_rule)]
    _add_color_bar(figure, spare, norm, compressions)
    _add_legend(spare)
    figure.suptitle(
        f"Fraction of weights kept in each layer: {titles.of_run(rows[0])}, maximal compression "
        f"{rows[0]['max_compression']:,.0f}",
        fontsize=10,
    )
    return figure


def _by_rule(rows: Sequence[Row]) -> dict[str, dict[float, Row]]:
    """Returns the rows by rule and compression."""
    found = {}
    for rule in select.RULES:
        of_rule = [row for row in rows if row["pruner"] == rule]
        if of_rule:
            found[rule] = select.by(of_rule, lambda row: row["compression"], "compression")
    return found


def _floor(rows: Sequence[Row]) -> float:
    """Returns the lower end of the axis, below every fraction: 0 has no logarithm."""
    fractions = np.concatenate([_fractions(row) for row in rows])
    return min(fractions[fractions > 0], default=1.0) / 4


def _fractions(row: Row) -> np.ndarray:
    """Returns kept / size of each layer."""
    return np.array([layer["kept"] / layer["size"] for layer in row["layers"]])


def _draw_panel(ax: Axes, runs: Mapping[float, Row], color: Color, floor: float) -> None:
    layers = next(iter(runs.values()))["layers"]
    names = [layer["name"].removesuffix("/kernel") for layer in layers]
    places = np.arange(len(names))
    emptied: dict[int, float] = {}  # the lowest compression that empties a layer
    for compression, row in runs.items():
        fractions = _fractions(row)
        is_empty = fractions == 0
        ax.plot(
            places,
            np.maximum(fractions, floor),
            color=color(compression),
            linestyle="--" if is_empty.any() else "-",
            linewidth=1.3,
        )
        for place in np.flatnonzero(is_empty).tolist():
            emptied.setdefault(place, compression)
    for place, compression in emptied.items():
        ax.plot(place, floor, "x", color=color(compression), markersize=5, clip_on=False, zorder=3)
    ax.set_yscale("log")
    ax.set_ylim(floor, 1.5)
    ax.set_ylabel("fraction kept", fontsize=8)
    # At most 24 names fit under a panel.
    step = max(1, -(-len(names) // 24))
    ax.set_xticks(places[::step], names[::step], rotation=90, fontsize=6)


def _add_title(ax: Axes, runs: Mapping[float, Row]) -> None:
    """Titles a panel with the rule and whether its networks collapse."""
    first = next(iter(runs.values()))
    collapsed = [compression for compression, row in runs.items() if row["collapsed"]]
    # Beyond the maximum every network collapses: that says nothing about the rule.
    early = [compression for compression in collapsed if compression <= first["max_compression"]]
    if early:
        fate = f"collapsed from {titles.of_compression(early[0])} on"
    elif collapsed:
        fate = "collapsed only beyond the maximum"
    else:
        fate = "never collapsed"
    title = f"{titles.of_rule(first)}\n{fate}"
    ax.set_title(title, fontsize=9, color=RED if early else "black")


def _add_color_bar(
    figure: Figure, spare: Axes, norm: LogNorm, compressions: Sequence[float]
) -> None:
    import matplotlib

    mappable = matplotlib.cm.ScalarMappable(norm, matplotlib.colormaps["viridis"])
    bar = figure.colorbar(mappable, cax=spare.inset_axes((0.1, 0.1, 0.07, 0.85)))
    bar.set_label("compression", fontsize=8)
    bar.ax.yaxis.set_label_position("left")
    # At most seven labels fit next to the bar.
    step = -(-len(compressions) // 7)
    labels = [titles.of_compression(compression) for compression in compressions[::step]]
    bar.set_ticks(compressions[::step], labels=labels)
    bar.ax.minorticks_off()
    bar.ax.tick_params(labelsize=7)


def _add_legend(spare: Axes) -> None:
    spare.plot([], [], color=GREY, label="every layer has weights")
    spare.plot([], [], color=GREY, linestyle="--", label="a layer is empty")
    spare.plot([], [], "x", color=GREY, label="emptied first at\nthis compression")
    spare.legend(frameon=False, fontsize=8, loc="center right")
