"""Makes the table of the ablations: the accuracy of a rule when one thing about it is changed."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import rich.box
import rich.console
import rich.table

from paper.figures import rows as select
from paper.figures import titles
from paper.figures.rows import Row
from synflow_jax.experiments.rules import PRUNERS

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
_LEFT_ALIGNED = ("rule", "what")
_UNCHANGED = "as it is"
_WORDS = {
    "none": _UNCHANGED,
    "shuffle": "mask shuffled within layers",
    "reinitialize": "weights drawn anew",
    "invert": "scores inverted",
}


def table(folder: pathlib.Path) -> list[tuple[str, ...]]:
    """Returns a line for each kind of run in a folder, over its seeds, with a text per column.

    Accuracies are those of the last epoch, and "-" for a mask that was not trained.

    Raises:
      ValueError: there are no pruning rows, or they are of several networks.
    """
    pruned, trained = select.read_both(folder)
    if not pruned:
        raise ValueError(
            f"--rows={str(folder)!r} holds no pruning row. Make rows by python train.py "
            f"--config=paper/configs/ablations.py --workdir={folder}."
        )
    networks = {(row["model"], row["dataset"], row["config"]["width_multiplier"]) for row in pruned}
    if len(networks) > 1:
        raise ValueError(
            f"the rows are of {len(networks)} networks, {sorted(networks)}: use a folder for each."
        )
    top1 = {row["prune_run_id"]: 100 * row["last"]["test_top1"] for row in trained}
    in_order = sorted(pruned, key=lambda row: (_kind(row), row["seed"]))
    by_kind: dict[tuple[Any, ...], list[Row]] = {}
    for row in in_order:
        by_kind.setdefault(_kind(row), []).append(row)
    lines = []
    for runs in by_kind.values():
        accuracies = [top1[row["run_id"]] for row in runs if row["run_id"] in top1]
        lines.append(_line(runs, accuracies))
    return lines


def _kind(row: Row) -> tuple[Any, ...]:
    """Returns what tells kinds of runs apart, in the order of the table."""
    return (
        list(PRUNERS).index(row["pruner"]),
        row["compression"],
        list(_WORDS).index(row.get("ablation", "none")),
        row.get("mode", "eval"),
        row["scope"],
        row["schedule"],
        row["num_iterations"],
        not row.get("nested", True),
    )


def _line(runs: Sequence[Row], accuracies: Sequence[float]) -> tuple[str, ...]:
    first = runs[0]
    mean, spread = "-", ""
    if accuracies:
        mean = f"{sum(accuracies) / len(accuracies):.2f}"
    if len(accuracies) > 1:
        spread = f"{min(accuracies):.2f} to {max(accuracies):.2f}"
    kept = sorted({run["kept"] for run in runs})
    weights = f"{kept[0]:,}" if len(kept) == 1 else f"{kept[0]:,} to {kept[-1]:,}"
    num_collapsed = sum(run["collapsed"] for run in runs)
    return (
        first["pruner"],
        what(first),
        f"{first['compression']:,g}",
        weights,
        mean,
        spread,
        str(len(runs)),
        str(num_collapsed or ""),
    )


def what(row: Row) -> str:
    """Returns in words what is changed about a rule, and its iterations if there are several."""
    changes = []
    if row.get("ablation", "none") != "none":
        changes.append(_WORDS[row["ablation"]])
    if row.get("mode", "eval") == "train":
        changes.append("training mode")
    # Uniform and ERK are local by definition.
    if row["scope"] == "local" and row["pruner"] not in ("uniform", "erk"):
        changes.append("by layer")
    changes += _iterations_in_words(row)
    return ", ".join(changes) or _UNCHANGED


def _iterations_in_words(row: Row) -> list[str]:
    number, schedule = row["num_iterations"], row["schedule"]
    if number == 1:
        # Only for SynFlow is a single iteration a change.
        return [f"1 {schedule} iteration"] if row["pruner"] == "synflow" else []
    if row["pruner"] == "imp":
        words = [titles.plural(number, "level")]
    else:
        words = [f"{number} {schedule} iterations"]
    if not row.get("nested", True):
        words.append("with regrowth")
    return words


def markdown(lines: Iterable[Sequence[str]]) -> str:
    """Returns the table as Markdown."""
    rows = [COLUMNS, ["---"] * len(COLUMNS), *lines]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def show(lines: Iterable[Sequence[str]]) -> None:
    """Prints the table, with a rule between pruning rules."""
    shown = rich.table.Table(header_style="bold", box=rich.box.SIMPLE)
    for name in COLUMNS:
        justify: Any = "left" if name in _LEFT_ALIGNED else "right"
        shown.add_column(name, justify=justify, no_wrap=True)
    last = None
    for line in lines:
        if last not in (None, line[0]):
            shown.add_section()
        last = line[0]
        shown.add_row(*line)
    # As wide as it needs to be: a table that is cut off loses columns, one that wraps does not.
    rich.console.Console(highlight=False, width=180).print(shown, soft_wrap=True)
