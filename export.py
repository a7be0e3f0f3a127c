"""Writes the network of a run, trained or pruned, as files for others.

    python export.py --workdir=runs/digits --config=configs/digits.py --out=runs/exported --compact
    python export.py --workdir=runs/digits --run=RUN_ID --format=jax --out=runs/exported

The formats are safetensors (everything; `synflow_jax.storage.networks.load` reads it), jax (a
program that needs no other package) and torch (a state dict).
"""

from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from synflow_jax.experiments import cli, commands

_HELP = cli.config_help("grid.")
_CONFIG = config_flags.DEFINE_config_file("config", help_string=_HELP, lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "the folder that prune.py or train.py has written")
_RUN = flags.DEFINE_string("run", None, "the run_id of a row; by default the run of --config")
_FORMAT = flags.DEFINE_list("format", "safetensors,jax,torch", "the formats to write")
_OUT = flags.DEFINE_string("out", None, "the folder for the files; by default WORKDIR/exported")
_COMPACT = flags.DEFINE_bool("compact", False, "write a smaller dense network")


def main(argv: Sequence[str]) -> None:
    """Exports a network."""
    del argv
    commands.export(
        _CONFIG.value,
        _WORKDIR.value,
        run_id=_RUN.value,
        formats=_FORMAT.value,
        out=_OUT.value,
        compact=_COMPACT.value,
    )


if __name__ == "__main__":
    cli.run(main)
