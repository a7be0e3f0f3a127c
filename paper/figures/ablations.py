"""The table of the ablations: for each rule what becomes of its accuracy when one thing about it is changed."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import rich.box
import rich.console
import rich.table

from synflow_jax import storage
from synflow_jax.experiments.config import PRUNERS

Row = dict[str, Any]

COLUMNS = (
    "rule",
    "what",
    "compression",
    "weights",
    "test top-1, %",
    "lowest to highest",
    "runs",
    "collapsed",
)
_WHAT = {
    "none": "as it is",
    "shuffle": "mask shuffled within layers",
    "reinitialize": "weights drawn anew",
    "invert": "scores inverted",
}


def table(folder: pathlib.Path) -> list[tuple[str, ...]]:
    """A row of the table for each kind of run in a folder, over its seeds, under the names of `COLUMNS`.

    Accuracies are those of the last epoch, "-" where a mask has not been trained.

    Raises:
      ValueError: there are no pruning rows, or they are of several networks.
    """
    rows = storage.read_all_rows(folder)
    pruned = [row for row in rows if "layers" in row]
    if not pruned:
        raise ValueError(
            f"--rows={str(folder)!r} holds no pruning row. Make rows by python train.py --config=paper/configs/ablations.py "
            f"--workdir={folder}."
        )
    networks = {(row["model"], row["dataset"], row["config"]["width_multiplier"]) for row in pruned}
    if len(networks) > 1:
        raise ValueError(
            f"the rows are of {len(networks)} networks, {sorted(networks)}: use a folder for each."
        )
    top1 = {
        row["prune_run_id"]: 100 * row["last"]["test_top1"] for row in rows if "prune_run_id" in row
    }
    kinds: dict[tuple[Any, ...], list[Row]] = {}
    for row in sorted(pruned, key=_order):
        kinds.setdefault(_order(row)[:-1], []).append(row)
    return [
        _line(runs, [top1[row["run_id"]] for row in runs if row["run_id"] in top1])
        for runs in kinds.values()
    ]


def _order(row: Row) -> tuple[Any, ...]:
    """What tells kinds of runs apart, in the order of the table, and the seed."""
    rule, ablation = row["pruner"], row.get("ablation", "none")
    return (
        PRUNERS.index(rule), row["compression"], list(_WHAT).index(ablation), row.get("mode", "eval"), row["scope"],
        row["schedule"], row["num_iterations"], not row.get("nested", True), row["seed"],
    )  # fmt: skip


def _line(runs: Sequence[Row], accuracies: Sequence[float]) -> tuple[str, ...]:
    row = runs[0]
    mean = f"{sum(accuracies) / len(accuracies):.2f}" if accuracies else "-"
    spread = f"{min(accuracies):.2f} to {max(accuracies):.2f}" if len(accuracies) > 1 else ""
    kept = sorted({run["kept"] for run in runs})
    weights = f"{kept[0]:,}" if len(kept) == 1 else f"{kept[0]:,} to {kept[-1]:,}"
    collapsed = str(sum(run["collapsed"] for run in runs) or "")
    return (
        row["pruner"], what(row), f"{row['compression']:,g}", weights, mean, spread, str(len(runs)), collapsed,
    )  # fmt: skip


def what(row: Row) -> str:
    """What is changed about a rule, in words; and its iterations, where there are several."""
    parts = [_WHAT[row.get("ablation", "none")]]
    if row.get("mode", "eval") == "train":
        parts.append("training mode")
    if row["scope"] == "local" and row["pruner"] not in ("uniform", "erk"):
        parts.append("by layer")
    n = row["num_iterations"]
    if n > 1:
        parts.append(
            f"{n} levels" if row["pruner"] == "imp" else f"{n} {row['schedule']} iterations"
        )
        if not row.get("nested", True):
            parts.append("with regrowth")
    elif row["pruner"] == "synflow":
        parts.append(f"1 {row['schedule']} iteration")
    return ", ".join(
        parts if parts == [_WHAT["none"]] else [part for part in parts if part != _WHAT["none"]]
    )


def markdown(lines: Iterable[Sequence[str]]) -> str:
    """The table as Markdown."""
    rows = [COLUMNS, ["---"] * len(COLUMNS), *lines]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def show(lines: Iterable[Sequence[str]]) -> None:
    """Prints the table."""
    shown = rich.table.Table(header_style="bold", box=rich.box.SIMPLE)
    for name in COLUMNS:
        shown.add_column(
            name, justify="left" if name in ("rule", "what") else "right", no_wrap=True
        )
    last = None
    for line in lines:
        if last not in (None, line[0]):
            shown.add_section()
        last = line[0]
        shown.add_row(*line)
    # As wide as it needs to be: a table that is cut says less than one that wraps.
    rich.console.Console(highlight=False, width=180).print(shown, soft_wrap=True)
