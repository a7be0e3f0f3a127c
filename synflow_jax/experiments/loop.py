"""Trains runs: the one loop behind a single run, a grid of runs and the levels of IMP.

A run can be stopped at any moment and resumes from its last checkpoint. Its result is the same
wherever it was stopped, however many steps each call of the compiled loop takes, and whichever
runs train at the same time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from synflow_jax import storage, training
from synflow_jax.experiments import events, results
from synflow_jax.experiments.events import EventFn
from synflow_jax.experiments.programs import Programs, Recipe
from synflow_jax.experiments.results import Timing, Trained
from synflow_jax.experiments.run import Run
from synflow_jax.storage import checkpoints
from synflow_jax.storage.checkpoints import Checkpoints
from synflow_jax.training import TrainInfo, TrainState
from synflow_jax.training.forms import Form

# Between two calls of the compiled loop progress is shown and signals are heard.
_SECONDS_PER_CALL = 5.0
# A checkpoint is written within an epoch that takes longer than this.
_SECONDS_UNSAVED = 600.0

StopFn = Callable[[], bool]


class Job(NamedTuple):
    """What the loop needs to know of a run.

    Attributes:
      run: its config and names.
      form: the network that is trained.
      first_state: makes the state before the first step. Raises ValueError if it cannot.
      folder: of the run's checkpoints.
      description: of the run, as its checkpoints hold it.
      curve: the file of the curve.
    """

    run: Run
    form: Form
    first_state: Callable[[], TrainState]
    folder: pathlib.Path
    description: Mapping[str, Any]
    curve: pathlib.Path


def train(
    jobs: Sequence[Job],
    recipe: Recipe,
    programs: Programs,
    *,
    emit: EventFn = events.ignore,
    should_stop: StopFn = lambda: False,
) -> list[Trained | Exception]:
    """Trains runs of one program together, from their newest checkpoints to the last step.

    A single run is a batch of one. The order is:

    1. Restore: open the folder of each run, and restore its newest checkpoint or make its first
       state. A run whose files cannot be used fails here; the others continue.
    2. Place the states on the devices.

    Then, until the last step is done or every run has failed:

    3. Advance: some steps in one call of the compiled loop, all of one epoch.
    4. Check the losses. A run whose loss is not finite fails before anything of it is written, so
       that its last good checkpoint stays.
    5. At the end of an epoch: evaluate, write the curve, and start to write a checkpoint. The
       curve comes first: a run that resumes from the checkpoint does not write that epoch again.
    6. Report.
    7. Save, if nothing was saved for ten minutes.
    8. Stop, if asked to: save, wait until that is on the disk, and raise.

    At the end:

    9. Close the folders, which waits until every checkpoint is on the disk.
    10. Return the states. Only now does the caller write a row: a run that has a row is never
        trained again, so everything else of it must be safe.

    Args:
      jobs: of one recipe and one program, all at the same step, no more than it has places.
      recipe: the optimizer, the data and the number of steps.
      programs: from `programs.one` or `programs.many`.
      emit: gets the events of all runs.
      should_stop: asked after each call of the compiled loop.

    Returns:
      For each job its result, or the error that it failed with: a ValueError if its files cannot
      be used, a FloatingPointError if its loss is not finite.

    Raises:
      OSError: something cannot be written.
      storage.Stopped: `should_stop` returned True, and all runs are saved.
    """
    batch = _Batch(jobs, recipe, programs, emit)
    with contextlib.ExitStack() as folders:
        batch.restore(folders)
        batch.place()
        while batch.is_running():
            batch.advance()
            batch.check_losses()
            if batch.step == batch.end_of_epoch:
                batch.finish_epoch()
            batch.report()
            if batch.seconds_unsaved() > _SECONDS_UNSAVED:
                batch.save()
            if should_stop() and batch.step < recipe.num_steps:
                batch.save(wait=True)
                raise storage.Stopped(batch.say_stopped())
    return batch.outcomes()


class _Batch:
    """Holds runs that train together. Each method is a step of `train`."""

    def __init__(
        self, jobs: Sequence[Job], recipe: Recipe, programs: Programs, emit: EventFn
    ) -> None:
        self.jobs = jobs
        self.recipe = recipe
        self.programs = programs
        self.emit = emit
        # The keys of these three are the numbers of the jobs.
        self.errors: dict[int, Exception] = {}
        self.folders: dict[int, Checkpoints] = {}
        self.starts: dict[int, tuple[TrainState, TrainInfo]] = {}
        # The number of the job that trains at each place.
        self.places: list[int] = []
        self.first_step = 0
        self.step = 0
        self.end_of_epoch = 0
        self.pace = _Pace()
        self.started = time.perf_counter()
        self.saved_at = self.started

    def restore(self, stack: contextlib.ExitStack) -> None:
        """Opens the folders, and restores or makes the state of each run."""
        for number, job in enumerate(self.jobs):
            keep = job.run.config.train.keep_checkpoints
            folder = checkpoints.open_folder(job.folder, job.description, keep)
            try:
                self.folders[number] = stack.enter_context(folder)
                self.starts[number] = self._restored(job, self.folders[number])
            except ValueError as error:
                self.errors[number] = error

    def _restored(self, job: Job, folder: Checkpoints) -> tuple[TrainState, TrainInfo]:
        """Returns the state and the record to train from."""
        check_form(folder, job.form)
        first = job.first_state(), training.init_info(job.run.config.train.num_epochs)
        restored = checkpoints.restore_latest(folder, first)
        if restored is None:
            return first
        step, pair = restored
        self.emit(events.Resumed(job.run, step, self.recipe.num_steps))
        return pair

    def place(self) -> None:
        """Puts the states on the devices."""
        self.places = list(self.starts)
        if not self.places:
            return
        first_state, _ = self.starts[self.places[0]]
        self.first_step = int(first_state.step)
        self.step = self.first_step
        # With fewer runs than places, the last run trains in several, and one of them counts.
        num_spare = self.programs.num_places - len(self.places)
        filled = [self.starts[number] for number in self.places]
        filled += filled[-1:] * num_spare
        # The states are on the devices from here on; the host's copies may go.
        self.starts = {}
        self.state, self.info = self.programs.place(filled)

    def alive(self) -> Iterator[tuple[int, int]]:
        """Yields (place, number of the job) of the runs that have not failed."""
        for place, number in enumerate(self.places):
            if number not in self.errors:
                yield place, number

    def is_running(self) -> bool:
        """Returns whether steps are left, and a run to take them."""
        return self.step < self.recipe.num_steps and any(True for _ in self.alive())

    def advance(self) -> None:
        """Takes some steps of one epoch, and waits for the devices."""
        per_epoch = self.recipe.steps_per_epoch
        self.end_of_epoch = (self.step // per_epoch + 1) * per_epoch
        stop = min(self.step + self.pace.stride, self.end_of_epoch, self.recipe.num_steps)
        before = time.perf_counter()
        self.state, self.info = self.programs.advance(self.state, self.info, self.step, stop)
        self.infos: list[TrainInfo] = self.programs.fetch(self.info)
        self.bad_steps = [int(info.bad_step) for info in self.infos]
        self.pace.record(stop - self.step, time.perf_counter() - before)
        self.step = stop

    def check_losses(self) -> None:
        """Fails the runs whose training loss was not finite."""
        for place, number in list(self.alive()):
            if self.bad_steps[place] >= 0:
                self._fail(number, self.bad_steps[place])

    def finish_epoch(self) -> None:
        """Evaluates, writes the curves, and saves if the config says so."""
        epoch = self.step // self.recipe.steps_per_epoch - 1
        self.info = self.programs.finish_epoch(self.state, self.info, epoch)
        self.infos = self.programs.fetch(self.info)
        for place, number in list(self.alive()):
            job, info = self.jobs[number], self.infos[place]
            means = {name: float(values[epoch]) for name, values in info.curve.items()}
            if not math.isfinite(means["test_loss"]):
                self._fail(number, self.step - 1)
                continue
            results.write_curve(job.curve, info)
            self.emit(
                events.EpochEnded(
                    run=job.run,
                    step=self.step,
                    num_steps=self.recipe.num_steps,
                    epoch=epoch,
                    means=means,
                    images_per_second=self._images_per_second(job),
                )
            )
        every = self.jobs[0].run.config.train.checkpoint_every
        if (epoch + 1) % every == 0 or self.step == self.recipe.num_steps:
            self.save()

    def report(self) -> None:
        """Emits the progress of each run."""
        for place, number in self.alive():
            job, running = self.jobs[number], self.infos[place].running
            num_examples = int(running.examples)
            num_epochs = job.run.config.train.num_epochs
            self.emit(
                events.Progress(
                    run=job.run,
                    step=self.step,
                    num_steps=self.recipe.num_steps,
                    epoch=min(self.step // self.recipe.steps_per_epoch, num_epochs - 1),
                    loss=float(running.loss) / num_examples if num_examples else math.nan,
                    top1=int(running.top1) / num_examples if num_examples else math.nan,
                    images_per_second=self._images_per_second(job),
                )
            )

    def _images_per_second(self, job: Job) -> float:
        if not self.pace.latest:
            return 0.0
        return job.run.config.train.batch_size / self.pace.latest

    def save(self, *, wait: bool = False) -> None:
        """Starts to write a checkpoint of each run; `wait` returns when they are on the disk."""
        pairs = self.programs.fetch((self.state, self.info))
        for place, number in self.alive():
            checkpoints.save(self.folders[number], self.step, pairs[place], wait=wait)
        self.saved_at = time.perf_counter()

    def seconds_unsaved(self) -> float:
        """Returns the time since the last checkpoint."""
        return time.perf_counter() - self.saved_at

    def outcomes(self) -> list[Trained | Exception]:
        """Returns the result or the error of each job."""
        found: dict[int, Trained | Exception] = dict(self.errors)
        if self.places and any(True for _ in self.alive()):
            pairs = self.programs.fetch((self.state, self.info))
            timing = self._timing()
            for place, number in self.alive():
                state, info = pairs[place]
                found[number] = Trained(state, info, timing)
        return [found[number] for number in range(len(self.jobs))]

    def _timing(self) -> Timing:
        num_runs = len(self.places)
        step_seconds = self.pace.step_seconds()
        return Timing(
            seconds=(time.perf_counter() - self.started) / num_runs,
            num_steps=self.step - self.first_step,
            step_seconds=None if step_seconds is None else step_seconds / num_runs,
            num_runs=num_runs,
        )

    def _fail(self, number: int, step: int) -> None:
        """Records that the loss of a run was not finite at a step, counted from 0."""
        options = self.jobs[number].run.config.train
        last = self.folders[number].manager.latest_step()
        if last is None:
            kept = "No checkpoint was written yet"
        else:
            kept = f"The checkpoint after step {last} stays"
        self.errors[number] = FloatingPointError(
            f"the loss is not finite at step {step + 1} (epoch "
            f"{step // self.recipe.steps_per_epoch + 1} of {options.num_epochs}). {kept}. Lower "
            f"train.learning_rate={options.learning_rate}, or clip the gradient: "
            "--config.train.clip_norm=1."
        )

    def say_stopped(self) -> str:
        """Returns what to tell the user of a stop."""
        num_runs = len(list(self.alive()))
        saved = "the run is saved" if num_runs == 1 else f"{num_runs} runs are saved"
        return (
            f"stopped after step {self.step} of {self.recipe.num_steps}; {saved}. Run the "
            "same command without --overwrite to resume."
        )


@dataclasses.dataclass
class _Pace:
    """Decides how many steps the next call of the compiled loop takes, from how long they took.

    The first call takes no step: it compiles. Then comes one step, and four times as many in each
    call until a call takes a few seconds.

    Attributes:
      stride: how many steps the next call takes.
      latest: the seconds of a step in the last call; 0 until they are known.
    """

    stride: int = 0
    latest: float = 0.0
    _num_calls: int = 0
    _num_steps: int = 0
    _seconds: float = 0.0

    def record(self, num_steps: int, seconds: float) -> None:
        """Records a call."""
        # The first two calls compile and warm up, and say nothing of the speed.
        if self._num_calls >= 2:
            self.latest = seconds / num_steps
            self._num_steps += num_steps
            self._seconds += seconds
        self._num_calls += 1
        self.stride = next_stride(self.stride, num_steps, seconds)

    def step_seconds(self) -> float | None:
        """Returns the mean seconds of a step, or None if too few were taken to tell."""
        return self._seconds / self._num_steps if self._num_steps else None


def next_stride(stride: int, num_steps: int, seconds: float) -> int:
    """Returns how many steps to take in the next call, after one of `num_steps` took `seconds`."""
    if num_steps == 0:
        return 1
    fitting = round(_SECONDS_PER_CALL * num_steps / max(seconds, 1e-6))
    return max(1, min(4 * stride, fitting))


def check_form(folder: Checkpoints, form: Form) -> None:
    """Checks that the checkpoints of a run are of the form that is to be trained.

    Raises:
      ValueError: they are of the other form.
    """
    found = checkpoints.latest_run(folder)
    if found is None or bool(found.get("compact")) == form.compact:
        return
    kinds = {True: "the compact network", False: "the full, masked network"}
    raise ValueError(
        f"checkpoint {str(folder.folder)!r} holds {kinds[not form.compact]}, and this command "
        f"trains {kinds[form.compact]} ({form.explain()}). To resume, give "
        f"--config.train.compact={not form.compact}; to begin anew, --overwrite or another "
        "--workdir."
    )
