r"""Fig. 5a of the paper: iterative magnitude pruning (IMP) of VGG-19 (BN) on CIFAR-10 in 1 to 32 levels.

    python train.py --config=configs/fig5a.py --workdir=runs/fig5a
    python train.py --config=configs/fig5b.py --workdir=runs/fig5b
    python -m synflow_jax.figures fig5a --rows=runs/fig5a,runs/fig5b

Level k of n prunes to compression^(k/n) and rewinds; a run of n levels trains n + 1 times for 160 epochs: days on a
GPU; not run here. configs/fig5a_digits.py is a variant for two cores. The numbers of levels are our choice.
Expect few levels to collapse at compressions at which many do not. The unpruned network is that of fig5b.
Needs CIFAR-10, prepared once for tensorflow-datasets; without it the run says how.
"""

from synflow_jax.config import Config, Grid, PruneConfig


def get_config() -> Config:
    """VGG-19 (BN), CIFAR-10, IMP."""
    return Config(
        model="cifar_vgg19_bn",
        dataset="cifar10",
        prune=PruneConfig(pruner="imp"),
        grid=Grid(
            seed=(0, 1, 2),
            num_iterations=(1, 2, 4, 8, 16, 32),
            compression=tuple(10 ** (power / 2) for power in range(1, 9)),
        ),
    )
