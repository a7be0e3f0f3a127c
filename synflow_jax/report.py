"""Floor 8. What a run prints: the network before it, a progress bar, a table of the layers after it."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import rich.console
import rich.progress
import rich.table

from synflow_jax import trees
from synflow_jax.pruning import PruneInfo
from synflow_jax.run import Network


def console() -> rich.console.Console:
    """Standard output; at least 100 columns wide where it is no terminal, so that logs hold whole tables."""
    output = rich.console.Console(highlight=False)
    return output if output.is_terminal else rich.console.Console(highlight=False, width=110)


def network(output: rich.console.Console, name: str, net: Network) -> None:
    """The network, in one line."""
    sizes = trees.sizes(net.mask)
    height, width, channels = net.input_shape
    output.print(
        f"[bold]{name}[/bold] on {height}x{width}x{channels}: {sum(sizes):,} prunable weights in {len(sizes)} layers, "
        f"maximal compression {net.max_compression:,.0f}"
    )


@contextlib.contextmanager
def progress(output: rich.console.Console, num_iterations: int) -> Iterator[Callable[[int, PruneInfo], None]]:
    """A progress bar; yields what `pruning.prune` takes as `on_progress`."""
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn("{task.fields[kept]}"),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TextColumn("left"),
        rich.progress.TimeRemainingColumn(),
    )
    with rich.progress.Progress(*columns, console=output) as bar:
        task = bar.add_task("compiling", total=num_iterations, kept="")

        def update(num_done: int, info: PruneInfo) -> None:
            kept = f"{int(info.kept[num_done - 1].sum()):,} weights kept" if num_done else ""
            bar.update(task, completed=num_done, description="pruning", kept=kept)

        yield update


def row(output: rich.console.Console, result: Mapping[str, Any]) -> None:
    """The layers of a run as a table, and what is left of the whole."""
    table = rich.table.Table(header_style="bold", box=rich.box.SIMPLE)
    for title in ("layer", "shape", "size", "kept", "fraction", "score"):
        table.add_column(title, justify="left" if title in ("layer", "shape") else "right", no_wrap=True)
    for layer in result["layers"]:
        style = "red" if layer["kept"] == 0 else ""
        table.add_row(
            layer["name"],
            "x".join(map(str, layer["shape"])),
            f"{layer['size']:,}",
            f"{layer['kept']:,}",
            f"{layer['kept'] / layer['size']:.5f}",
            f"{layer['score']:.4g}",
            style=style,
        )
    output.print(table)
    output.print(
        f"compression {result['reached_compression']:,.2f} (asked {result['compression']:g}, maximal "
        f"{result['max_compression']:,.0f}): {result['kept']:,} of {result['total']:,} weights, "
        f"{100 * result['multiply_adds_kept'] / result['multiply_adds']:.3g} % of the multiply-adds"
    )
    if result["collapsed"]:
        output.print("[bold red]collapsed: no path of kept weights leads from the input to the output[/bold red]")
    else:
        output.print(f"not collapsed: log10 of the path norm is {result['log10_objective']:.4f}")


def files(output: rich.console.Console, workdir: pathlib.Path, run_id: str) -> None:
    """Where everything lies."""
    for name, what in (
        (f"masks/{run_id}.safetensors", "the mask"),
        ("rows.jsonl", "one row a run"),
        ("layers.png", "the fraction kept in each layer"),
        ("config.json", "the config"),
    ):
        output.print(f"  {workdir / name}  [dim]{what}[/dim]", soft_wrap=True)
