"""Fig. 3: conservation by unit. What enters each hidden unit against what leaves it, a dot a unit, a panel a rule."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from paper.figures import rows as select
from paper.figures.rows import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(rows: Sequence[Row], folder: pathlib.Path) -> Figure:
    """Draws Fig. 3. Scores are those before anything is pruned; negative sums, of GraSP and random, by their size.

    A unit whose score is 0 on a side has no place on a logarithmic axis; the title says how many there are.

    Args:
      rows: of one network, with a recorded run of each rule that is to be drawn.
      folder: where the files of the units lie, under the names that the rows give.

    Raises:
      ValueError: the rows are of several networks, or none of them was recorded, or a file is damaged.
    """
    import matplotlib

    by_rule = select.by_rule([row for row in select.one_network(rows) if row.get("units")])
    if not by_rule:
        raise ValueError(
            f"--rows={str(folder)!r}: no row has the scores of its units. Make them by paper/configs/fig3.py, or by any "
            "config with --config.prune.record_units."
        )
    figure, axes = select.panels(len(by_rule), (3.0, 2.9))
    colors = matplotlib.colormaps["viridis"]
    for ax, row in zip(axes, by_rule.values(), strict=False):
        units = read_units(folder / row["units"])
        shades = np.linspace(0, 0.9, len(units))
        left_out, negative = 0, 0
        drawn = [np.zeros((2, 0))]
        # The last layers first: they have the most units, and would cover the others.
        for shade, (incoming, outgoing) in reversed(list(zip(shades, units.values(), strict=True))):
            positive = (incoming != 0) & (outgoing != 0)
            left_out += int(np.sum(~positive))
            negative += int(np.sum(((incoming < 0) | (outgoing < 0)) & positive))
            drawn.append(np.abs(np.stack([incoming[positive], outgoing[positive]])))
            ax.scatter(*drawn[-1], color=colors(shade), s=3, linewidths=0, rasterized=True)
        everything = np.concatenate(drawn, axis=1)
        notes = ["absolute values"] * (row["pruner"] == "snip")
        notes += [f"{negative:,} of {everything.shape[1]:,} units negative"] * (negative > 0)
        notes += [f"{left_out:,} at 0 left out"] * (left_out > 0)
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xlabel("incoming score", fontsize=8)
        ax.set_ylabel("outgoing score", fontsize=8)
        ratios = ""
        if everything.size:
            ends = [everything.min() / 2, everything.max() * 2]
            ax.plot(ends, ends, ":", color="black", linewidth=1.2, zorder=3)
            ax.set_xlim(ends)
            ax.set_ylim(ends)
            ax.set_aspect("equal")
            low, high = np.quantile(everything[1] / everything[0], (0.05, 0.95))
            ratios = f"out / in: {low:.2g} to {high:.2g} (5 to 95 %)"
        ax.set_title(f"{select.rule_title(row)}\n{ratios}\n{', '.join(notes)}", fontsize=8)
    spare = axes[len(by_rule)]
    names = list(units)
    for place in sorted({0, len(names) // 3, 2 * len(names) // 3, len(names) - 1}):
        shade = 0.9 * place / max(1, len(names) - 1)
        spare.scatter([], [], color=colors(shade), s=20, label=names[place].removesuffix("/kernel"))
    spare.plot([], [], ":", color="black", label="conserved")
    spare.legend(frameon=False, fontsize=8, loc="center", title="units of", title_fontsize=8)
    figure.suptitle(
        f"Score of each hidden unit before pruning, in and out: {select.title(rows[0])}",
        fontsize=10,
    )
    return figure


def read_units(path: pathlib.Path) -> Mapping[str, tuple[np.ndarray, np.ndarray]]:
    """{group of units: (incoming, outgoing)}, each an array with an entry a unit."""
    try:
        groups = json.loads(path.read_text())
        return {
            name: (np.array(g["incoming"], float), np.array(g["outgoing"], float))
            for name, g in groups.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"the file of the units {str(path)!r} cannot be read: {error!r}. Run prune.py again with --overwrite."
        ) from error
