"""Prunes networks at initialization, unless the folder has their masks, and trains what is left.

    python train.py --config=configs/digits.py --workdir=runs/digits
    python train.py --config=configs/digits.py --workdir=runs/grid --config.grid.seed=0,1,2

The runs of a grid train side by side on all devices of all processes: --coordinator,
--num_processes and --process_id join several, --cluster those of a SLURM job or a TPU pod. A run
can be stopped at any moment (Ctrl-C, SIGTERM, a crash): the same command resumes it.

Every value of the config has a flag of its name: --help lists them, and
synflow_jax/experiments/config.py explains them.
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from synflow_jax.experiments import cli, commands

_CONFIG = config_flags.DEFINE_config_file("config", help_string=cli.config_help(), lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", "runs/train", "the folder for everything that is written")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "prune and train again what the folder holds")


def main(argv: Sequence[str]) -> None:
    """Prunes and trains."""
    del argv
    commands.train(_CONFIG.value, _WORKDIR.value, overwrite=_OVERWRITE.value)


if __name__ == "__main__":
    cli.run(main)
