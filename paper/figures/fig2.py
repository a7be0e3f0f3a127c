"""Fig. 2: where collapse occurs. The fraction kept of each layer, a line a compression, a panel a rule."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from paper.figures import rows as select
from paper.figures.rows import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(rows: Sequence[Row], folder: pathlib.Path) -> Figure:
    """Draws Fig. 2.

    A line is dashed where a layer is empty; there it goes down to the floor, where a cross has the colour of the lowest
    compression that empties the layer.

    Args:
      rows: of one network, for each rule at any compressions.
      folder: not used.

    Raises:
      ValueError: the rows are of several networks, or there are two of a rule at one compression.
    """
    del folder
    import matplotlib
    from matplotlib.colors import LogNorm

    rows = [row for row in select.one_network(rows) if row["compression"] > 1]
    if not rows:
        raise ValueError("no row has a compression above 1: Fig. 2 shows what pruning leaves.")
    by_rule = {
        rule: select.by(
            [row for row in rows if row["pruner"] == rule],
            lambda row: row["compression"],
            "compression",
        )
        for rule in select.RULES
        if any(row["pruner"] == rule for row in rows)
    }
    norm = LogNorm(
        min(row["compression"] for row in rows), max(row["compression"] for row in rows) * 1.3
    )
    colors = matplotlib.colormaps["viridis"]
    floor = (
        min((fraction for row in rows for fraction in _fractions(row) if fraction > 0), default=1.0)
        / 4
    )
    figure, axes = select.panels(len(by_rule), (3.3, 2.9))
    for ax, runs in zip(axes, by_rule.values(), strict=False):
        _panel(ax, runs, lambda compression: colors(norm(compression)), floor)
        first = next(iter(runs.values()))
        broken = [compression for compression, row in runs.items() if row["collapsed"]]
        early = [compression for compression in broken if compression <= first["max_compression"]]
        late = "collapsed only beyond the maximum" if broken else "never collapsed"
        fate = f"collapsed from {select.number(early[0])} on" if early else late
        ax.set_title(
            f"{select.rule_title(first)}\n{fate}",
            fontsize=9,
            color=select.RED if early else "black",
        )
    spare = axes[len(by_rule)]
    bar = figure.colorbar(
        matplotlib.cm.ScalarMappable(norm, colors), cax=spare.inset_axes((0.1, 0.1, 0.07, 0.85))
    )
    bar.set_label("compression", fontsize=8)
    bar.ax.yaxis.set_label_position("left")
    compressions = sorted({row["compression"] for row in rows})
    shown = compressions[:: -(-len(compressions) // 7)]
    bar.set_ticks(shown, labels=[select.number(compression) for compression in shown])
    bar.ax.minorticks_off()
    bar.ax.tick_params(labelsize=7)
    spare.plot([], [], color=select.GREY, label="every layer has weights")
    spare.plot([], [], color=select.GREY, linestyle="--", label="a layer is empty")
    spare.plot([], [], "x", color=select.GREY, label="emptied first at\nthis compression")
    spare.legend(frameon=False, fontsize=8, loc="center right")
    figure.suptitle(
        f"Fraction of weights kept in each layer: {select.title(rows[0])}, maximal compression "
        f"{rows[0]['max_compression']:,.0f}",
        fontsize=10,
    )
    return figure


def _panel(ax: Any, runs: dict[float, Row], color: Any, floor: float) -> None:
    names = [layer["name"].removesuffix("/kernel") for layer in next(iter(runs.values()))["layers"]]
    places = np.arange(len(names))
    emptied: dict[int, float] = {}
    for compression, row in runs.items():
        fractions = np.array(_fractions(row))
        style = "--" if (fractions == 0).any() else "-"
        ax.plot(
            places,
            np.maximum(fractions, floor),
            color=color(compression),
            linestyle=style,
            linewidth=1.3,
        )
        for place in np.flatnonzero(fractions == 0):
            emptied.setdefault(int(place), compression)
    for empty, compression in emptied.items():
        ax.plot(empty, floor, "x", color=color(compression), markersize=5, clip_on=False, zorder=3)
    ax.set_yscale("log")
    ax.set_ylim(floor, 1.5)
    ax.set_ylabel("fraction kept", fontsize=8)
    step = max(1, -(-len(names) // 24))
    ax.set_xticks(places[::step], names[::step], rotation=90, fontsize=6)


def _fractions(row: Row) -> list[float]:
    return [layer["kept"] / layer["size"] for layer in row["layers"]]
