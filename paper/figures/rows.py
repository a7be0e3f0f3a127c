"""Which rows a figure is drawn from, and what its titles say of them."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from synflow_jax import storage
from synflow_jax.experiments.pictures import BLUE as BLUE
from synflow_jax.experiments.pictures import GREEN as GREEN
from synflow_jax.experiments.pictures import GREY as GREY
from synflow_jax.experiments.pictures import RED as RED

Row = dict[str, Any]

RULES = ("random", "magnitude", "snip", "grasp", "synflow")  # the order of the paper's panels


def read(folder: pathlib.Path) -> list[Row]:
    """The pruning rows of a folder.

    Raises:
      ValueError: there are none, or the file is damaged.
    """
    found = [
        row for row in storage.read_all_rows(folder) if "layers" in row
    ]  # rows of training have none
    if not found:
        raise ValueError(
            f"--rows={str(folder)!r}: {_nothing(folder, 'pruning')}. Make rows by prune.py, for instance python "
            f"prune.py --config=paper/configs/fig4.py --workdir={folder}."
        )
    return found


def read_trained(folders: Sequence[pathlib.Path]) -> list[Row]:
    """The training rows of several folders, with the pruning row as "pruning", None where it is missing, and "folder".

    Raises:
      ValueError: a folder has none, or a file is damaged.
    """
    found = []
    for folder in folders:
        every = storage.read_all_rows(folder)
        pruned = {row["run_id"]: row for row in every if "layers" in row}
        trained = [
            row for row in every if "prune_run_id" in row and "last" in row
        ]  # failed runs have no last epoch
        if not trained:
            raise ValueError(
                f"--rows={str(folder)!r}: {_nothing(folder, 'training')}. Make rows by train.py, for instance python "
                f"train.py --config=paper/configs/fig1_digits.py --workdir={folder}."
            )
        found += [
            {**row, "pruning": pruned.get(row["prune_run_id"]), "folder": str(folder)}
            for row in trained
        ]
    return found


def _nothing(folder: pathlib.Path, what: str) -> str:
    path = folder / "rows.jsonl"
    there = path.exists() or any(folder.glob("rows-*.jsonl"))
    return f"{path} holds no {what} row" if there else f"{path} does not exist"


def one_network(rows: Sequence[Row]) -> list[Row]:
    """The rows of the lowest seed. Raises ValueError if they are of several networks."""
    networks = {(row["model"], row["dataset"], row["config"]["width_multiplier"]) for row in rows}
    if len(networks) > 1:
        names = ", ".join(
            f"{model} on {dataset} at width {width:g}" for model, dataset, width in sorted(networks)
        )
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
    return f"{network_title(row)}, {row['dataset']} input, seed {row['seed']}"


def network_title(row: Row) -> str:
    """The network, and its width where that is not the published one."""
    width = row["config"]["width_multiplier"]
    return f"{row['model']}{f' at width {width:g}' if width != 1 else ''}"


def number(value: float) -> str:
    """A compression as it is written: three digits below 10, no fractions above.

    >>> number(3.1622776), number(64190.2)
    ('3.16', '64,190')
    """
    return f"{value:,.0f}" if value >= 10 else f"{value:.3g}"


def rule_title(row: Row) -> str:
    """The rule, and for data-driven ones what it has scored."""
    scored = row["scored_dataset"]
    if scored is None:
        return str(row["pruner"])
    number = row["config"]["prune"]["examples_per_class"]
    return (
        f"{row['pruner']} ({scored}{', enlarged' if scored == 'digits' else ''}, {number} a class)"
    )


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
