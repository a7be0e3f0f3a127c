"""Lists the files that a run has written, with what each of them holds."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import jax
from rich.console import Console

from synflow_jax import trees

if TYPE_CHECKING:
    from synflow_jax.models import Network

_LAYERS = ("layers.png", "the fraction kept in each layer")
_ROW = ("rows.jsonl", "one row per run")


def files(output: Console, workdir: pathlib.Path, row: Mapping[str, Any]) -> None:
    """Lists the files of a pruning run."""
    listed = [(f"masks/{row['run_id']}.safetensors", "the mask")]
    # Only some runs have these, and their rows name the files.
    if "certificate" in row:
        listed.append((row["certificate"], "its certificate, which --verify checks"))
    if "units" in row:
        listed.append((row["units"], "the scores of its units"))
    _list(output, workdir, [*listed, _ROW, _LAYERS, ("config.json", "the config")])


def grid_files(output: Console, workdir: pathlib.Path) -> None:
    """Lists the files of a grid of pruning runs."""
    _list(output, workdir, [("masks/", "one mask per run"), _ROW])


def train_files(output: Console, workdir: pathlib.Path, run_id: str) -> None:
    """Lists the files of a training run."""
    listed = [
        (f"curves/{run_id}.csv", "loss and accuracy of every epoch"),
        ("curve.png", "the same as a picture"),
        (f"checkpoints/{run_id}", "parameters and state"),
        _ROW,
    ]
    _list(output, workdir, listed)


def sweep_files(output: Console, workdir: pathlib.Path) -> None:
    """Lists the files of a grid of training runs."""
    listed = [
        ("rows.jsonl", "two rows per run: pruning and training (rows-*.jsonl of each process)"),
        ("masks/", "one mask per run"),
        ("curves/", "loss and accuracy of every epoch"),
        ("checkpoints/", "parameters and state"),
    ]
    _list(output, workdir, listed)


def exported(
    output: Console, name: str, folder: pathlib.Path, network: Network, names: Iterable[str]
) -> None:
    """Prints the size of an exported network, and lists its files.

    Args:
      output: to print to.
      name: of the network.
      folder: of the files.
      network: with its mask.
      names: of the files.
    """
    kept_by_layer = [int(leaf.sum()) for leaf in jax.tree.leaves(network.mask)]
    kept = sum(kept_by_layer)
    total = sum(trees.sizes(network.mask))
    output.print(f"[bold]{name}[/bold]: {kept:,} of {total:,} weights kept")
    kinds = {
        f"{name}.torch.safetensors": "PyTorch's state dict",
        f"{name}.jax": "a program of jax.export, for any batch size",
    }
    listed = [(file, kinds.get(file, "the network, for networks.load")) for file in names]
    _list(output, folder, listed)


def _list(output: Console, folder: pathlib.Path, listed: Iterable[tuple[str, str]]) -> None:
    for name, content in listed:
        output.print(f"  {folder / name}  [dim]{content}[/dim]", soft_wrap=True)
