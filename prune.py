"""Prunes one network at initialization, or every network of a grid.

    python prune.py --config=configs/vgg16_c100.py --workdir=runs/vgg16 --config.seed=1
    python prune.py --config=configs/digits.py --workdir=runs/grid --config.grid.seed=0,1,2
    python prune.py --verify=runs/vgg16/certificates/RUN_ID.json

Every value of the config has a flag of its name: --help lists them, and
synflow_jax/experiments/config.py explains them.
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from synflow_jax.experiments import cli, commands

_CONFIG = config_flags.DEFINE_config_file(
    "config", help_string=cli.config_help("train.", "sweep."), lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", "runs/prune", "the folder for masks, rows and pictures")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "prune again what the folder already holds")
_VERIFY = flags.DEFINE_string("verify", None, "a certificate to verify, in place of pruning")


def main(argv: Sequence[str]) -> None:
    """Prunes, or verifies a certificate."""
    del argv
    if _VERIFY.value is not None:
        commands.verify(_VERIFY.value, _CONFIG.value)
    else:
        commands.prune(_CONFIG.value, _WORKDIR.value, overwrite=_OVERWRITE.value)


if __name__ == "__main__":
    cli.run(main)
