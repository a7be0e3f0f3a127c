"""Prints the events of runs: one run with a bar and a line per epoch, a grid as a table that fills.

A reporter is a function of an event; see `events`. The one-off parts of the output, such as tables
of a finished run, are in `report`.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence

import jax
import rich.console
import rich.live
import rich.progress

from synflow_jax.experiments import events, failures, pictures, report, results
from synflow_jax.experiments.events import Event, EventFn, Failed, Finished, Outcome
from synflow_jax.experiments.report import style
from synflow_jax.experiments.report.style import percent
from synflow_jax.experiments.run import Run, grid_fields
from synflow_jax.storage import Workdir


@contextlib.contextmanager
def reporter(
    output: rich.console.Console, runs: Sequence[Run], workdir: Workdir, *, is_grid: bool
) -> Iterator[EventFn]:
    """Yields the reporter of a grid or of a single run.

    Args:
      output: where to print.
      runs: those of this process.
      workdir: their folder.
      is_grid: whether the runs are part of a grid.
    """
    if is_grid:
        table = Table(output, runs)
        with rich.live.Live(table, console=output, refresh_per_second=1, transient=False):
            yield table.show
    else:
        lines = Lines(output, workdir)
        with contextlib.closing(lines):
            yield lines.show


def finish(
    output: rich.console.Console, outcomes: Sequence[Outcome], workdir: Workdir, *, is_grid: bool
) -> None:
    """Prints the results of a command and draws the curve of a single run.

    Args:
      output: where to print.
      outcomes: from `engine.run`.
      workdir: the folder.
      is_grid: whether the runs are part of a grid.

    Raises:
      ValueError: runs of a grid failed; says how many, and why the first one did.
      Exception: the error of a single run that failed.
    """
    failed = [outcome for outcome in outcomes if isinstance(outcome, Failed)]
    if is_grid:
        report.sweep_files(output, workdir.path)
        failures.check(failed, len(outcomes), workdir)
        return
    (outcome,) = outcomes
    if isinstance(outcome, Failed):
        raise outcome.error
    row = outcome.row
    curve = results.read_curve(workdir.curve_path(row["run_id"]))
    pictures.save(pictures.curve(row, curve), workdir.curve_picture_path)
    report.trained(output, row, workdir.timing(row["run_id"]))
    report.train_files(output, workdir.path, row["run_id"])


class Lines:
    """Prints the events of a single run, with a progress bar for each part of it."""

    def __init__(self, output: rich.console.Console, workdir: Workdir) -> None:
        self._output = output
        self._workdir = workdir
        # Made when it is first needed.
        self._bar: rich.progress.Progress | None = None

    def show(self, event: Event) -> None:
        """Prints an event."""
        match event:
            case events.Built(run, network, max_compression):
                report.network(self._output, run.config.model, network, max_compression)
            case events.Pruning():
                self._show_pruning(event)
            case events.Level():
                self._show_level(event)
            case events.Pruned(_, row):
                self.close()
                report.pruned(self._output, row)
            case events.Started():
                self._show_start(event)
            case events.Resumed(_, step, num_steps):
                self._output.print(
                    f"resuming after step {step} of {num_steps}, from the last checkpoint"
                )
            case events.Progress():
                self._show_progress(event)
            case events.EpochEnded():
                self._show_epoch(event)
            case events.Finished(_, _, found):
                self.close()
                if found:
                    report.already_done(self._output, self._workdir)

    def _show_pruning(self, event: events.Pruning) -> None:
        kept = ""
        if event.num_done:
            num_kept = int(event.info.kept[event.num_done - 1].sum())
            kept = f"{num_kept:,} weights kept"
        total = report.num_iterations(event.run)
        self._update("pruning", event.num_done, total, kept)

    def _show_level(self, event: events.Level) -> None:
        name = "up to the rewind step"
        if event.level:
            name = f"level {event.level}/{event.run.num_iterations}"
        match event.event:
            case events.Progress() as now:
                self._update(name, now.step, now.num_steps, _speed(now))
            case events.EpochEnded(means=means) as now:
                is_last = event.level and now.step == now.num_steps
                if is_last:
                    self._output.print(f"{name}: {_losses('test', means)}")

    def _show_start(self, event: events.Started) -> None:
        options = event.run.config.train
        report.form(self._output, event.form)
        report.recipe(self._output, options.num_epochs, options.drops)
        report.devices(
            self._output,
            options.batch_size,
            jax.local_device_count(),
            split=event.num_devices > 1,
        )

    def _show_progress(self, event: events.Progress) -> None:
        text = _speed(event)
        # There are no means before the first step of an epoch.
        if not math.isnan(event.loss):
            text = f"loss {event.loss:.4f}, top-1 {percent(event.top1)}, {text}"
        self._update(_epoch(event), event.step, event.num_steps, text)

    def _show_epoch(self, event: events.EpochEnded) -> None:
        training, test = _losses("train", event.means), _losses("test", event.means)
        top5 = percent(event.means["test_top5"])
        self._output.print(f"{_epoch(event)}: {training}; {test}, top-5 {top5}; {_speed(event)}")

    def _update(self, name: str, num_done: int, total: int | None, now: str) -> None:
        """Moves the bar."""
        if self._bar is None:
            self._bar = rich.progress.Progress(*report.columns(), console=self._output)
            self._bar.add_task(name, now="")
            self._bar.start()
        (task,) = self._bar.task_ids
        self._bar.update(task, completed=num_done, total=total, description=name, now=now)

    def close(self) -> None:
        """Leaves the bar as it is, so that the next part gets a new one."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _epoch(event: events.Progress | events.EpochEnded) -> str:
    return f"epoch {event.epoch + 1}/{event.run.config.train.num_epochs}"


def _losses(split: str, means: Mapping[str, float]) -> str:
    """Returns the loss and the accuracy of a split in words."""
    loss, top1 = means[f"{split}_loss"], means[f"{split}_top1"]
    return f"{split} loss {loss:.4f}, top-1 {percent(top1)}"


def _speed(event: events.Progress | events.EpochEnded) -> str:
    return f"{event.images_per_second:,.0f} images/s"


class Table:
    """Shows a grid as a table: a line for all that the grid varies but compression and seed."""

    def __init__(self, output: rich.console.Console, runs: Sequence[Run]) -> None:
        self._output = output
        self._varying = []
        for key in grid_fields():
            values = {run.value(key) for run in runs}
            if len(values) > 1:
                self._varying.append(key)
        self._lines = [key for key in self._varying if key not in ("seed", "prune.compression")]
        self._runs = {run.train_id: run for run in runs}
        self._fraction = dict.fromkeys(self._runs, 0.0)
        self._outcomes: dict[str, Outcome] = {}
        self._started = time.monotonic()

    def show(self, event: Event) -> None:
        """Takes an event into the table, and prints a line for each run that ends."""
        match event:
            case events.Progress(run):
                self._fraction[run.train_id] = event.step / event.num_steps
            case events.Halved():
                self._output.print(f"{event.problem} Trying {event.num_left} on each device.")
            case Finished(run) | Failed(run):
                self._outcomes[run.train_id] = event
                if not _was_found(event):
                    line = f"{self._name(run)}: {_result(event)}"
                    self._output.print(line, soft_wrap=True)

    def _name(self, run: Run) -> str:
        """Returns the values of a run that vary in the grid."""
        return " ".join(f"{_short(key)}={run.value(key)}" for key in self._varying)

    def __rich__(self) -> rich.console.RenderableType:
        """Returns the table, and how long it will take."""
        compressions = sorted({run.config.prune.compression for run in self._runs.values()})
        names = [_short(key) for key in self._lines]
        titles = [f"{compression:,.4g}" for compression in compressions]
        table = style.table(left=names, right=titles)
        for label in dict.fromkeys(map(self._label, self._runs.values())):
            cells = [self._cell(label, compression) for compression in compressions]
            table.add_row(*label, *cells)
        return rich.console.Group(table, self._state())

    def _label(self, run: Run) -> tuple[str, ...]:
        """Returns the line of a run: what it has of all that varies between lines."""
        return tuple(str(run.value(key)) for key in self._lines)

    def _cell(self, label: tuple[str, ...], compression: float) -> str:
        """Returns what is known of the runs of a line and a column."""
        run_ids = []
        for run_id, run in self._runs.items():
            if self._label(run) == label and run.config.prune.compression == compression:
                run_ids.append(run_id)
        if not run_ids:
            return ""
        outcomes = [self._outcomes[run_id] for run_id in run_ids if run_id in self._outcomes]
        finished = [outcome for outcome in outcomes if isinstance(outcome, Finished)]
        num_failed = len(outcomes) - len(finished)
        parts = []
        if finished:
            accuracies = [outcome.row["last"]["test_top1"] for outcome in finished]
            mean = sum(accuracies) / len(accuracies)
            parts.append(f"{100 * mean:.1f}")
        if num_failed:
            parts.append(f"[bold red]{num_failed} failed[/bold red]")
        if len(outcomes) < len(run_ids):
            done = sum(map(self._done, run_ids)) / len(run_ids)
            progress = f"{100 * done:.0f} %" if done else "-"
            parts.append(f"[dim]{progress}[/dim]")
        return " ".join(parts)

    def _done(self, run_id: str) -> float:
        """Returns the fraction of a run that is done."""
        return 1.0 if run_id in self._outcomes else self._fraction[run_id]

    def _state(self) -> str:
        num_runs = len(self._runs)
        outcomes = list(self._outcomes.values())
        num_found = sum(map(_was_found, outcomes))
        num_failed = sum(isinstance(outcome, Failed) for outcome in outcomes)
        parts = [f"{len(outcomes)} of {num_runs} runs finished"]
        if num_found:
            parts.append(f"{num_found} of them by an earlier command")
        if num_failed:
            parts.append(f"[bold red]{num_failed} failed[/bold red]")
        passed = time.monotonic() - self._started
        parts.append(f"{_clock(passed)} passed")
        done = sum(map(self._done, self._runs)) - num_found
        to_do = num_runs - num_found
        if 0 < done < to_do:
            left = passed * (to_do - done) / done
            parts.append(f"about {_clock(left)} left")
        return "top-1 in %, mean over seeds; " + ", ".join(parts)


def _short(key: str) -> str:
    return key.removeprefix("prune.")


def _was_found(outcome: Outcome) -> bool:
    return isinstance(outcome, Finished) and outcome.found


def _result(outcome: Outcome) -> str:
    """Returns what became of a run, in a line."""
    if isinstance(outcome, Failed):
        return style.error(outcome.error)
    row = outcome.row
    top1 = percent(row["last"]["test_top1"])
    return f"{row['kept']:,} of {row['total']:,} weights, test top-1 {top1}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
