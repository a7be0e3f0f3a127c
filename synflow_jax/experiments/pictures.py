"""One run as a picture, and the writing of pictures."""

from __future__ import annotations

import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from synflow_jax import storage

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, RED, GREEN, GREY = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#999999",
)  # told apart by colour-blind readers


def layers(row: Mapping[str, Any]) -> Figure:
    """The fraction kept in every layer of one run, on a logarithmic axis, with the size of each layer behind it.

    Args:
      row: a row of `rows.jsonl`.
    """
    from matplotlib.figure import (
        Figure,  # here, so that its memory is not there while programs are compiled
    )

    names = [layer["name"].removesuffix("/kernel") for layer in row["layers"]]
    sizes = [layer["size"] for layer in row["layers"]]
    kept = [layer["kept"] for layer in row["layers"]]
    fractions = [k / size for k, size in zip(kept, sizes, strict=True)]
    density = row["kept"] / row["total"]
    floor = min([f for f in fractions if f > 0] + [density or 1.0]) / 4
    places = range(len(names))

    figure = Figure(figsize=(min(18, max(6, 0.42 * len(names) + 1.5)), 4.2), layout="constrained")
    axes = figure.subplots()
    axes.bar(
        places,
        [max(f, floor) for f in fractions],
        color=[BLUE if k else "none" for k in kept],
        width=0.75,
    )
    for place, (k, fraction) in enumerate(zip(kept, fractions, strict=True)):
        if len(names) <= 40:
            label = f"{k:,}" if k else "empty"
            axes.annotate(
                label, (place, max(fraction, floor)), xytext=(0, 3), textcoords="offset points", rotation=90,
                ha="center", va="bottom", fontsize=7, color=BLUE if k else RED,
            )  # fmt: skip
        elif not k:
            axes.plot(place, floor * 1.2, "x", color=RED, markersize=4)
    axes.axhline(density, color=GREY, linestyle="--", linewidth=1)
    axes.annotate(
        f"{100 * density:.3g} %\nof all", (1, density), xycoords=("axes fraction", "data"), xytext=(4, 0),
        textcoords="offset points", va="center", fontsize=7, color="#555555", annotation_clip=False,
    )  # fmt: skip
    axes.set_yscale("log")
    axes.set_ylim(floor, (1 / floor) ** 0.25)  # room for the labels of full layers
    axes.set_yticks([t for t in (10.0**-e for e in range(9)) if t >= floor])
    axes.minorticks_off()
    axes.set_xlim(-0.6, len(names) - 0.4)
    step = max(1, -(-len(names) // 60))
    axes.set_xticks(places[::step], names[::step], rotation=90 if len(names) > 8 else 0, fontsize=7)
    axes.set_ylabel("fraction of weights kept")
    axes.set_title(
        f"{row['model']}, {row['pruner']}, compression {row['reached_compression']:,.4g}: "
        f"{row['kept']:,} of {row['total']:,} weights"
        + (", COLLAPSED" if row["collapsed"] else ""),
        fontsize=9,
        color=RED if row["collapsed"] else "black",
    )
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def curve(row: Mapping[str, Any], epochs: Sequence[Mapping[str, float]]) -> Figure:
    """Loss and accuracy over the epochs of one training run.

    Args:
      row: a training row of `rows.jsonl`.
      epochs: its curve, an epoch a row; see `train_run.read_curve`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    number = [epoch["epoch"] for epoch in epochs]
    marker = "o" if len(number) < 3 else None
    for axes, metric, label, factor in zip(
        figure.subplots(1, 2),
        ("loss", "top1"),
        ("loss", "top-1 accuracy, %"),
        (1, 100),
        strict=True,
    ):
        for split, color in (("train", GREY), ("test", BLUE)):
            values = [factor * epoch[f"{split}_{metric}"] for epoch in epochs]
            axes.plot(number, values, color=color, label=split, marker=marker, markersize=4)
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#eeeeee")
        axes.legend(frameon=False)
    best = row["best"]
    figure.suptitle(
        f"{row['model']} on {row['dataset']}, {row['pruner']}, {row['kept']:,} of {row['total']:,} weights: test top-1 "
        f"{100 * row['last']['test_top1']:.2f} % at the end, {100 * best['test_top1']:.2f} % in epoch {best['epoch']}",
        fontsize=9,
    )
    return figure


def save(figure: Figure, path: pathlib.Path) -> None:
    """Writes a picture atomically, in the format of the file's ending; the same picture as the same bytes."""
    buffer = io.BytesIO()
    kind = path.suffix.removeprefix(".")
    figure.savefig(
        buffer, format=kind, dpi=150, metadata={"CreationDate": None} if kind == "pdf" else None
    )
    storage.write_bytes(path, buffer.getvalue())
