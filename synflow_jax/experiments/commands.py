"""Defines the commands: what prune.py, train.py and export.py do once their flags are parsed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from synflow_jax import storage
from synflow_jax.experiments import (
    certificates,
    checks,
    cli,
    failures,
    initialization,
    masks,
    pictures,
    report,
)
from synflow_jax.experiments.events import Failed, Outcome
from synflow_jax.experiments.run import Run, resolve, resolve_one
from synflow_jax.parallel import hosts
from synflow_jax.storage import Workdir

# Training takes a second to import, and prune.py does without it: `train` and `export` import what
# they need when they are called.


def prune(config: Any, workdir: str, *, overwrite: bool) -> None:
    """Prunes one network or those of a grid, unless the folder has their masks, and prints them.

    Args:
      config: the value of --config.
      workdir: the value of --workdir.
      overwrite: prune again what the folder holds.

    Raises:
      ValueError: a value is out of its range, or runs of the grid failed.
      FloatingPointError: the scores are not finite.
      OSError: a file cannot be written.
    """
    checked = cli.check_config(config)
    checks.check_prune(checked)
    folder = cli.check_workdir(workdir)
    folder.check_rows()
    runs = resolve(checked)
    output = report.console()
    # A grid of one is shown with its layers, as any single run.
    if len(runs) > 1:
        _prune_grid(runs, folder, overwrite, output)
    else:
        _prune_one(runs[0], folder, overwrite, output)


def _prune_one(run: Run, workdir: Workdir, overwrite: bool, output: Console) -> None:
    """Prunes one network, and prints and draws its layers."""

    def make(run: Run) -> masks.Row:
        cli.use_compilation_cache()
        # Unbounded, so that the maximum is computed only once.
        network = initialization.build(run, bounded=False)
        maximum = initialization.max_compression(network)
        initialization.check_compression(run, network, maximum)
        report.network(output, run.config.model, network, maximum)
        with report.progress(output, report.num_iterations(run)) as on_progress:
            _, row = masks.prune(run, network, workdir, maximum=maximum, on_progress=on_progress)
        return row

    workdir.clean()
    row, found = masks.find_or_make(run, workdir, make, overwrite=overwrite)
    if found:
        report.already_done(output, workdir)
    pictures.save(pictures.layers(row), workdir.layers_picture_path)
    report.row(output, row)
    report.files(output, workdir.path, row)


def _prune_grid(runs: Sequence[Run], workdir: Workdir, overwrite: bool, output: Console) -> None:
    """Prunes the networks of a grid, and prints a line for each.

    Raises:
      ValueError: some runs failed. The others are done.
    """
    cli.use_compilation_cache()
    workdir.clean()
    failed = []
    with report.grid(output, runs) as emit:
        outcomes = masks.prune_all(runs, workdir, overwrite=overwrite, emit=emit)
        for outcome in failures.listed(outcomes, workdir, lambda run: run.prune_id):
            emit(outcome)
            if isinstance(outcome, Failed):
                failed.append(outcome)
    report.grid_files(output, workdir.path)
    failures.check(failed, len(runs), workdir)


def verify(path: str, config: Any) -> None:
    """Verifies a certificate and prints the verdict.

    Args:
      path: the value of --verify.
      config: the value of --config. Only a run that began from a file of weights needs it.

    Raises:
      ValueError: the certificate does not hold.
    """
    if not path:
        raise ValueError("--verify='' names no certificate: write --verify=FILE.json.")
    cli.use_compilation_cache()
    init = None if config is None else cli.check_config(config).init
    output = report.console()
    file = str(cli.check_path(path, "verify"))
    with report.verification(output) as on_progress:
        verdict = certificates.verify(file, on_progress, init=init)
    report.verdict(output, verdict)


def train(config: Any, workdir: str, *, overwrite: bool) -> None:
    """Prunes and trains one network or those of a grid, and prints the results.

    Runs that the folder holds are skipped, and a run that was stopped resumes.

    Args:
      config: the value of --config.
      workdir: the value of --workdir.
      overwrite: prune and train again what the folder holds.

    Raises:
      ValueError: a value is out of its range, or runs of the grid failed.
      FloatingPointError: a score or a loss is not finite.
      OSError: a file cannot be written.
      storage.Stopped: a signal came, and all runs are saved.
    """
    from synflow_jax.experiments import consistency, engine

    checked = cli.check_config(config)
    checks.check_train(checked)
    folder = cli.check_workdir(workdir)
    runs = resolve(checked)
    # Before anything uses JAX: processes cannot join once it has started.
    job = cli.join_hosts()
    cli.use_compilation_cache()
    folder.check_rows()
    is_grid = len(runs) > 1 or job.count > 1
    # The rows of a grid are compared with each other, so its runs must agree in all the rest.
    if is_grid and not overwrite:
        consistency.check_workdir(runs, folder)
    output = report.console()
    own = hosts.share(runs, job)
    if job.count > 1:
        output.print(f"process {job.index} of {job.count}: {len(own)} of {len(runs)} runs")
    shown = report.training_grid(output, own) if is_grid else report.training_run(output, folder)
    with cli.stop_signals() as should_stop, shown as emit:
        outcomes = engine.run(
            own,
            folder,
            split=not is_grid,
            overwrite=overwrite,
            emit=emit,
            should_stop=should_stop,
        )
    if is_grid:
        _finish_grid(outcomes, folder, output)
    else:
        _finish_run(outcomes[0], folder, output)


def _finish_grid(outcomes: Sequence[Outcome], workdir: Workdir, output: Console) -> None:
    """Lists the files of a grid that was trained.

    Raises:
      ValueError: some runs failed. The others are done.
    """
    report.sweep_files(output, workdir.path)
    failed = [outcome for outcome in outcomes if isinstance(outcome, Failed)]
    failures.check(failed, len(outcomes), workdir)


def _finish_run(outcome: Outcome, workdir: Workdir, output: Console) -> None:
    """Prints the result of a single run, and draws its curve.

    Raises:
      Exception: the error of a run that failed.
    """
    from synflow_jax.experiments import results, row_schema

    if isinstance(outcome, Failed):
        raise outcome.error
    row = outcome.row
    curve = results.finished_curve(row, workdir)
    pictures.save(pictures.curve(row, curve), workdir.curve_picture_path)
    report.trained(output, row, row_schema.find_timing(row["run_id"], workdir))
    report.train_files(output, workdir.path, row["run_id"])


def export(
    config: Any,
    workdir: str | None,
    *,
    run_id: str | None,
    formats: Sequence[str],
    out: str | None,
    compact: bool,
) -> None:
    """Writes the network of a run as files, and prints their names.

    Args:
      config: the value of --config, or None.
      workdir: the value of --workdir.
      run_id: names the run, in place of the config.
      formats: some of `exports.FORMATS`.
      out: the folder for the files; None: a folder of the workdir.
      compact: leave out the useless units.

    Raises:
      ValueError: a value is out of its range, or there is no such run.
      OSError: a file cannot be read or written.
    """
    from synflow_jax.experiments import exports

    formats = exports.check_formats(formats)
    if not workdir:
        raise ValueError(
            "--workdir is missing: name the folder that prune.py or train.py has written."
        )
    if out == "":
        raise ValueError("--out='' names no folder: give one, --out=DIR, or leave the flag out.")
    source = Workdir(cli.check_path(workdir, "workdir"))
    storage.check_folder(source.path)
    run = None
    if config is not None:
        run = resolve_one(cli.check_config(config, reads_data=False))
    row = exports.find_row(source, run, run_id)
    folder = source.exported_path if out is None else cli.check_path(out, "out")
    storage.check_writable(folder, "out")
    cli.use_compilation_cache()
    network = exports.read(row, source, None if run is None else run.config.init)
    name = row["run_id"]
    if compact:
        network = exports.compact(network, trained=exports.is_trained(row))
        name = f"{name}-compact"
    names = exports.write(network, row, folder, name, formats)
    report.exported(report.console(), name, folder, network, names)
