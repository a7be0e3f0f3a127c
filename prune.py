"""Prunes one network at initialization, or every one of a grid.

    python prune.py --config=configs/vgg16_c100.py --workdir=runs/vgg16 --config.prune.compression=1000
    python prune.py --config=configs/digits.py --workdir=runs/grid --config.grid.seed=0,1,2
    python prune.py --verify=runs/vgg16/certificates/RUN_ID.json

Every value of the config can be set by a flag of its name: --help lists them, `synflow_jax/experiments/config.py` explains them.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags
from rich.console import Console

from synflow_jax import storage
from synflow_jax.experiments import (
    certificates,
    cli,
    config,
    pictures,
    prune_grid,
    prune_run,
    report,
)
from synflow_jax.experiments.config import Config

_CONFIG = config_flags.DEFINE_config_file(
    "config", help_string=cli.config_help("train.", "sweep."), lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", "runs/prune", "the folder for masks, rows and pictures")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "run again what this folder already holds")
_VERIFY = flags.DEFINE_string("verify", None, "a certificate to look at again, in place of pruning")


def main(argv: Sequence[str]) -> None:
    """Checks, prunes unless it is done already, draws and prints."""
    del argv
    if _VERIFY.value is not None:
        _verify(_VERIFY.value, report.console())
        return
    settings = cli.check_config(_CONFIG.value)
    config.check_prune(settings)
    runs = config.expand(settings)
    workdir = cli.check_workdir(_WORKDIR.value)
    output = report.console()
    storage.read_rows(workdir / "rows.jsonl")  # a damaged one is found now, not after the work
    if len(runs) == 1:
        _one(runs[0], workdir, output)
    else:
        _grid(runs, workdir, output)


def _one(settings: Config, workdir: pathlib.Path, output: Console) -> None:
    row = None if _OVERWRITE.value else prune_run.find_row(settings, workdir)
    if row is not None:
        output.print(
            f"This run is already in {workdir}, from an earlier time; --overwrite runs it again."
        )
    else:
        cli.use_compilation_cache()
        network = prune_run.build(settings)
        report.network(output, settings.model, network)
        with report.progress(output, report.num_iterations(settings)) as on_progress:
            row = prune_run.prune(settings, network, workdir, on_progress)
    pictures.save(pictures.layers(row), workdir / "layers.png")
    report.row(output, row)
    report.files(output, workdir, row)


def _verify(path: str, output: Console) -> None:
    cli.use_compilation_cache()
    with report.verification(output) as on_progress:
        init = None if _CONFIG.value is None else cli.check_config(_CONFIG.value).init
        found = certificates.verify(path, on_progress, init=init)
    report.verdict(output, found)


def _grid(runs: Sequence[Config], workdir: pathlib.Path, output: Console) -> None:
    cli.use_compilation_cache()
    errors = []
    with report.grid(output, runs) as (on_progress, show):
        for outcome in prune_grid.run(
            runs, workdir, overwrite=_OVERWRITE.value, on_progress=on_progress
        ):
            show(outcome)
            errors += [] if outcome.error is None else [outcome.error]
    report.grid_files(output, workdir)
    if errors:
        raise ValueError(
            f"{len(errors)} of {len(runs)} runs failed, the first one so: {errors[0]} "
            f"{prune_grid.failed_path(workdir)} lists them; the same command tries them again."
        )


if __name__ == "__main__":
    cli.run(main)
