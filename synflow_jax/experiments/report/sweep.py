"""Shows a grid of training runs as a table that fills.

The table has a column per compression. It has a line for each combination of the other values that
vary, and a cell is the mean over seeds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence

import rich.live
from rich.console import Console, Group, RenderableType

from synflow_jax.experiments import events
from synflow_jax.experiments.events import Event, EventFn, Failed, Finished, Outcome
from synflow_jax.experiments.report import style
from synflow_jax.experiments.report.style import percent
from synflow_jax.experiments.run import Run, grid_fields


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The runs of a grid, and how far they are.

    Attributes:
      runs: by their `train_id`.
      varying: the keys that vary in the grid, e.g. "prune.pruner".
      fractions: the fraction of each run that is done. Filled by `show`.
      outcomes: of the runs that ended. Filled by `show`.
      started: the time of the start, from `time.monotonic`.
    """

    runs: Mapping[str, Run]
    varying: Sequence[str]
    fractions: dict[str, float]
    outcomes: dict[str, Outcome]
    started: float


@contextlib.contextmanager
def training_grid(output: Console, runs: Sequence[Run]) -> Iterator[EventFn]:
    """Yields a function that takes the events of a grid into a table, which is shown meanwhile.

    Args:
      output: to print to.
      runs: those of this process.
    """
    state = start(runs)
    draw = lambda: table(state)
    with rich.live.Live(get_renderable=draw, console=output, refresh_per_second=1):
        yield lambda event: show(output, state, event)
    # On a terminal, rich ends the table with a line break by itself.
    if not output.is_terminal:
        output.line()


def start(runs: Sequence[Run]) -> Sweep:
    """Returns a sweep of which nothing is done."""
    varying = []
    for key in grid_fields():
        values = {run.value(key) for run in runs}
        if len(values) > 1:
            varying.append(key)
    by_id = {run.train_id: run for run in runs}
    fractions = dict.fromkeys(by_id, 0.0)
    now = time.monotonic()
    return Sweep(by_id, varying, fractions, {}, now)


def show(output: Console, state: Sweep, event: Event) -> None:
    """Takes an event into the sweep, and prints a line for each run that ends."""
    match event:
        case events.Progress(run, step, num_steps):
            state.fractions[run.train_id] = step / num_steps
        case events.Halved(problem, _, num_left):
            output.print(f"{problem} Trying {num_left} on each device.")
        case Finished(run) | Failed(run):
            state.outcomes[run.train_id] = event
            # Those of an earlier command are counted only: there may be thousands.
            if not _was_found(event):
                name = _name(state, run)
                output.print(f"{name}: {_result(event)}", soft_wrap=True)


def table(state: Sweep) -> RenderableType:
    """Returns the table, and a line that says how long it will take."""
    compressions = set()
    # The runs of each cell. The lines come in the order of the runs.
    lines: dict[tuple[str, ...], dict[float, list[str]]] = {}
    for run_id, run in state.runs.items():
        compression = run.config.prune.compression
        compressions.add(compression)
        cells = lines.setdefault(_label(state, run), {})
        cells.setdefault(compression, []).append(run_id)
    columns = sorted(compressions)
    names = [_short(key) for key in _line_keys(state)]
    titles = [f"{compression:,.4g}" for compression in columns]
    drawn = style.table(left=names, right=titles)
    for label, cells in lines.items():
        texts = []
        for compression in columns:
            run_ids = cells.get(compression, [])
            texts.append(_cell(state, run_ids))
        drawn.add_row(*label, *texts)
    return Group(drawn, _summary(state))


def _name(state: Sweep, run: Run) -> str:
    """Returns the values of a run that vary in the grid."""
    values = [f"{_short(key)}={run.value(key)}" for key in state.varying]
    return " ".join(values)


def _line_keys(state: Sweep) -> list[str]:
    """Returns the keys that vary between lines."""
    # Compressions have columns, and a cell is a mean over seeds.
    elsewhere = ("seed", "prune.compression")
    return [key for key in state.varying if key not in elsewhere]


def _label(state: Sweep, run: Run) -> tuple[str, ...]:
    """Returns the values of a run by which its line is labelled."""
    values = [run.value(key) for key in _line_keys(state)]
    return tuple(map(str, values))


def _cell(state: Sweep, run_ids: Sequence[str]) -> str:
    """Returns the text of a cell: mean accuracy, number of failures, progress of the others."""
    outcomes = []
    for run_id in run_ids:
        if run_id in state.outcomes:
            outcomes.append(state.outcomes[run_id])
    parts = [_mean_top1(outcomes), _failures(outcomes)]
    if len(outcomes) < len(run_ids):
        fractions = [_done(state, run_id) for run_id in run_ids]
        done = sum(fractions) / len(run_ids)
        progress = f"{100 * done:.0f} %" if done else "-"
        parts.append(f"[dim]{progress}[/dim]")
    present = [part for part in parts if part]
    return " ".join(present)


def _mean_top1(outcomes: Sequence[Outcome]) -> str:
    """Returns the mean accuracy of the runs that did not fail, or an empty string."""
    accuracies = []
    for outcome in outcomes:
        if isinstance(outcome, Finished):
            last = outcome.row["last"]
            accuracies.append(last["test_top1"])
    if not accuracies:
        return ""
    mean = sum(accuracies) / len(accuracies)
    return f"{100 * mean:.1f}"


def _failures(outcomes: Sequence[Outcome]) -> str:
    """Returns how many runs failed, or an empty string."""
    failed = [outcome for outcome in outcomes if isinstance(outcome, Failed)]
    num_failed = len(failed)
    return f"[bold red]{num_failed} failed[/bold red]" if num_failed else ""


def _done(state: Sweep, run_id: str) -> float:
    """Returns the fraction of a run that is done."""
    return 1.0 if run_id in state.outcomes else state.fractions[run_id]


def _summary(state: Sweep) -> str:
    """Returns how many runs are done, and how long the others will take."""
    outcomes = list(state.outcomes.values())
    num_runs, num_ended = len(state.runs), len(outcomes)
    num_found = sum(map(_was_found, outcomes))
    parts = [f"{num_ended} of {num_runs} runs finished"]
    if num_found:
        parts.append(f"{num_found} of them by an earlier command")
    failures = _failures(outcomes)
    if failures:
        parts.append(failures)
    passed = time.monotonic() - state.started
    parts.append(f"{_clock(passed)} passed")
    # Runs that were found took no time. Counted, they would make the others look fast.
    fractions = [_done(state, run_id) for run_id in state.runs]
    done = sum(fractions) - num_found
    to_do = num_runs - num_found
    if 0 < done < to_do:
        left = passed * (to_do - done) / done
        parts.append(f"about {_clock(left)} left")
    facts = ", ".join(parts)
    return f"top-1 in %, mean over seeds; {facts}"


def _short(key: str) -> str:
    return key.removeprefix("prune.")


def _was_found(outcome: Outcome) -> bool:
    return isinstance(outcome, Finished) and outcome.found


def _result(outcome: Outcome) -> str:
    """Returns the result of a run in a line."""
    if isinstance(outcome, Failed):
        return style.error(outcome.error)
    row = outcome.row
    top1 = percent(row["last"]["test_top1"])
    return f"{row['kept']:,} of {row['total']:,} weights, test top-1 {top1}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
