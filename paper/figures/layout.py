"""Lays out panels and dresses axes, the same way in every figure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

# matplotlib is imported inside functions: `python -m paper --help` does without it.
if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def panels(num: int, size: tuple[float, float]) -> tuple[Figure, list[Any]]:
    """Returns a figure with `num` panels in rows of three, and at least one place more.

    The place after the panels, `axes[num]`, has no axes: it is for a legend or a colour bar.

    Args:
      num: the number of panels.
      size: width and height of one panel, in inches.
    """
    from matplotlib.figure import Figure

    num_columns = min(3, num + 1)
    num_rows = -(-(num + 1) // num_columns)
    figsize = (size[0] * num_columns, size[1] * num_rows)
    figure = Figure(figsize=figsize, layout="constrained")
    axes = figure.subplots(num_rows, num_columns, squeeze=False).reshape(-1).tolist()
    for spare in axes[num:]:
        spare.set_axis_off()
    for ax in axes[:num]:
        hide_frame(ax)
        ax.tick_params(labelsize=8)
    return figure, axes


def hide_frame(ax: Axes) -> None:
    """Hides the upper and the right line of the frame."""
    ax.spines[["top", "right"]].set_visible(False)


def logarithmic(ax: Axes) -> None:
    """Makes both axes logarithmic."""
    ax.set_xscale("log")
    ax.set_yscale("log")
