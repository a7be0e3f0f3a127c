"""Writes the network of a run, trained or pruned, as files for others.

    python export.py --workdir=runs/digits --config=configs/digits.py --out=exported --compact
    python export.py --workdir=runs/digits --run=RUN_ID --format=jax --out=exported

`--format` is a list of safetensors (all that there is, read back by `synflow_jax.exchange.load`), jax (a program that
runs without this package) and torch (PyTorch's state dict). `--compact` leaves out what the mask has made useless.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from synflow_jax import storage
from synflow_jax.experiments import cli, config, export_run, report

_CONFIG = config_flags.DEFINE_config_file(
    "config", help_string=cli.config_help("grid."), lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "the folder that prune.py or train.py has written")
_RUN = flags.DEFINE_string(
    "run", None, "the run_id of a row; without it, the run of --config, trained if it is there"
)
_FORMAT = flags.DEFINE_list("format", "safetensors,jax,torch", "what to write")
_OUT = flags.DEFINE_string("out", None, "the folder for the files; by default WORKDIR/exported")
_COMPACT = flags.DEFINE_bool("compact", False, "as a smaller dense network")


def main(argv: Sequence[str]) -> None:
    """Checks, reads, writes and prints."""
    del argv
    formats = export_run.check_formats(_FORMAT.value)
    if _WORKDIR.value is None:
        raise ValueError(
            "--workdir is missing: name the folder that prune.py or train.py has written."
        )
    settings = None
    if _CONFIG.value is not None:
        settings = cli.check_config(_CONFIG.value, reads_data=False)
        config.check_one(settings)
    workdir = pathlib.Path(_WORKDIR.value)
    row = export_run.find_row(workdir, settings, _RUN.value)
    folder = pathlib.Path(_OUT.value or workdir / "exported")
    storage.check_writable(folder, "out")
    cli.use_compilation_cache()
    network = export_run.read(row, workdir, None if settings is None else settings.init)
    name = row["run_id"]
    if _COMPACT.value:
        network, name = (
            export_run.compact(network, trained="prune_run_id" in row),
            f"{name}-compact",
        )
    names = export_run.write(network, row, folder, name, formats)
    report.exported(report.console(), name, folder, network, names)


if __name__ == "__main__":
    cli.run(main)
