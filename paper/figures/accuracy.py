"""Draws the curves of `curves.py`: what Figs. 1, 5a, 6 and 7 share.

The band of a curve reaches from its lowest to its highest seed. An arrow at the axis is a critical
compression, a dashed line the maximal compression, and a dotted line the accuracy of guessing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from paper.figures import curves, layout
from paper.figures.curves import Curve, Panel
from paper.figures.published import Published
from synflow_jax.experiments.pictures import BLUE, GREEN, GREY, RED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Behind = Mapping[tuple[str, str], Published]  # by model and data set

LABELS = {
    "best": "best test top-1 of all epochs, %",
    "last": "test top-1 after the last epoch, %",
}


class Style(NamedTuple):
    """The look of a curve. Colour-blind readers can tell the colours apart; the markers help."""

    color: Any
    marker: str
    line: str = "-"


STYLES = {
    "random": Style(GREY, "o"),
    "magnitude": Style(RED, "s"),
    "snip": Style("#E69F00", "^"),
    "grasp": Style(GREEN, "v"),
    "synflow": Style(BLUE, "D"),
    "imp": Style("#CC79A7", "P"),
    "uniform": Style("#56B4E9", "<"),
    "erk": Style("#000000", ">"),
}  # in the order of the legend


def figure_of_one(
    panel: Panel,
    styles: Mapping[Any, Style],
    title: str,
    epoch: str,
    behind: Behind | None = None,
) -> Figure:
    """Draws a figure of one panel, with its legend."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.8, 4.4), layout="constrained")
    ax = figure.subplots()
    published = of_panel(behind, panel)
    draw(ax, panel, styles, published)
    ax.set_xlabel("compression")
    ax.set_ylabel(LABELS[epoch])
    ax.set_title(f"{title}\n{panel_title(panel, published, ', ')}", fontsize=10)
    add_legend(figure, [ax], published=published is not None)
    return figure


def of_panel(behind: Behind | None, panel: Panel) -> Published | None:
    """Returns the published curves of a panel's network and data set, if there are any."""
    return None if behind is None else behind.get((panel.model, panel.dataset))


def panel_title(panel: Panel, published: Published | None, separator: str = "\n") -> str:
    """Returns the network, the seeds, what is missing, and the note of the published curves."""
    title = f"{panel.title}{separator}{curves.seeds_in_words(panel)}"
    if published is not None and published.note:
        title += f"\n({published.note})"
    return title


def draw(
    ax: Axes, panel: Panel, styles: Mapping[Any, Style], published: Published | None = None
) -> None:
    """Draws the curves of a panel over the published ones, in the order of the styles."""
    ax.axhline(panel.chance, color=GREY, linestyle=":", linewidth=1, zorder=1)
    if published is not None:
        _draw_published(ax, panel, styles, published)
    shown = {key: panel.curves[key] for key in styles if key in panel.curves}
    for key, curve in shown.items():
        _draw_curve(ax, curve, styles[key])
    ax.set_xscale("log")
    ax.set_ylim(bottom=0)
    _draw_maximum(ax, panel)
    _draw_arrows(ax, shown, styles)
    layout.hide_frame(ax)
    ax.tick_params(labelsize=8)


def _draw_published(
    ax: Axes, panel: Panel, styles: Mapping[Any, Style], published: Published
) -> None:
    for key, top1 in published.top1.items():
        if key in panel.curves:
            color = styles[key].color
            ax.plot(published.compression, top1, color=color, linewidth=3.5, alpha=0.3, zorder=1.5)


def _draw_curve(ax: Axes, curve: Curve, style: Style) -> None:
    ax.fill_between(
        curve.compression, curve.low, curve.high, color=style.color, alpha=0.2, linewidth=0
    )
    ax.plot(
        curve.compression,
        curve.mean,
        color=style.color,
        marker=style.marker,
        linestyle=style.line,
        markersize=4,
        linewidth=1.4,
        label=curve.label,
    )


def _draw_maximum(ax: Axes, panel: Panel) -> None:
    """Draws the maximal compression, unless it is far beyond the curves."""
    if panel.max_compression is None:
        return
    last = max(float(curve.compression[-1]) for curve in panel.curves.values())
    if panel.max_compression <= 3 * last:
        ax.axvline(panel.max_compression, color="black", linestyle="--", linewidth=1, zorder=1)


def _draw_arrows(ax: Axes, shown: Mapping[Any, Curve], styles: Mapping[Any, Style]) -> None:
    """Draws an arrow at each critical compression. Those at the same one are side by side."""
    from matplotlib.transforms import offset_copy

    colors_at: dict[float, list[Any]] = {}
    for key, curve in shown.items():
        if curve.critical is not None:
            colors_at.setdefault(curve.critical, []).append(styles[key].color)

    figure = ax.get_figure(root=True)
    for compression, colors in colors_at.items():
        middle = (len(colors) - 1) / 2
        for i, color in enumerate(colors):
            shifted = offset_copy(
                ax.get_xaxis_transform(), figure, x=6 * (i - middle), units="points"
            )
            arrow = {
                "arrowstyle": "-|>",
                "color": color,
                "linewidth": 1.8,
                "shrinkA": 0,
                "shrinkB": 0,
            }
            ax.annotate(
                "",
                (compression, 0),
                xytext=(compression, 0.11),
                xycoords=shifted,
                textcoords=shifted,
                zorder=4,
                arrowprops=arrow,
            )


def add_legend(figure: Figure, axes: Sequence[Axes], *, published: bool) -> None:
    """Adds one legend for all panels, to the right of them."""
    handles = _curves_of(axes) + _signs_of(axes, published)
    figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize=8)


def _curves_of(axes: Sequence[Axes]) -> list[Any]:
    """Returns one line per label, in the order of the rules where there are several panels."""
    by_label: dict[str, Any] = {}
    for ax in axes:
        for line, label in zip(*ax.get_legend_handles_labels(), strict=True):
            by_label.setdefault(label, line)
    lines = list(by_label.values())
    if len(axes) > 1:
        markers = [style.marker for style in STYLES.values()]
        lines.sort(key=lambda line: markers.index(line.get_marker()))
    return lines


def _signs_of(axes: Sequence[Axes], published: bool) -> list[Any]:
    """Returns what the panels show besides curves: lines and arrows that some of them have."""
    from matplotlib.lines import Line2D

    signs = []
    if published:
        signs.append(Line2D([], [], color="black", linewidth=3.5, alpha=0.3, label="published"))
    signs.append(Line2D([], [], color=GREY, linestyle=":", label="guessing"))
    lines = [line for ax in axes for line in ax.lines]
    if any(line.get_linestyle() == "--" and line.get_color() == "black" for line in lines):
        label = "maximal\ncompression"
        signs.append(Line2D([], [], color="black", linestyle="--", linewidth=1, label=label))
    if any(ax.texts for ax in axes):  # the arrows are texts
        arrow = Line2D(
            [],
            [],
            color="none",
            marker=r"$\downarrow$",
            markersize=9,
            markerfacecolor="black",
            markeredgecolor="none",
            label="critical\ncompression",
        )
        signs.append(arrow)
    return signs
