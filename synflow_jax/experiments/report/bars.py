"""Shows progress bars. Each is a context manager that yields the callback that moves it."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence

import rich.progress
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn

from synflow_jax import certified
from synflow_jax.experiments.events import Event, EventFn, Failed, Finished, Outcome, Pruning
from synflow_jax.experiments.report.style import error
from synflow_jax.experiments.run import Run
from synflow_jax.pruning import PruneInfo

# A certified run does not know its number of iterations beforehand; a bar of a grid takes the
# paper's usual number for it.
_USUAL_ITERATIONS = 100


def columns() -> tuple[ProgressColumn, ...]:
    """Returns the columns of a bar. Its tasks need the field `now`: a text about the last step."""
    return (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[now]}"),
        *_times(),
    )


def _times() -> tuple[ProgressColumn, ...]:
    return (
        rich.progress.TimeElapsedColumn(),
        TextColumn("passed,"),
        rich.progress.TimeRemainingColumn(),
        TextColumn("left"),
    )


def num_iterations(run: Run) -> int | None:
    """Returns the number of iterations of a run, or None for a certified run without a limit."""
    is_open = run.is_certified and run.num_iterations == certified.MAX_ITERATIONS
    return None if is_open else run.num_iterations


def kept(info: PruneInfo, num_done: int) -> str:
    """Returns how many weights are kept after some iterations, in words."""
    # Before the first iteration the record is empty.
    if num_done == 0:
        return ""
    num_kept = int(info.kept[num_done - 1].sum())
    return f"{num_kept:,} weights kept"


@contextlib.contextmanager
def progress(
    output: Console, num_iterations: int | None
) -> Iterator[Callable[[int, PruneInfo], None]]:
    """Shows the iterations of a pruning run. Yields `on_progress` of `pruning.prune`.

    Args:
      output: to print to.
      num_iterations: None if it is not known.
    """
    with rich.progress.Progress(*columns(), console=output) as bar:
        task = bar.add_task("compiling", total=num_iterations, now="")

        def update(num_done: int, info: PruneInfo) -> None:
            now = kept(info, num_done)
            bar.update(task, completed=num_done, description="pruning", now=now)

        yield update


@contextlib.contextmanager
def grid(output: Console, runs: Sequence[Run]) -> Iterator[EventFn]:
    """Shows the iterations of all runs of a grid, and prints a line for each run that ends.

    Yields a function that takes the events and the outcomes of `masks.prune_all`.
    """
    shown = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("iteration"),
        MofNCompleteColumn(),
        *_times(),
    )
    iterations = [num_iterations(run) or _USUAL_ITERATIONS for run in runs]
    # How many iterations the first n runs have.
    sums = [0, *itertools.accumulate(iterations)]
    width = len(str(len(runs)))
    num_ended = 0
    with rich.progress.Progress(*shown, console=output) as bar:
        task = bar.add_task(f"run 1 of {len(runs)}", total=sums[-1])

        def show(event: Event) -> None:
            nonlocal num_ended
            num_done = 0
            if isinstance(event, Pruning):
                num_done = event.num_done
            elif isinstance(event, Finished | Failed):
                num_ended += 1
                number = f"{num_ended:{width}}/{len(runs)}"
                run, outcome = _run_in_words(event.run), _outcome_in_words(event)
                output.print(f"{number}  {run}: {outcome}", soft_wrap=True)
            else:
                return
            # A run that ended counts as all of its iterations, however many it took.
            completed = sums[num_ended] + num_done
            present = min(num_ended + 1, len(runs))
            description = f"run {present} of {len(runs)}"
            bar.update(task, completed=completed, description=description)

        yield show


def _run_in_words(run: Run) -> str:
    config, prune = run.config, run.config.prune
    compression = f"{prune.compression:,.6g}"
    number = num_iterations(run) or "open"
    # Padded, so that the lines of a grid stand under each other.
    return (
        f"{config.model} {prune.pruner:<9} compression {compression:<10} "
        f"{prune.schedule} n={number} seed {config.seed}"
    )


def _outcome_in_words(outcome: Outcome) -> str:
    if isinstance(outcome, Failed):
        return error(outcome.error)
    row = outcome.row
    parts = [f"{row['kept']:,} kept"]
    if row["collapsed"]:
        parts.append("[red]collapsed[/red]")
    parts.append("already there" if outcome.found else f"{row['seconds']:.1f} s")
    return ", ".join(parts)


@contextlib.contextmanager
def verification(output: Console) -> Iterator[Callable[[int, int], None]]:
    """Shows the verification of a certificate. Yields `on_progress` of `certificates.verify`."""
    bar = rich.progress.Progress(*columns(), console=output)
    task = bar.add_task("verifying", total=None, now="")

    def update(num_done: int, total: int) -> None:
        # The bar starts at the first call, so that no bar precedes an error in the files.
        bar.start()
        bar.update(task, completed=num_done, total=total)

    try:
        yield update
    finally:
        if bar.live.is_started:
            bar.stop()
