"""Draws one run, and writes pictures.

`layers` shows what pruning left in each layer, `curve` shows training. The figures of the paper,
which compare many runs, are in paper/figures.
"""

from __future__ import annotations

import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from synflow_jax import storage

# matplotlib is imported inside functions, after programs are compiled: the memory peaks there.
if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colour-blind readers can tell these apart.
BLUE = "#0072B2"
RED = "#D55E00"
GREEN = "#009E73"
GREY = "#999999"

_MAX_LABELS = 40  # more numbers do not fit above the bars
_MAX_NAMES = 60  # nor more names below them


def layers(row: Mapping[str, Any]) -> Figure:
    """Draws the fraction kept in every layer of one run, on a logarithmic axis.

    Args:
      row: a pruning row of `rows.jsonl`.
    """
    from matplotlib.figure import Figure

    names = [layer["name"] for layer in row["layers"]]
    kept = [layer["kept"] for layer in row["layers"]]
    fractions = [layer["kept"] / layer["size"] for layer in row["layers"]]
    density = row["kept"] / row["total"]
    # An empty layer has no logarithm: it is drawn at the floor, below every other layer.
    positive = [fraction for fraction in fractions if fraction > 0]
    floor = min([*positive, density or 1.0]) / 4

    num_layers = len(names)
    # Wide enough for the names, and still a picture that a screen can show.
    width = min(18, max(6, 0.42 * num_layers + 1.5))
    figure = Figure(figsize=(width, 4.2), layout="constrained")
    axes = figure.subplots()
    heights = [max(fraction, floor) for fraction in fractions]
    colors = [BLUE if number else "none" for number in kept]
    axes.bar(range(num_layers), heights, color=colors, width=0.75)
    _label_bars(axes, kept, heights, floor)
    _draw_density(axes, density)
    _dress_layers(axes, names, floor)
    _add_layers_title(axes, row)
    return figure


def _label_bars(axes: Axes, kept: Sequence[int], heights: Sequence[float], floor: float) -> None:
    """Writes the number of weights above each bar, or only marks empty layers if there are many."""
    for place, (number, height) in enumerate(zip(kept, heights, strict=True)):
        if len(kept) <= _MAX_LABELS:
            axes.annotate(
                f"{number:,}" if number else "empty",
                (place, height),
                xytext=(0, 3),
                textcoords="offset points",
                rotation=90,
                ha="center",
                va="bottom",
                fontsize=7,
                color=BLUE if number else RED,
            )
        elif not number:
            axes.plot(place, floor * 1.2, "x", color=RED, markersize=4)


def _draw_density(axes: Axes, density: float) -> None:
    """Draws the fraction kept in the whole network, as a line with its value at the right."""
    axes.axhline(density, color=GREY, linestyle="--", linewidth=1)
    axes.annotate(
        f"{100 * density:.3g} %\nof all",
        (1, density),
        xycoords=("axes fraction", "data"),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize=7,
        color="#555555",
        annotation_clip=False,
    )


def _dress_layers(axes: Axes, names: Sequence[str], floor: float) -> None:
    axes.set_yscale("log")
    # Room above 1 for the labels of full layers.
    top = (1 / floor) ** 0.25
    axes.set_ylim(floor, top)
    powers = [10.0**-power for power in range(9)]
    ticks = [power for power in powers if power >= floor]
    axes.set_yticks(ticks)
    axes.minorticks_off()
    axes.set_ylabel("fraction of weights kept")

    num_layers = len(names)
    axes.set_xlim(-0.6, num_layers - 0.4)
    step = -(-num_layers // _MAX_NAMES)
    places = range(0, num_layers, step)
    shown = [name.removesuffix("/kernel") for name in names[::step]]
    rotation = 90 if num_layers > 8 else 0
    axes.set_xticks(places, shown, rotation=rotation, fontsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def _add_layers_title(axes: Axes, row: Mapping[str, Any]) -> None:
    kept, total, reached = row["kept"], row["total"], row["reached_compression"]
    title = (
        f"{row['model']}, {row['pruner']}, compression {reached:,.4g}: "
        f"{kept:,} of {total:,} weights"
    )
    color = "black"
    if row["collapsed"]:
        title += ", COLLAPSED"
        color = RED
    axes.set_title(title, fontsize=9, color=color)


def curve(row: Mapping[str, Any], epochs: Sequence[Mapping[str, float]]) -> Figure:
    """Draws loss and accuracy of one training run over its epochs.

    Args:
      row: a training row of `rows.jsonl`.
      epochs: the means of each epoch, as the file of the run's curve has them.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_metric(left, epochs, "loss", "loss", 1)
    _draw_metric(right, epochs, "top1", "top-1 accuracy, %", 100)
    kept, total = row["kept"], row["total"]
    last = 100 * row["last"]["test_top1"]
    best = 100 * row["best"]["test_top1"]
    best_epoch = row["best"]["epoch"]
    figure.suptitle(
        f"{row['model']} on {row['dataset']}, {row['pruner']}, {kept:,} of {total:,} weights: "
        f"test top-1 {last:.2f} % at the end, {best:.2f} % in epoch {best_epoch}",
        fontsize=9,
    )
    return figure


def _draw_metric(
    axes: Axes, epochs: Sequence[Mapping[str, float]], metric: str, label: str, factor: int
) -> None:
    """Draws a metric of the training and the test images.

    Args:
      axes: to draw on.
      epochs: see `curve`.
      metric: "loss" or "top1".
      label: of the axis.
      factor: what values are multiplied by: 100 for per cent.
    """
    numbers = [epoch["epoch"] for epoch in epochs]
    # One or two points make no visible line.
    marker = "o" if len(numbers) < 3 else None
    for split, color in (("train", GREY), ("test", BLUE)):
        name = f"{split}_{metric}"
        values = [factor * epoch[name] for epoch in epochs]
        axes.plot(numbers, values, color=color, label=split, marker=marker, markersize=4)
    axes.set_xlabel("epoch")
    axes.set_ylabel(label)
    axes.locator_params("x", integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#eeeeee")
    axes.legend(frameon=False)


def save(figure: Figure, path: pathlib.Path) -> None:
    """Writes a picture atomically, in the format that the suffix of the path names.

    The same picture always gives the same bytes.
    """
    kind = path.suffix.removeprefix(".")
    # PDF would otherwise hold the present time.
    metadata = {"CreationDate": None} if kind == "pdf" else None
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=150, metadata=metadata)
    storage.write_bytes(path, buffer.getvalue())
