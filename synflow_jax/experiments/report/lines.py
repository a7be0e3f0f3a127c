"""Prints one fact about a run per line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console

from synflow_jax import trees

if TYPE_CHECKING:  # training takes a second to import, and prune.py does without it
    from synflow_jax.experiments.certificates import Verdict
    from synflow_jax.models import Network
    from synflow_jax.storage import Workdir
    from synflow_jax.training.forms import Form


def network(output: Console, name: str, net: Network, max_compression: float) -> None:
    """Prints the size of a network and its maximal compression."""
    sizes = trees.sizes(net.mask)
    total, num_layers = sum(sizes), len(sizes)
    shape = "x".join(map(str, net.input_shape))
    output.print(
        f"[bold]{name}[/bold] on {shape}: {total:,} prunable weights in {num_layers} layers, "
        f"maximal compression {max_compression:,.0f}"
    )


def already_done(output: Console, workdir: Workdir) -> None:
    """Prints that the row of an earlier command is used."""
    output.print(
        f"This run is already in {workdir}, from an earlier command; --overwrite runs it again."
    )


def pruned(output: Console, row: Mapping[str, Any]) -> None:
    """Prints the result of a pruning run, without its layers."""
    state = "[bold red]collapsed[/bold red]" if row["collapsed"] else "not collapsed"
    output.print(
        f"pruned by {row['pruner']} to compression {row['reached_compression']:,.4g}: "
        f"{row['kept']:,} of {row['total']:,} weights, {state}"
    )


def form(output: Console, chosen: Form) -> None:
    """Prints which form of the network is trained, and why."""
    name = "the smaller dense network" if chosen.compact else "the masked network"
    output.print(f"training [bold]{name}[/bold]: {chosen.explain()}", soft_wrap=True)


def recipe(output: Console, num_epochs: int, drops: Sequence[int]) -> None:
    """Prints the drops of the learning rate for which a run is too short, if there are any."""
    # Legal, for a short trial of a long recipe, but easily overlooked.
    late = [epoch for epoch in drops if epoch >= num_epochs]
    if late:
        output.print(
            f"train.drops={tuple(drops)}: the learning rate does not drop at {late} in "
            f"{num_epochs} epochs"
        )


def devices(output: Console, batch_size: int, num_devices: int, *, split: bool) -> None:
    """Prints how batches are split over the devices, if there are several.

    Args:
      output: to print to.
      batch_size: over all devices.
      num_devices: of this process.
      split: whether each batch is split over them.
    """
    if split:
        share = batch_size // num_devices
        output.print(f"{num_devices} devices, {share} images of each batch on each")
    elif num_devices > 1:
        output.print(
            f"[bold red]one device of {num_devices} is used: train.batch_size={batch_size} does "
            "not split evenly over them[/bold red]"
        )


def verdict(output: Console, found: Verdict) -> None:
    """Prints what the verification of a certificate found."""
    output.print(
        f"the certificate of {found.run_id} holds: none of its {found.num_iterations} iterations "
        f"pruned more than {found.largest_fraction:.6f} of what the smallest cut held (float64); "
        f"{found.kept:,} weights are left, and a path through them",
        soft_wrap=True,
    )
