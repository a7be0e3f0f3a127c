"""Prunes one network at initialization, unless prune.py has done it in the same folder, and trains what is left.

    python train.py --config=configs/digits.py --workdir=runs/digits
    python train.py --config=configs/digits.py --workdir=runs/grid --config.grid.seed=0,1,2   # a sweep

Runs of a grid are trained side by side on all devices of all processes: --coordinator, --num_processes and --process_id
join several, --cluster those of a SLURM job or a TPU pod.

Every value of the config can be set by a flag of its name: --help lists them, `synflow_jax/experiments/config.py` explains them.
Stop it at any moment (Ctrl-C, SIGTERM, a crash): the same command goes on where the last checkpoint stands.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import jax
from absl import flags
from ml_collections import config_flags
from rich.console import Console

from synflow_jax import storage, training
from synflow_jax.experiments import (
    cli,
    config,
    imp_run,
    pictures,
    prune_grid,
    prune_run,
    report,
    sweep,
    train_run,
)
from synflow_jax.experiments.config import Config
from synflow_jax.parallel import hosts
from synflow_jax.storage import checkpoints

_CONFIG = config_flags.DEFINE_config_file("config", help_string=cli.config_help(), lock_config=True)
_WORKDIR = flags.DEFINE_string(
    "workdir", "runs/train", "the folder for checkpoints, masks, rows, curves and pictures"
)
_OVERWRITE = flags.DEFINE_bool(
    "overwrite", False, "prune and train again what this folder already holds"
)


def main(argv: Sequence[str]) -> None:
    """Checks, prunes and trains unless it is done already, draws and prints."""
    del argv
    settings = cli.check_config(_CONFIG.value)
    runs = config.expand(settings)
    for run in runs:
        config.check_train(run)
    workdir = cli.check_workdir(_WORKDIR.value)
    output = report.console()
    job = cli.join_hosts()
    if len(runs) > 1 or job.count > 1:
        _sweep(runs, job, workdir, output)
    else:
        _one(runs[0], workdir, output)


def _sweep(
    runs: Sequence[Config], job: hosts.Hosts, workdir: pathlib.Path, output: Console
) -> None:
    cli.use_compilation_cache()
    storage.read_all_rows(workdir)  # a damaged one is found now, not after the work
    if not _OVERWRITE.value:
        sweep.check_workdir(runs, workdir)
    own = hosts.share(runs, job)
    if job.count > 1:
        output.print(f"process {job.index} of {job.count}: {len(own)} of {len(runs)} runs")
    errors = []
    with cli.stop_signals() as should_stop, report.sweep(output, own) as (on_progress, show):
        for outcome in sweep.run(
            own,
            workdir,
            overwrite=_OVERWRITE.value,
            on_progress=on_progress,
            should_stop=should_stop,
            say=output.print,
        ):
            show(outcome)
            errors += [] if outcome.error is None else [outcome.error]
    report.sweep_files(output, workdir)
    if errors:
        raise ValueError(
            f"{len(errors)} of {len(own)} runs failed, the first one so: {errors[0]} "
            f"{storage.own(prune_grid.failed_path(workdir))} lists them; the same command tries them again."
        )


def _one(settings: Config, workdir: pathlib.Path, output: Console) -> None:
    row = train_run.find_row(settings, workdir)
    if row is not None and not _OVERWRITE.value:
        output.print(
            f"This run is already in {workdir}, from an earlier time; --overwrite runs it again."
        )
    else:
        run_id = config.train_id(settings)
        if _OVERWRITE.value:
            checkpoints.delete(train_run.checkpoint_path(workdir, run_id))
        cli.use_compilation_cache()
        network = prune_run.build(settings)
        report.network(output, settings.model, network)
        plan = train_run.prepare(settings, network.input_shape)
        found = None if _OVERWRITE.value else prune_run.find_mask(settings, network, workdir)
        if found is None and settings.prune.pruner == config.IMP:
            num_levels = config.num_iterations(settings.prune)
            with cli.stop_signals() as should_stop, report.levels(output, num_levels) as on_level:
                found = imp_run.find_or_make_mask(
                    settings, network, workdir, plan,
                    overwrite=_OVERWRITE.value, on_progress=on_level, should_stop=should_stop,
                )  # fmt: skip
        if found is None:
            with report.progress(output, config.num_iterations(settings.prune)) as on_iteration:
                prune_run.prune(settings, network, workdir, on_iteration)
            found = prune_run.find_mask(settings, network, workdir)
        assert found is not None
        mask, prune_row = found
        report.pruned(output, prune_row)
        form = train_run.choose_form(settings, network, mask)
        report.form(output, form)
        batch_size = settings.train.batch_size
        split = training.batch_sharding(batch_size) is not None
        report.recipe(output, settings.train.num_epochs, settings.train.drops)
        report.devices(output, batch_size, jax.local_device_count(), split=split)
        shown = report.training(output, settings.train.num_epochs, settings.prune.rewind_step)
        with cli.stop_signals() as should_stop, shown as on_progress:
            row = train_run.train(
                settings, network, mask, workdir,
                plan=plan, form=form, on_progress=on_progress, should_stop=should_stop,
            )  # fmt: skip
    curve = train_run.curve_path(workdir, row["run_id"])
    pictures.save(pictures.curve(row, train_run.read_curve(curve)), workdir / "curve.png")
    report.trained(output, row, train_run.find_timing(workdir, row["run_id"]))
    report.train_files(output, workdir, row["run_id"])


if __name__ == "__main__":
    cli.run(main)
