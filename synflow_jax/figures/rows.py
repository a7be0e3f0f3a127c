"""Which rows a figure is drawn from, and what its titles say of them."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from synflow_jax import storage

Row = dict[str, Any]

RULES = ("random", "magnitude", "snip", "grasp", "synflow")  # the order of the paper's panels
BLUE, RED, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#999999"  # told apart by colour-blind readers


def read(folder: pathlib.Path) -> list[Row]:
    """The pruning rows of a folder.

    Raises:
      ValueError: there are none, or the file is damaged.
    """
    path = folder / "rows.jsonl"
    found = [row for row in storage.read_rows(path) if "layers" in row]  # rows of training have none
    if not found:
        missing = "holds no pruning row" if path.exists() else "does not exist"
        raise ValueError(
            f"--rows={str(folder)!r}: {path} {missing}. Make rows by prune.py, for instance python prune.py "
            f"--config=configs/fig4.py --workdir={folder}."
        )
    return found


def one_network(rows: Sequence[Row]) -> list[Row]:
    """The rows of the lowest seed. Raises ValueError if they are of several networks."""
    networks = {(row["model"], row["dataset"], row["config"]["width_multiplier"]) for row in rows}
    if len(networks) > 1:
        names = ", ".join(f"{model} on {dataset} at width {width:g}" for model, dataset, width in sorted(networks))
        raise ValueError(
            f"the rows are of {len(networks)} networks ({names}); a figure shows one: use a folder for each."
        )
    seed = min(row["seed"] for row in rows)
    return [row for row in rows if row["seed"] == seed]


def by(rows: Iterable[Row], key: Callable[[Row], Any], what: str) -> dict[Any, Row]:
    """{key(row): row}, in the order of the keys. Raises ValueError if two rows share a key."""
    found: dict[Any, Row] = {}
    for row in rows:
        if key(row) in found:
            raise ValueError(
                f"two rows are of the same {what}: {found[key(row)]['run_id']} and {row['run_id']}. They differ in "
                "another value of the config; the figure shows one: use a folder for each."
            )
        found[key(row)] = row
    return dict(sorted(found.items()))


def by_rule(rows: Iterable[Row]) -> dict[str, Row]:
    """For each rule, in the order of `RULES`, the row of the smallest compression: what all its rows share is there."""
    best: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: (row["compression"], row["run_id"]), reverse=True):
        best[row["pruner"]] = row
    return {rule: best[rule] for rule in RULES if rule in best}


def title(row: Row) -> str:
    """The network, whose images it takes, and the seed."""
    width = row["config"]["width_multiplier"]
    return f"{row['model']}{f' at width {width:g}' if width != 1 else ''}, {row['dataset']} input, seed {row['seed']}"


def rule_title(row: Row) -> str:
    """The rule, and for data-driven ones what it has scored."""
    scored = row["scored_dataset"]
    if scored is None:
        return str(row["pruner"])
    number = row["config"]["prune"]["examples_per_class"]
    return f"{row['pruner']} ({scored}{', enlarged' if scored == 'digits' else ''}, {number} a class)"


def panels(num: int, size: tuple[float, float]) -> tuple[Any, list[Any]]:
    """A figure with `num` panels in rows of three, and one place more for what they share: (figure, axes).

    Args:
      num: the number of panels.
      size: width and height of one of them, in inches.
    """
    from matplotlib.figure import Figure

    num_columns = min(3, num + 1)
    num_rows = -(-(num + 1) // num_columns)
    figure = Figure(figsize=(size[0] * num_columns, size[1] * num_rows), layout="constrained")
    axes = figure.subplots(num_rows, num_columns, squeeze=False).reshape(-1).tolist()
    for spare in axes[num:]:
        spare.set_axis_off()
    for ax in axes[:num]:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8)
    return figure, axes
