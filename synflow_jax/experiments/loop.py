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
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from synflow_jax import storage, training
from synflow_jax.experiments import events, results
from synflow_jax.experiments.events import EventFn
from synflow_jax.experiments.programs import Pair, Programs, Recipe
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
    """A run, described to the loop.

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

    1. Restore: open the folder of each run, remove what a killed process has left there, and
       restore its newest checkpoint or make its first state. A run whose files cannot be used
       fails here; the others continue.
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
      jobs: of one recipe and one program, all at the same step, no more than it has places. The
        caller holds the locks of the runs.
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
    now = time.perf_counter()
    batch = _Batch(tuple(jobs), recipe, programs, emit, started=now, saved_at=now)
    with contextlib.ExitStack() as stack:
        batch = _restore(batch, stack)
        batch = _place(batch)
        while _is_running(batch):
            batch = _advance(batch)
            batch = _check_losses(batch)
            if batch.step == batch.end_of_epoch:
                batch = _finish_epoch(batch)
            _report(batch)
            if _seconds_unsaved(batch) > _SECONDS_UNSAVED:
                batch = _save(batch)
            if should_stop() and batch.step < recipe.num_steps:
                _save(batch, wait=True)
                raise storage.Stopped(_say_stopped(batch))
    return _outcomes(batch)


@dataclasses.dataclass(frozen=True)
class _Pace:
    """The speed of the compiled loop, and the length of its next call.

    Attributes:
      stride: how many steps the next call takes.
      latest: the seconds of a step in the last call; 0 until they are known.
      num_calls: of the compiled loop.
      num_steps, seconds: of the calls after the first two, together.
    """

    stride: int = 0
    latest: float = 0.0
    num_calls: int = 0
    num_steps: int = 0
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class _Batch:
    """Runs that train together, between two steps of `train`.

    The keys of the dicts are the numbers of the jobs.

    Attributes:
      jobs, recipe, programs, emit: as `train` takes them.
      started: the time when `train` was called.
      saved_at: the time of the last checkpoint, or of the start.
      errors: of the runs that failed.
      folders: of the checkpoints.
      restored: the (state, info) to train from, until they are placed.
      places: the number of the job that trains at each place.
      state, info: on the devices; see `Programs`. None until they are placed.
      infos: the info of each place, on the host.
      first_step: the step that this call of `train` began with.
      step: how many steps are done.
      end_of_epoch: the number of steps at the end of the present epoch.
      pace: the speed of the steps.
    """

    jobs: tuple[Job, ...]
    recipe: Recipe
    programs: Programs
    emit: EventFn
    started: float
    saved_at: float
    errors: Mapping[int, Exception] = dataclasses.field(default_factory=dict)
    folders: Mapping[int, Checkpoints] = dataclasses.field(default_factory=dict)
    restored: Mapping[int, Pair] = dataclasses.field(default_factory=dict)
    places: tuple[int, ...] = ()
    state: Any = None
    info: Any = None
    infos: Sequence[TrainInfo] = ()
    first_step: int = 0
    step: int = 0
    end_of_epoch: int = 0
    pace: _Pace = _Pace()


# The steps of `train`, in order


def _restore(batch: _Batch, stack: contextlib.ExitStack) -> _Batch:
    """Opens the folders, and restores or makes the state of each run."""
    errors: dict[int, Exception] = {}
    folders: dict[int, Checkpoints] = {}
    restored: dict[int, Pair] = {}
    for number, job in enumerate(batch.jobs):
        keep = job.run.config.train.keep_checkpoints
        folder = checkpoints.open_folder(job.folder, job.description, keep)
        # A ValueError is of this run's files. An OSError, such as a full disk, stops all runs.
        try:
            folders[number] = stack.enter_context(folder)
            restored[number] = _restore_job(batch, job, folders[number])
            _check_same_step(job, list(restored.values()))
        except ValueError as error:
            restored.pop(number, None)
            errors[number] = error
    return dataclasses.replace(batch, errors=errors, folders=folders, restored=restored)


def _restore_job(batch: _Batch, job: Job, folder: Checkpoints) -> Pair:
    """Returns the state and the record that a run trains from."""
    # First of all: restoring the other form would fail with a message about shapes.
    check_form(folder, job.form)
    # Made even if there is a checkpoint, since restoring needs a tree of the same structure.
    first = job.first_state(), training.init_info(job.run.config.train.num_epochs)
    found = checkpoints.restore_latest(folder, first)
    if found is None:
        return first
    step, pair = found
    batch.emit(events.Resumed(job.run, step, batch.recipe.num_steps))
    return pair


def _check_same_step(job: Job, restored: Sequence[Pair]) -> None:
    """Checks that the last of these states is at the step of the first: they train together.

    Raises:
      ValueError: it is not. The runs were grouped by their steps before they were locked.
    """
    (first, _), (last, _) = restored[0], restored[-1]
    if int(first.step) != int(last.step):
        raise ValueError(
            f"another process has written to {str(job.folder)!r} while this command began. Run the "
            "same command again."
        )


def _place(batch: _Batch) -> _Batch:
    """Puts the states on the devices."""
    if not batch.restored:
        return batch
    pairs = list(batch.restored.values())
    first_state, _ = pairs[0]
    first_step = int(first_state.step)
    # With fewer runs than places, the last run trains in several, and one of them counts.
    num_spare = batch.programs.num_places - len(pairs)
    pairs += pairs[-1:] * num_spare
    state, info = batch.programs.place(pairs)
    return dataclasses.replace(
        batch,
        # The states are on the devices from here on; the host's copies may go.
        restored={},
        places=tuple(batch.restored),
        state=state,
        info=info,
        first_step=first_step,
        step=first_step,
    )


def _alive(batch: _Batch) -> list[tuple[int, int]]:
    """Returns (place, number of the job) of each run that has not failed."""
    numbered = enumerate(batch.places)
    return [(place, number) for place, number in numbered if number not in batch.errors]


def _is_running(batch: _Batch) -> bool:
    """Returns whether steps are left, and a run to take them."""
    return batch.step < batch.recipe.num_steps and bool(_alive(batch))


def _advance(batch: _Batch) -> _Batch:
    """Takes some steps of one epoch, and waits for the devices."""
    per_epoch, programs = batch.recipe.steps_per_epoch, batch.programs
    # A call stays within one epoch, since each epoch has its own order of the examples.
    end_of_epoch = (batch.step // per_epoch + 1) * per_epoch
    stop = min(batch.step + batch.pace.stride, end_of_epoch, batch.recipe.num_steps)
    before = time.perf_counter()
    state, info = programs.advance(batch.state, batch.info, batch.step, stop)
    # JAX returns before the devices are done, and the pace needs the time of the work.
    infos = programs.fetch(jax.block_until_ready(info))
    pace = _record_call(batch.pace, stop - batch.step, time.perf_counter() - before)
    return dataclasses.replace(
        batch,
        state=state,
        info=info,
        infos=infos,
        step=stop,
        end_of_epoch=end_of_epoch,
        pace=pace,
    )


def _check_losses(batch: _Batch) -> _Batch:
    """Fails the runs whose training loss was not finite."""
    for place, number in _alive(batch):
        bad_step = int(batch.infos[place].bad_step)
        if bad_step >= 0:
            batch = _fail(batch, number, bad_step)
    return batch


def _finish_epoch(batch: _Batch) -> _Batch:
    """Evaluates, writes the curves, and saves if the config says so."""
    epoch = batch.step // batch.recipe.steps_per_epoch - 1
    info = batch.programs.finish_epoch(batch.state, batch.info, epoch)
    infos = batch.programs.fetch(info)
    batch = dataclasses.replace(batch, info=info, infos=infos)
    for place, number in _alive(batch):
        curve = infos[place].curve
        means = {name: float(values[epoch]) for name, values in curve.items()}
        # The test loss shows weights that became NaN in the very last step.
        if math.isfinite(means["test_loss"]):
            results.write_curve(batch.jobs[number].curve, infos[place], epoch + 1)
            batch.emit(_epoch_ended(batch, number, epoch, means))
        else:
            batch = _fail(batch, number, batch.step - 1)
    every = batch.jobs[0].run.config.train.checkpoint_every
    is_last = batch.step == batch.recipe.num_steps
    if is_last or (epoch + 1) % every == 0:
        batch = _save(batch)
    return batch


def _epoch_ended(
    batch: _Batch, number: int, epoch: int, means: Mapping[str, float]
) -> events.EpochEnded:
    """Returns the event of a run whose epoch was evaluated."""
    run = batch.jobs[number].run
    return events.EpochEnded(
        run=run,
        step=batch.step,
        num_steps=batch.recipe.num_steps,
        epoch=epoch,
        means=means,
        images_per_second=_images_per_second(batch, run),
    )


def _report(batch: _Batch) -> None:
    """Emits the progress of each run."""
    # At the end of an epoch the next one is the present one, except after the last.
    epoch = batch.step // batch.recipe.steps_per_epoch
    for place, number in _alive(batch):
        run, sums = batch.jobs[number].run, batch.infos[place].running
        num_examples = int(sums.examples)
        loss = top1 = math.nan
        if num_examples:
            loss = float(sums.loss) / num_examples
            top1 = int(sums.top1) / num_examples
        batch.emit(
            events.Progress(
                run=run,
                step=batch.step,
                num_steps=batch.recipe.num_steps,
                epoch=min(epoch, run.config.train.num_epochs - 1),
                loss=loss,
                top1=top1,
                images_per_second=_images_per_second(batch, run),
            )
        )


def _images_per_second(batch: _Batch, run: Run) -> float:
    seconds = batch.pace.latest
    return run.config.train.batch_size / seconds if seconds else 0.0


def _save(batch: _Batch, *, wait: bool = False) -> _Batch:
    """Starts to write a checkpoint of each run; `wait` returns when they are on the disk."""
    pairs = batch.programs.fetch((batch.state, batch.info))
    for place, number in _alive(batch):
        checkpoints.save(batch.folders[number], batch.step, pairs[place], wait=wait)
    return dataclasses.replace(batch, saved_at=time.perf_counter())


def _seconds_unsaved(batch: _Batch) -> float:
    """Returns the time since the last checkpoint."""
    return time.perf_counter() - batch.saved_at


def _say_stopped(batch: _Batch) -> str:
    """Returns what to tell the user of a stop."""
    num_runs = len(_alive(batch))
    saved = "the run is saved" if num_runs == 1 else f"{num_runs} runs are saved"
    return (
        f"stopped after step {batch.step} of {batch.recipe.num_steps}; {saved}. Run the same "
        "command without --overwrite to resume."
    )


def _outcomes(batch: _Batch) -> list[Trained | Exception]:
    """Returns the result or the error of each job."""
    found: dict[int, Trained | Exception] = dict(batch.errors)
    alive = _alive(batch)
    if alive:
        pairs = batch.programs.fetch((batch.state, batch.info))
        timing = _timing(batch)
        for place, number in alive:
            state, info = pairs[place]
            found[number] = Trained(state, info, timing)
    return [found[number] for number in range(len(batch.jobs))]


def _timing(batch: _Batch) -> Timing:
    # Those that failed took their share of the time too.
    num_runs, pace = len(batch.places), batch.pace
    step_seconds = None
    if pace.num_steps:
        step_seconds = pace.seconds / pace.num_steps / num_runs
    return Timing(
        seconds=(time.perf_counter() - batch.started) / num_runs,
        num_steps=batch.step - batch.first_step,
        step_seconds=step_seconds,
        num_runs=num_runs,
    )


def _fail(batch: _Batch, number: int, step: int) -> _Batch:
    """Records that the loss of a run was not finite at a step, counted from 0."""
    options = batch.jobs[number].run.config.train
    last = batch.folders[number].manager.latest_step()
    kept = "No checkpoint was written yet"
    if last is not None:
        kept = f"The checkpoint after step {last} stays"
    # Steps and epochs are counted from 1 in messages.
    epoch = step // batch.recipe.steps_per_epoch
    error = FloatingPointError(
        f"the loss is not finite at step {step + 1} (epoch {epoch + 1} of {options.num_epochs}). "
        f"{kept}. Lower train.learning_rate={options.learning_rate}, or clip the gradient: "
        "--config.train.clip_norm=1."
    )
    return dataclasses.replace(batch, errors={**batch.errors, number: error})


# How many steps a call takes


def _record_call(pace: _Pace, num_steps: int, seconds: float) -> _Pace:
    """Adds a call of the compiled loop to the pace, and decides how many steps the next one takes.

    The first call takes no step: it compiles. Then comes one step, and four times as many in each
    call until a call takes a few seconds.
    """
    new = dataclasses.replace(
        pace,
        num_calls=pace.num_calls + 1,
        stride=next_stride(pace.stride, num_steps, seconds),
    )
    # The first two calls compile and warm up, and say nothing of the speed.
    if pace.num_calls < 2:
        return new
    return dataclasses.replace(
        new,
        latest=seconds / num_steps,
        num_steps=pace.num_steps + num_steps,
        seconds=pace.seconds + seconds,
    )


def next_stride(stride: int, num_steps: int, seconds: float) -> int:
    """Returns how many steps to take in the next call, after one of `num_steps` took `seconds`."""
    if num_steps == 0:
        return 1
    # A short call says little of the speed, so the stride grows by steps.
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
