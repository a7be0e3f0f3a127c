"""Draws Fig. 3, conservation by unit: the incoming against the outgoing score of each hidden unit.

There is one panel per rule and one dot per unit. The score of a rule that conserves saliency
(Theorem 1) puts every dot on the diagonal.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from paper.figures import layout, titles
from paper.figures import rows as select
from paper.figures.rows import Row
from synflow_jax.storage import schema

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# A group of units in the file of the scores.
_GROUP: dict[str, Any] = {"incoming": [schema.NUMBER], "outgoing": [schema.NUMBER]}

Units = Mapping[str, tuple[np.ndarray, np.ndarray]]


class Dots(NamedTuple):
    """The dots of a panel.

    Attributes:
      incoming, outgoing: the absolute score of each unit, [num_dots].
      num_negative: how many of them have a negative score on a side.
      num_left_out: the number of further units, whose score is 0 on a side.
    """

    incoming: np.ndarray
    outgoing: np.ndarray
    num_negative: int
    num_left_out: int


def draw(rows: Sequence[Row]) -> Figure:
    """Draws Fig. 3 from the scores before pruning.

    Negative sums, of GraSP and random, are drawn by their absolute value. A unit whose score is 0
    on a side cannot be drawn on a logarithmic axis; the title says how many there are.

    Args:
      rows: the pruning rows of one network, with a run that recorded its units for each rule.

    Raises:
      ValueError: the rows are of several networks, none of them recorded its units, or a file is
        damaged.
    """
    recorded = [row for row in select.one_network(rows) if row.get("units")]
    if not recorded:
        raise ValueError(
            f"--rows={rows[0]['folder']!r}: no row has the scores of its units. Make them by "
            "paper/configs/fig3.py, or by any config with --config.prune.record_units."
        )
    by_rule = select.of_lowest_compression(recorded)
    figure, axes = layout.panels(len(by_rule), (3.0, 2.9))
    for ax, row in zip(axes, by_rule.values(), strict=False):
        units = read_units(pathlib.Path(row["folder"]) / row["units"])
        dots = _draw_dots(ax, units)
        _dress(ax, dots)
        _add_title(ax, row, dots)
    _add_legend(axes[len(by_rule)], list(units))
    title = f"Score of each hidden unit before pruning, in and out: {titles.of_run(recorded[0])}"
    figure.suptitle(title, fontsize=10)
    return figure


def read_units(path: pathlib.Path) -> Units:
    """Reads {group of units: (incoming, outgoing)}, two arrays with one score per unit.

    Raises:
      ValueError: the file is missing or damaged.
    """
    try:
        groups = schema.read_object(path)
        return {name: _scores(name, group) for name, group in groups.items()}
    except ValueError as error:
        raise ValueError(
            f"the file of the units {str(path)!r} cannot be read: {error}. Run prune.py again "
            "with --overwrite."
        ) from error


def _scores(name: str, group: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns the incoming and the outgoing scores of a group of units.

    Raises:
      ValueError: they are not two lists of numbers, of one length.
    """
    found = schema.problem(group, _GROUP, _GROUP)
    if found is not None:
        raise ValueError(f"in {name!r}, {found}")
    incoming, outgoing = np.array(group["incoming"], float), np.array(group["outgoing"], float)
    if incoming.size != outgoing.size:
        raise ValueError(f"in {name!r}, {incoming.size} units have {outgoing.size} outgoing scores")
    return incoming, outgoing


def _draw_dots(ax: Axes, units: Units) -> Dots:
    import matplotlib

    colors = matplotlib.colormaps["viridis"]
    shades = np.linspace(0, 0.9, len(units))
    groups = list(zip(shades, units.values(), strict=True))
    all_incoming, all_outgoing = [np.zeros(0)], [np.zeros(0)]
    num_negative = num_left_out = 0
    # The last layers come first: they have the most units and would cover the others.
    for shade, (incoming, outgoing) in reversed(groups):
        shown = (incoming != 0) & (outgoing != 0)
        negative = (incoming < 0) | (outgoing < 0)
        num_left_out += int(np.sum(~shown))
        num_negative += int(np.sum(negative & shown))
        x, y = np.abs(incoming[shown]), np.abs(outgoing[shown])
        ax.scatter(x, y, color=colors(shade), s=3, linewidths=0, rasterized=True)
        all_incoming.append(x)
        all_outgoing.append(y)
    return Dots(
        np.concatenate(all_incoming), np.concatenate(all_outgoing), num_negative, num_left_out
    )


def _dress(ax: Axes, dots: Dots) -> None:
    """Adds the axes, equal on both sides, and the diagonal of conserved scores."""
    layout.logarithmic(ax)
    ax.set_xlabel("incoming score", fontsize=8)
    ax.set_ylabel("outgoing score", fontsize=8)
    if dots.incoming.size:
        everything = np.concatenate([dots.incoming, dots.outgoing])
        ends = (everything.min() / 2, everything.max() * 2)
        ax.plot(ends, ends, ":", color="black", linewidth=1.2, zorder=3)
        ax.set_xlim(ends)
        ax.set_ylim(ends)
        ax.set_aspect("equal")


def _add_title(ax: Axes, row: Row, dots: Dots) -> None:
    """Titles a panel with the rule, the spread of the ratios, and what is not drawn as it is."""
    ratios = ""
    if dots.incoming.size:
        low, high = np.quantile(dots.outgoing / dots.incoming, (0.05, 0.95))
        ratios = f"out / in: {low:.2g} to {high:.2g} (5 to 95 %)"
    notes = []
    if row["pruner"] == "snip":
        notes.append("absolute values")
    if dots.num_negative:
        notes.append(f"{dots.num_negative:,} of {dots.incoming.size:,} units negative")
    if dots.num_left_out:
        notes.append(f"{dots.num_left_out:,} at 0 left out")
    ax.set_title(f"{titles.of_rule(row)}\n{ratios}\n{', '.join(notes)}", fontsize=8)


def _add_legend(spare: Axes, names: Sequence[str]) -> None:
    """Adds the colours of four groups of units, from the first to the last."""
    import matplotlib

    colors = matplotlib.colormaps["viridis"]
    last = len(names) - 1
    places = {0, len(names) // 3, 2 * len(names) // 3, last}
    for place in sorted(places):
        shade = 0.9 * place / max(1, last)
        name = names[place].removesuffix("/kernel")
        spare.scatter([], [], color=colors(shade), s=20, label=name)
    spare.plot([], [], ":", color="black", label="conserved")
    spare.legend(frameon=False, fontsize=8, loc="center", title="units of", title_fontsize=8)
