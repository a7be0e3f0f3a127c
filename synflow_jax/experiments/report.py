"""What a run prints: the network before it, a progress bar, a table of the layers after it."""

from __future__ import annotations

import contextlib
import functools
import math
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import rich.console
import rich.live
import rich.markup
import rich.progress
import rich.table

from synflow_jax import certified, trees
from synflow_jax.experiments import config
from synflow_jax.experiments.certificates import Verdict
from synflow_jax.experiments.config import Config
from synflow_jax.experiments.prune_grid import Outcome
from synflow_jax.experiments.prune_run import Network
from synflow_jax.pruning import PruneInfo
from synflow_jax.storage.networks import Bundle

if TYPE_CHECKING:  # what trains takes a second to import, and prune.py does without
    from synflow_jax.experiments.train_run import Progress
    from synflow_jax.training.forms import Form


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


def num_iterations(settings: Config) -> int | None:
    """How many iterations a progress bar is for; None where the certified schedule finds out."""
    is_open = settings.prune.schedule == config.CERTIFIED and settings.prune.num_iterations is None
    return None if is_open else config.num_iterations(settings.prune)


@contextlib.contextmanager
def progress(
    output: rich.console.Console, num_iterations: int | None
) -> Iterator[Callable[[int, PruneInfo], None]]:
    """A progress bar; yields what `pruning.prune` takes as `on_progress`. None: it takes as many as it takes."""
    with rich.progress.Progress(*_columns(), console=output) as bar:
        task = bar.add_task("compiling", total=num_iterations, now="")

        def update(num_done: int, info: PruneInfo) -> None:
            kept = f"{int(info.kept[num_done - 1].sum()):,} weights kept" if num_done else ""
            bar.update(task, completed=num_done, description="pruning", now=kept)

        yield update


def _columns() -> tuple[rich.progress.ProgressColumn, ...]:
    """What a bar shows; its tasks have a field `now`: a text."""
    return (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn("{task.fields[now]}"),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TextColumn("passed,"),
        rich.progress.TimeRemainingColumn(),
        rich.progress.TextColumn("left"),
    )


@contextlib.contextmanager
def grid(
    output: rich.console.Console, runs: Sequence[Config]
) -> Iterator[tuple[Callable[[int, PruneInfo], None], Callable[[Outcome], None]]]:
    """A progress bar over the iterations of all runs, and a line a run.

    Yields what `prune_grid.run` takes as `on_progress`, and what is to be called with each of its outcomes.
    """
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.TextColumn("iteration"),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TextColumn("passed,"),
        rich.progress.TimeRemainingColumn(),
        rich.progress.TextColumn("left"),
    )
    # A certified run does not say beforehand how many it takes; the paper's number will do for a bar.
    iterations = [num_iterations(run) or 100 for run in runs]
    width = len(str(len(runs)))
    outcomes: list[Outcome] = []
    with rich.progress.Progress(*columns, console=output) as bar:
        task = bar.add_task(f"run 1 of {len(runs)}", total=sum(iterations))

        def update(num_done: int, info: PruneInfo) -> None:
            del info
            bar.update(task, completed=sum(iterations[: len(outcomes)]) + num_done)

        def show(outcome: Outcome) -> None:
            outcomes.append(outcome)
            number, prune = f"{len(outcomes):{width}}/{len(runs)}", outcome.settings.prune
            what = (
                f"{outcome.settings.model} {prune.pruner:<9} compression {f'{prune.compression:,.6g}':<10} "
                f"{prune.schedule} n={num_iterations(outcome.settings) or 'open'} seed {outcome.settings.seed}"
            )
            output.print(f"{number}  {what}: {_outcome(outcome)}", soft_wrap=True)
            following = min(len(outcomes) + 1, len(runs))
            bar.update(
                task,
                completed=sum(iterations[: len(outcomes)]),
                description=f"run {following} of {len(runs)}",
            )

        yield update, show


def _outcome(outcome: Outcome) -> str:
    if outcome.row is None:
        return f"[bold red]failed:[/bold red] {rich.markup.escape(str(outcome.error))}"
    kept = f"{outcome.row['kept']:,} kept"
    if outcome.row["collapsed"]:
        kept += ", [red]collapsed[/red]"
    return kept + (", already there" if outcome.found else f", {outcome.row['seconds']:.1f} s")


def grid_files(output: rich.console.Console, workdir: pathlib.Path) -> None:
    """Where everything lies."""
    _files(output, workdir, ("masks/", "a mask a run"), ("rows.jsonl", "a row a run"))


def row(output: rich.console.Console, result: Mapping[str, Any]) -> None:
    """The layers of a run as a table, and what is left of the whole."""
    table = rich.table.Table(header_style="bold", box=rich.box.SIMPLE)
    for title in ("layer", "shape", "size", "kept", "fraction", "score"):
        table.add_column(
            title, justify="left" if title in ("layer", "shape") else "right", no_wrap=True
        )
    for layer in result["layers"]:
        style = "red" if layer["kept"] == 0 else ""
        table.add_row(
            layer["name"],
            "x".join(map(str, layer["shape"])),
            f"{layer['size']:,}",
            f"{layer['kept']:,}",
            f"{layer['kept'] / layer['size']:.5f}",
            _in_units(layer["score"], result["iterations"]["log2_unit"][-1]),
            style=style,
        )
    output.print(table)
    output.print(
        f"compression {result['reached_compression']:,.2f} (asked {result['compression']:g}, maximal "
        f"{result['max_compression']:,.0f}): {result['kept']:,} of {result['total']:,} weights, "
        f"{100 * result['multiply_adds_kept'] / result['multiply_adds']:.3g} % of the multiply-adds"
    )
    if result["collapsed"]:
        output.print(
            "[bold red]collapsed: no path of kept weights leads from the input to the output[/bold red]"
        )
    else:
        output.print(f"not collapsed: log10 of the path norm is {result['log10_objective']:.4f}")
    _cuts(output, result)


def _cuts(output: rich.console.Console, result: Mapping[str, Any]) -> None:
    """What SynFlow's iterations pruned of a cut, and whether a certified run got as far as it was asked to."""
    fraction = result["largest_cut_fraction"]
    if fraction is not None and fraction < 1:
        output.print(
            f"no iteration of {len(result['iterations']['kept'])} pruned more than {fraction:.3f} of what the smallest "
            "cut held, so none can have disconnected the network (Theorem 3)"
        )
    elif fraction is not None:
        end = "and no path is left" if result["collapsed"] else "a path was left by luck"
        output.print(f"an iteration pruned {fraction:.3g} times what the smallest cut held: {end}")
    asked = certified.num_kept(result["total"], result["compression"])
    if result["schedule"] == config.CERTIFIED and result["kept"] > asked:
        output.print(
            f"[bold red]{result['kept']:,} weights are left, not {asked:,}:[/bold red] every one of them carries all "
            "of the flow, or prune.num_iterations was too small"
        )


def _in_units(score: float, log2_unit: int) -> str:
    """score * 2^log2_unit, which may be beyond every float."""
    if score <= 0 or abs(log2_unit) < 900:
        return f"{score * 2.0**log2_unit:.4g}"
    digits = math.log10(score) + log2_unit * math.log10(2)
    return f"{10 ** (digits % 1):.3f}e+{math.floor(digits)}"


@contextlib.contextmanager
def verification(output: rich.console.Console) -> Iterator[Callable[[int, int], None]]:
    """A progress bar; yields what `certificates.verify` takes as `on_progress`."""
    with rich.progress.Progress(*_columns(), console=output) as bar:
        task = bar.add_task("verifying", total=None, now="")
        yield lambda num_done, total: bar.update(task, completed=num_done, total=total)


def verdict(output: rich.console.Console, result: Verdict) -> None:
    """What the verification of a certificate found."""
    output.print(
        f"the certificate of {result.run_id} holds: none of its {result.num_iterations} iterations pruned more than "
        f"{result.largest_fraction:.6f} of what the smallest cut held (float64); {result.kept:,} weights are left, and "
        "a path through them",
        soft_wrap=True,
    )


class Cells:
    """The table of a sweep while it fills: a line for all that a grid varies but compression and seed."""

    def __init__(self, runs: Sequence[Config]) -> None:
        self.varying = [
            key for key in config.grid_keys(runs[0]) if len({_value(run, key) for run in runs}) > 1
        ]
        self.lines = [key for key in self.varying if key not in ("seed", "prune.compression")]
        self.runs = {config.train_id(run): run for run in runs}
        self.fraction = dict.fromkeys(self.runs, 0.0)
        self.outcomes: dict[str, Outcome] = {}
        self.earlier = 0  # of the outcomes, those that were there before
        self.started = time.monotonic()

    def __rich__(self) -> rich.console.RenderableType:
        """The table, and how long it will take."""
        line = lambda run: tuple(str(_value(run, key)) for key in self.lines)
        compressions = sorted({run.prune.compression for run in self.runs.values()})
        table = rich.table.Table(header_style="bold", box=rich.box.SIMPLE)
        for key in self.lines:
            table.add_column(key.removeprefix("prune."), no_wrap=True)
        for compression in compressions:
            table.add_column(f"{compression:,.4g}", justify="right", no_wrap=True)
        for label in dict.fromkeys(map(line, self.runs.values())):
            cells = (
                [
                    i
                    for i, run in self.runs.items()
                    if line(run) == label and run.prune.compression == compression
                ]
                for compression in compressions
            )
            table.add_row(*label, *map(self._cell, cells))
        return rich.console.Group(table, self._state())

    def _cell(self, run_ids: Sequence[str]) -> str:
        if not run_ids:
            return ""
        found = [self.outcomes[run_id] for run_id in run_ids if run_id in self.outcomes]
        rows = [outcome.row for outcome in found if outcome.row is not None]
        text = ""
        if rows:
            text = f"{100 * sum(row['last']['test_top1'] for row in rows) / len(rows):.1f}"
        if len(rows) < len(found):
            text += f" [bold red]{len(found) - len(rows)} failed[/bold red]"
        if len(found) < len(run_ids):
            done = sum(
                self.fraction[run_id] for run_id in run_ids if run_id not in self.outcomes
            ) + len(found)
            text += f" [dim]{100 * done / len(run_ids):.0f} %[/dim]" if done else " [dim]-[/dim]"
        return text.strip()

    def _state(self) -> str:
        done = (
            len(self.outcomes)
            - self.earlier
            + sum(
                fraction
                for run_id, fraction in self.fraction.items()
                if run_id not in self.outcomes
            )
        )
        passed, to_do = time.monotonic() - self.started, len(self.runs) - self.earlier
        left = (
            f"about {_clock(passed * (to_do - done) / done)} left" if done and done < to_do else ""
        )
        failed = sum(outcome.row is None for outcome in self.outcomes.values())
        parts = (
            f"{len(self.outcomes)} of {len(self.runs)} runs finished",
            f"{self.earlier} of them from an earlier time" if self.earlier else "",
            f"[bold red]{failed} failed[/bold red]" if failed else "",
            f"{_clock(passed)} passed",
            left,
        )
        return "top-1 in %, mean over seeds; " + ", ".join(part for part in parts if part)


def _value(run: Config, key: str) -> Any:
    return functools.reduce(getattr, key.split("."), run)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


@contextlib.contextmanager
def sweep(
    output: rich.console.Console, runs: Sequence[Config]
) -> Iterator[tuple[Callable[[Config, str, float], None], Callable[[Outcome], None]]]:
    """A table that fills, and a line a run. Yields `sweep.run`'s `on_progress`, and what takes its outcomes."""
    cells = Cells(runs)
    with rich.live.Live(cells, console=output, refresh_per_second=1, transient=False):

        def update(settings: Config, what: str, fraction: float) -> None:
            del what
            cells.fraction[config.train_id(settings)] = fraction

        def show(outcome: Outcome) -> None:
            cells.outcomes[config.train_id(outcome.settings)] = outcome
            cells.earlier += outcome.found
            if not outcome.found:
                named = " ".join(
                    f"{key.removeprefix('prune.')}={_value(outcome.settings, key)}"
                    for key in cells.varying
                )
                output.print(f"{named}: {_trained(outcome)}", soft_wrap=True)

        yield update, show


def _trained(outcome: Outcome) -> str:
    if outcome.row is None:
        return f"[bold red]failed:[/bold red] {rich.markup.escape(str(outcome.error))}"
    row = outcome.row
    return f"{row['kept']:,} of {row['total']:,} weights, test top-1 {100 * row['last']['test_top1']:.2f} %"


def sweep_files(output: rich.console.Console, workdir: pathlib.Path) -> None:
    """Where everything lies."""
    _files(
        output,
        workdir,
        (
            "rows.jsonl",
            "two rows a run, of its pruning and its training (rows-*.jsonl of several processes)",
        ),
        ("masks/", "a mask a run"),
        ("curves/", "loss and accuracy of every epoch"),
        ("checkpoints/", "parameters and state"),
    )


def pruned(output: rich.console.Console, result: Mapping[str, Any]) -> None:
    """A pruning run in one line."""
    state = "[bold red]collapsed[/bold red]" if result["collapsed"] else "not collapsed"
    output.print(
        f"pruned by {result['pruner']} to compression {result['reached_compression']:,.4g}: {result['kept']:,} of "
        f"{result['total']:,} weights, {state}"
    )


def form(output: rich.console.Console, chosen: Form) -> None:
    """Which network is trained, and why."""
    what = "the smaller dense network" if chosen.compact else "the masked network"
    output.print(f"training [bold]{what}[/bold]: {chosen.reason}", soft_wrap=True)


def recipe(output: rich.console.Console, num_epochs: int, drops: Sequence[int]) -> None:
    """Drops of the learning rate that this run is too short for; nothing where there are none."""
    late = [epoch for epoch in drops if epoch >= num_epochs]
    if late:
        output.print(
            f"train.drops={tuple(drops)}: the learning rate does not drop at {late} in {num_epochs} epochs"
        )


def devices(
    output: rich.console.Console, batch_size: int, num_devices: int, *, split: bool
) -> None:
    """How a batch lies on the devices; nothing where there is one device."""
    if split:
        output.print(
            f"{num_devices} devices, {batch_size // num_devices} images of each batch on each"
        )
    elif num_devices > 1:
        output.print(
            f"[bold red]one device of {num_devices} is used: train.batch_size={batch_size} does not split evenly over "
            "them[/bold red]"
        )


@contextlib.contextmanager
def training(
    output: rich.console.Console, num_epochs: int, first_step: int = 0
) -> Iterator[Callable[[Progress], None]]:
    """A progress bar and a line an epoch; yields what `train_run.train` takes as `on_progress`."""
    with rich.progress.Progress(*_columns(), console=output) as bar:
        task = bar.add_task("compiling", total=None, now="")
        seen: list[int] = []

        def update(now: Progress) -> None:
            if now.step > first_step and not seen:
                output.print(
                    f"going on after step {now.step} of {now.num_steps}, from the last checkpoint"
                )
            seen.append(now.step)
            if now.finished is not None:
                done = now.finished
                output.print(
                    f"epoch {now.step * num_epochs // now.num_steps}/{num_epochs}: "
                    f"train loss {done['train_loss']:.4f}, top-1 {100 * done['train_top1']:.2f} %; "
                    f"test loss {done['test_loss']:.4f}, top-1 {100 * done['test_top1']:.2f} %, "
                    f"top-5 {100 * done['test_top5']:.2f} %; {now.images_per_second:,.0f} images/s"
                )
            text = f"{now.images_per_second:,.0f} images/s"
            if now.loss == now.loss:  # no step of this epoch yet: NaN
                text = f"loss {now.loss:.4f}, top-1 {100 * now.top1:.2f} %, {text}"
            bar.update(
                task,
                total=now.num_steps,
                completed=now.step,
                description=f"epoch {now.epoch + 1}/{num_epochs}",
                now=text,
            )

        yield update


@contextlib.contextmanager
def levels(
    output: rich.console.Console, num_levels: int
) -> Iterator[Callable[[int, Progress], None]]:
    """A progress bar and a line a level; yields what `imp_run.find_or_make_mask` takes as `on_progress`."""
    with rich.progress.Progress(*_columns(), console=output) as bar:
        task = bar.add_task("compiling", total=None, now="")

        def update(level: int, now: Progress) -> None:
            name = f"level {level}/{num_levels}" if level else "to the step that is rewound to"
            if level and now.finished is not None and now.step == now.num_steps:
                done = now.finished
                output.print(
                    f"{name}: test loss {done['test_loss']:.4f}, top-1 {100 * done['test_top1']:.2f} %"
                )
            text = f"{now.images_per_second:,.0f} images/s"
            bar.update(task, total=now.num_steps, completed=now.step, description=name, now=text)

        yield update


def trained(
    output: rich.console.Console, result: Mapping[str, Any], timing: Mapping[str, Any] | None = None
) -> None:
    """What was trained and what a step took, and the last and the best epoch of a training run."""
    _sizes(output, result, timing)
    table = rich.table.Table(header_style="bold", box=rich.box.SIMPLE)
    for title in (
        "",
        "epoch",
        "train loss",
        "train top-1",
        "test loss",
        "test top-1",
        "test top-5",
    ):
        table.add_column(title, justify="right")
    for which in ("last", "best"):
        at = result[which]
        table.add_row(
            which,
            str(at["epoch"]),
            f"{at['train_loss']:.4f}",
            f"{100 * at['train_top1']:.2f} %",
            f"{at['test_loss']:.4f}",
            f"{100 * at['test_top1']:.2f} %",
            f"{100 * at['test_top5']:.2f} %",
        )
    output.print(table)
    output.print(
        "The best epoch is chosen by the test accuracy, as in the paper; the last one is chosen by nothing."
    )


def _sizes(
    output: rich.console.Console, result: Mapping[str, Any], timing: Mapping[str, Any] | None
) -> None:
    """Rows of before there were compact networks say nothing of sizes."""
    if "size" not in result:
        return
    size = result["size"]
    full = size["full"]
    table = rich.table.Table(header_style="bold", box=rich.box.SIMPLE)
    for title in ("network", "weights", "", "multiply-adds", ""):
        table.add_column(title, justify="left" if title == "network" else "right")
    names = {"full": "full", "kept": "full, without what is pruned", "compact": "smaller, dense"}
    for key, name in names.items():
        if size[key] is not None:
            numbers = ((size[key][what], full[what]) for what in ("weights", "multiply_adds"))
            trained = key == ("compact" if result["compact"] else "full")
            table.add_row(
                name + (" (trained, masked)" if trained else ""),
                *(
                    text
                    for count, whole in numbers
                    for text in (f"{count:,}", f"{100 * count / whole:.3g} %")
                ),
            )
    output.print(table)
    if timing is not None and timing.get("step_seconds"):
        seconds, batch_size = timing["step_seconds"], result["config"]["train"]["batch_size"]
        output.print(
            f"{1000 * seconds:.4g} ms a step of {batch_size} images, {batch_size / seconds:,.0f} images/s"
        )


def train_files(output: rich.console.Console, workdir: pathlib.Path, run_id: str) -> None:
    """Where everything lies."""
    _files(
        output,
        workdir,
        (f"curves/{run_id}.csv", "loss and accuracy of every epoch"),
        ("curve.png", "the same as a picture"),
        (f"checkpoints/{run_id}", "parameters and state"),
        ("rows.jsonl", "one row a run"),
    )


def exported(
    output: rich.console.Console, name: str, folder: pathlib.Path, network: Bundle, names: list[str]
) -> None:
    """What was exported, in one line, and where it lies."""
    kept, total = (
        sum(int(f(leaf)) for leaf in jax.tree.leaves(network.mask)) for f in (jnp.sum, jnp.size)
    )
    output.print(f"[bold]{name}[/bold]: {kept:,} of {total:,} weights kept")
    kinds = {
        "torch.safetensors": "PyTorch's state dict",
        "jax": "a program of jax.export, for any batch size",
    }
    _files(
        output,
        folder,
        *[(n, kinds.get(n.removeprefix(f"{name}."), "the network; networks.load")) for n in names],
    )


def files(output: rich.console.Console, workdir: pathlib.Path, result: Mapping[str, Any]) -> None:
    """Where everything lies."""
    more = (
        ("certificate", "its certificate, which --verify looks at again"),
        ("units", "the scores of its units"),
    )
    _files(
        output,
        workdir,
        (f"masks/{result['run_id']}.safetensors", "the mask"),
        *[(result[name], what) for name, what in more if name in result],
        ("rows.jsonl", "one row a run"),
        ("layers.png", "the fraction kept in each layer"),
        ("config.json", "the config"),
    )


def _files(output: rich.console.Console, workdir: pathlib.Path, *files: tuple[str, str]) -> None:
    for name, what in files:
        output.print(f"  {workdir / name}  [dim]{what}[/dim]", soft_wrap=True)
