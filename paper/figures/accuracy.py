"""Test accuracy against compression: what Figs. 1, 5a, 6 and 7 share.

A curve is the mean over the seeds, its band reaches from the least to the largest of them. A rule's critical
compression is the smallest one in the rows, up to the maximum, at which a network of any seed has no path left; it is
an arrow at the axis. The maximal compression is a dashed line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from paper.figures import rows as select
from paper.figures.published import Published
from paper.figures.rows import Row
from synflow_jax import data

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ACCURACIES = {
    "best": "best test top-1 of all epochs, %",
    "last": "test top-1 after the last epoch, %",
}
NEAR_CHANCE = 1.25  # times 1 / classes: the classes of a test split are not all of one size
_ROUNDING = 1 + 1e-9  # of a compression that is the maximum itself


class Style(NamedTuple):
    """How a curve looks; colours are told apart by colour-blind readers, and the markers without any."""

    color: Any
    marker: str
    line: str = "-"


STYLES = {
    "random": Style(select.GREY, "o"),
    "magnitude": Style(select.RED, "s"),
    "snip": Style("#E69F00", "^"),
    "grasp": Style(select.GREEN, "v"),
    "synflow": Style(select.BLUE, "D"),
    "imp": Style("#CC79A7", "P"),
    "uniform": Style("#56B4E9", "<"),
    "erk": Style("#000000", ">"),
}  # in the order of the legend


class Curve(NamedTuple):
    """One rule's accuracy, in per cent.

    Attributes:
      label: in the legend.
      compression, mean, low, high: per compression, over the seeds.
      critical: the smallest compression, up to the maximum, at which a network has collapsed; None if there is none.
      chance: the compression from which on the mean is no better than guessing; None if it never is.
      unknown: how many runs have no pruning row, so that it is not known whether they have collapsed.
      missing: compressions and seeds that others of the same folder have and this one lacks.
    """

    label: str
    compression: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    critical: float | None
    chance: float | None
    unknown: int
    missing: list[tuple[float, int]]


class Panel(NamedTuple):
    """The curves of one network on one data set, by what tells them apart.

    max_compression: of the network; None where no pruning row says it.
    chance: the accuracy of guessing, in per cent.
    """

    model: str
    dataset: str
    title: str
    seeds: list[int]
    curves: dict[Any, Curve]
    max_compression: float | None
    chance: float


def panels(
    rows: Sequence[Row],
    key: Callable[[Row], Any],
    label: Callable[[Any], str],
    accuracy: str = "best",
) -> list[Panel]:
    """The panels of training rows, from `rows.read_trained`, in the order of their first rows.

    At compression 1 nothing is pruned: a curve without such a run shows those of the others.

    Args:
      rows: see above.
      key: what tells the curves apart; rows of the same key, compression and seed must be one run.
      label: of a key, in the legend.
      accuracy: "best" or "last", see `ACCURACIES`.

    Raises:
      ValueError: the accuracy is unknown, or two rows are of the same run but for something else in the config.
    """
    if accuracy not in ACCURACIES:
        raise ValueError(
            f"--accuracy={accuracy} is unknown. Choose one of {', '.join(ACCURACIES)}."
        )
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["dataset"], row["width_multiplier"]), []).append(row)
    return [_panel(group, key, label, accuracy) for group in groups.values()]


def one_panel(found: Sequence[Panel]) -> Panel:
    """The only panel. Raises ValueError if there are several networks."""
    if len(found) > 1:
        names = ", ".join(panel.title for panel in found)
        raise ValueError(
            f"the rows are of {len(found)} networks ({names}); a figure shows one: use a folder for each."
        )
    return found[0]


def _panel(
    rows: Sequence[Row], key: Callable[[Row], Any], label: Callable[[Any], str], accuracy: str
) -> Panel:
    dense = first_dense(rows)
    seeds = sorted({row["seed"] for row in rows})
    chance = 100 / data.spec(rows[0]["dataset"]).num_classes
    runs: dict[Any, dict[tuple[float, int], Row]] = {}
    for row in rows:
        same = runs.setdefault(key(row), {})
        place = row["compression"], row["seed"]
        if place in same:
            raise ValueError(
                f"two rows are of {label(key(row))} at compression {row['compression']:g}, seed {row['seed']}: "
                f"{same[place]['run_id']} and {row['run_id']}. They differ in another value of the config; the figure "
                "shows one: use a folder for each."
            )
        same[place] = row
    started: dict[
        str, set[tuple[float, int]]
    ] = {}  # a folder is one grid, and its curves lack what others have
    for row in rows:
        started.setdefault(row["folder"], set()).add((row["compression"], row["seed"]))
    wanted = {
        name: set().union(*(started[row["folder"]] for row in same.values()))
        for name, same in runs.items()
    }
    for same in runs.values():
        same |= {(1.0, seed): row for seed, row in dense.items() if (1.0, seed) not in same}
    maxima = {row["pruning"]["max_compression"] for row in rows if row["pruning"] is not None}
    maximum = min(maxima, default=None)
    curves = {
        name: _curve(label(name), same, wanted[name], accuracy, maximum, NEAR_CHANCE * chance)
        for name, same in runs.items()
    }
    title = f"{select.network_title(rows[0])} on {rows[0]['dataset']}"
    return Panel(rows[0]["model"], rows[0]["dataset"], title, seeds, curves, maximum, chance)


def first_dense(rows: Iterable[Row]) -> dict[int, Row]:
    """For each seed, the first run at compression 1: such runs are the same whatever the rule."""
    return {
        row["seed"]: row
        for row in sorted(rows, key=lambda row: row["run_id"], reverse=True)
        if _is_dense(row)
    }


def _is_dense(row: Row) -> bool:
    return bool(row["compression"] == 1)


def _curve(
    label: str,
    runs: Mapping[tuple[float, int], Row],
    wanted: Iterable[tuple[float, int]],
    accuracy: str,
    maximum: float | None,
    near_chance: float,
) -> Curve:
    compressions = sorted({compression for compression, _ in runs})
    top1 = [
        [100 * row[accuracy]["test_top1"] for (at, _), row in runs.items() if at == compression]
        for compression in compressions
    ]
    mean = np.array([np.mean(values) for values in top1])
    above = np.flatnonzero(mean > near_chance)
    falls = 0 if not len(above) else int(above[-1]) + 1
    pruned = [(at, row["pruning"]) for (at, _), row in runs.items() if row["pruning"] is not None]
    limit = np.inf if maximum is None else maximum * _ROUNDING
    return Curve(
        label,
        np.array(compressions),
        mean,
        np.array([min(values) for values in top1]),
        np.array([max(values) for values in top1]),
        min((at for at, row in pruned if row["collapsed"] and at <= limit), default=None),
        compressions[falls] if falls < len(compressions) else None,
        len(runs) - len(pruned),
        sorted(place for place in wanted if place not in runs),
    )


def summary(panel: Panel) -> list[str]:
    """What a panel shows, in words: a line a curve, and what is missing."""
    lines = [panel.title]
    if panel.max_compression is not None:
        lines[0] += f", maximal compression {select.number(panel.max_compression)}"
    for curve in panel.curves.values():
        last = curve.compression[-1]
        fate = (
            "never collapsed"
            if curve.critical is None
            else f"collapsed from {select.number(curve.critical)} on"
        )
        if curve.unknown:
            fate += f" ({curve.unknown} runs have no pruning row, which would say it)"
        chance = (
            f"at chance ({panel.chance:.3g} %) from {select.number(curve.chance)} on"
            if curve.chance
            else ""
        )
        kept = chance or f"{curve.mean[-1]:.1f} % at {select.number(last)}"
        lines.append(
            f"  {curve.label}: {curve.mean[0]:.1f} % at {select.number(curve.compression[0])}, {kept}; {fate}"
        )
        if curve.missing:
            lines.append(f"    missing: {_places(curve.missing)}")
    return lines


def _places(missing: Sequence[tuple[float, int]]) -> str:
    """The compressions of each seed, in short.

    >>> _places([(1.0, 2), (3.2, 2), (10.0, 0), (10.0, 2), (20.0, 2)])
    'seed 0 at 10; seed 2 at 1 to 20, 4 compressions'
    """
    by_seed: dict[int, list[str]] = {}
    for compression, seed in sorted(missing):
        by_seed.setdefault(seed, []).append(select.number(compression))
    short = lambda at: (
        ", ".join(at) if len(at) < 4 else f"{at[0]} to {at[-1]}, {len(at)} compressions"
    )
    return "; ".join(f"seed {seed} at {short(at)}" for seed, at in sorted(by_seed.items()))


def seeds_title(panel: Panel) -> str:
    """Which seeds the curves are of, and how many runs are missing."""
    seeds = panel.seeds
    row = f"seeds {seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"seed {seeds[0]}"
    number = sum(len(curve.missing) for curve in panel.curves.values())
    return row + (f"; {number} run{'s' if number > 1 else ''} missing" if number else "")


def draw(
    ax: Axes, panel: Panel, styles: Mapping[Any, Style], behind: Published | None = None
) -> None:
    """Draws the curves of a panel, the critical compressions, the maximum and guessing; published ones behind."""
    ordered = [name for name in styles if name in panel.curves]
    ax.axhline(panel.chance, color=select.GREY, linestyle=":", linewidth=1, zorder=1)
    if behind is not None:
        for name, top1 in behind.top1.items():
            if name in panel.curves:
                ax.plot(
                    behind.compression,
                    top1,
                    color=styles[name].color,
                    linewidth=3.5,
                    alpha=0.3,
                    zorder=1.5,
                )
    for name in ordered:
        curve, style = panel.curves[name], styles[name]
        ax.fill_between(
            curve.compression, curve.low, curve.high, color=style.color, alpha=0.2, linewidth=0
        )
        ax.plot(
            curve.compression, curve.mean, color=style.color, marker=style.marker, linestyle=style.line, markersize=4,
            linewidth=1.4, label=curve.label,
        )  # fmt: skip
    largest = max(float(curve.compression[-1]) for curve in panel.curves.values())
    ax.set_xscale("log")
    ax.set_ylim(bottom=0)
    if panel.max_compression is not None and panel.max_compression <= 3 * largest:
        ax.axvline(panel.max_compression, color="black", linestyle="--", linewidth=1, zorder=1)
    _arrows(ax, [(panel.curves[name].critical, styles[name].color) for name in ordered])
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=8)


def _arrows(ax: Axes, critical: Sequence[tuple[float | None, Any]]) -> None:
    """An arrow at the axis for each; those of one compression stand side by side."""
    from matplotlib.transforms import offset_copy

    here: dict[float, list[Any]] = {}
    for compression, color in critical:
        if compression is not None:
            here.setdefault(compression, []).append(color)
    figure = ax.get_figure(root=True)
    for compression, colors in here.items():
        for i, color in enumerate(colors):
            place = offset_copy(
                ax.get_xaxis_transform(), figure, x=6 * (i - (len(colors) - 1) / 2), units="points"
            )
            ax.annotate(
                "", (compression, 0), xytext=(compression, 0.11), xycoords=place, textcoords=place, zorder=4,
                arrowprops={"arrowstyle": "-|>", "color": color, "linewidth": 1.8, "shrinkA": 0, "shrinkB": 0},
            )  # fmt: skip


def figure_of_one(
    panel: Panel,
    styles: Mapping[Any, Style],
    title: str,
    which: str,
    behind: Mapping[Any, Published] | None = None,
) -> Figure:
    """A figure of one panel, with its legend."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.8, 4.4), layout="constrained")
    ax = figure.subplots()
    found = (behind or {}).get((panel.model, panel.dataset))
    draw(ax, panel, styles, found)
    ax.set_xlabel("compression")
    ax.set_ylabel(ACCURACIES[which])
    ax.set_title(f"{title}\n{panel_title(panel, found, ', ')}", fontsize=10)
    add_legend(figure, [ax], published=found is not None)
    return figure


def panel_title(panel: Panel, behind: Published | None, separator: str = "\n") -> str:
    """The network, the seeds, what is missing, and what has to be known of what is drawn behind."""
    note = f"\n({behind.note})" if behind is not None and behind.note else ""
    return f"{panel.title}{separator}{seeds_title(panel)}{note}"


def add_legend(figure: Figure, axes: Sequence[Axes], *, published: bool) -> None:
    """One legend for all panels, to the right of them."""
    from matplotlib.lines import Line2D

    found: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    ordered = [style.marker for style in STYLES.values()]
    handles = sorted(
        found.values(), key=lambda line: ordered.index(line.get_marker()) if len(axes) > 1 else 0
    )
    if published:
        handles.append(Line2D([], [], color="black", linewidth=3.5, alpha=0.3, label="published"))
    handles.append(Line2D([], [], color=select.GREY, linestyle=":", label="guessing"))
    if any(
        line.get_linestyle() == "--" and line.get_color() == "black"
        for ax in axes
        for line in ax.lines
    ):
        handles.append(
            Line2D([], [], color="black", linestyle="--", linewidth=1, label="maximal\ncompression")
        )
    if any(ax.texts for ax in axes):
        handles.append(
            Line2D([], [], color="none", marker=r"$\downarrow$", markersize=9, markerfacecolor="black",
                   markeredgecolor="none", label="critical\ncompression")
        )  # fmt: skip
    figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize=8)
