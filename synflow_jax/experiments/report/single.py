"""Prints the events of a single training run: a bar for each part of it, and a line per epoch."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import rich.progress
from rich.console import Console

from synflow_jax.experiments import events
from synflow_jax.experiments.events import Event, EventFn
from synflow_jax.experiments.report import bars, lines
from synflow_jax.experiments.report.style import percent
from synflow_jax.storage import Workdir


class _Position(NamedTuple):
    """Where the bar of a part of the run is.

    Attributes:
      name: of the part.
      num_done: iterations or steps.
      total: None if it is not known.
      now: a text about the last step.
    """

    name: str
    num_done: int
    total: int | None
    now: str


@contextlib.contextmanager
def training_run(output: Console, workdir: Workdir) -> Iterator[EventFn]:
    """Yields a function that prints the events of a run.

    Args:
      output: to print to.
      workdir: the folder of the run.
    """
    # Each part of the run has a bar. It is made when the part first advances.
    bar: rich.progress.Progress | None = None

    def move(to: _Position) -> None:
        nonlocal bar
        if bar is None:
            bar = rich.progress.Progress(*bars.columns(), console=output)
            bar.add_task(to.name, now="")
            bar.start()
        (task,) = bar.task_ids
        bar.update(task, completed=to.num_done, total=to.total, description=to.name, now=to.now)

    def close() -> None:
        """Leaves the bar on the screen as it is."""
        nonlocal bar
        if bar is not None:
            bar.stop()
            bar = None

    def show(event: Event) -> None:
        position = _position(event)
        if position is not None:
            move(position)
        elif isinstance(event, events.Pruned | events.Finished):
            # Before the line of the event, which would else stand above the bar.
            close()
        _print(output, workdir, event)

    with contextlib.ExitStack() as stack:
        stack.callback(close)
        yield show


def _position(event: Event) -> _Position | None:
    """Returns where an event moves the bar, or None if it does not."""
    match event:
        case events.Pruning(run, num_done, info):
            total = bars.num_iterations(run)
            return _Position("pruning", num_done, total, bars.kept(info, num_done))
        case events.Level(_, _, events.Progress() as now):
            return _Position(_level(event), now.step, now.num_steps, _speed(now))
        case events.Progress(step=step, num_steps=num_steps, loss=loss):
            text = _speed(event)
            # There are no means before the first step of an epoch.
            if not math.isnan(loss):
                text = f"loss {loss:.4f}, top-1 {percent(event.top1)}, {text}"
            return _Position(_epoch(event), step, num_steps, text)
    return None


def _print(output: Console, workdir: Workdir, event: Event) -> None:
    """Prints the lines of an event, if it has any."""
    match event:
        case events.Built(run, network, max_compression):
            lines.network(output, run.config.model, network, max_compression)
        case events.Level(_, level, events.EpochEnded(means=means) as ended):
            # The state that is rewound to, level 0, has no result.
            if level and ended.step == ended.num_steps:
                output.print(f"{_level(event)}: {_losses('test', means)}")
        case events.Pruned(_, row):
            lines.pruned(output, row)
        case events.Started():
            _print_start(output, event)
        case events.Resumed(_, step, num_steps):
            output.print(f"resuming after step {step} of {num_steps}, from the last checkpoint")
        case events.EpochEnded(means=means):
            train, test = _losses("train", means), _losses("test", means)
            top5 = percent(means["test_top5"])
            speed = _speed(event)
            output.print(f"{_epoch(event)}: {train}; {test}, top-5 {top5}; {speed}")
        case events.Finished(found=True):
            lines.already_done(output, workdir)


def _print_start(output: Console, event: events.Started) -> None:
    """Prints how the network is trained."""
    options = event.run.config.train
    lines.form(output, event.form)
    lines.recipe(output, options.num_epochs, options.drops)
    num_devices = jax.local_device_count()
    lines.devices(output, options.batch_size, num_devices, split=event.num_devices > 1)


def _level(event: events.Level) -> str:
    if not event.level:
        return "up to the rewind step"
    return f"level {event.level}/{event.run.num_iterations}"


def _epoch(event: events.Progress | events.EpochEnded) -> str:
    num_epochs = event.run.config.train.num_epochs
    return f"epoch {event.epoch + 1}/{num_epochs}"


def _losses(split: str, means: Mapping[str, float]) -> str:
    """Returns the loss and the accuracy of a split in words."""
    loss = means[f"{split}_loss"]
    top1 = percent(means[f"{split}_top1"])
    return f"{split} loss {loss:.4f}, top-1 {top1}"


def _speed(event: events.Progress | events.EpochEnded) -> str:
    return f"{event.images_per_second:,.0f} images/s"
