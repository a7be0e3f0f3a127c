"""Fig. 5a of the paper: iterative magnitude pruning (IMP) of VGG-19 (BN) on CIFAR-10 in 1 to 32 levels.

    python train.py --config=paper/configs/fig5a.py --workdir=runs/fig5a
    python -m paper fig5a --rows=runs/fig5a

Level k of n prunes to compression^(k/n) and rewinds; a run of n levels trains n + 1 times for 160 epochs: days on a
GPU; not run here. paper/configs/fig5a_digits.py is a variant for two cores. The numbers of levels are our choice.
Expect few levels to collapse at compressions at which many do not.
Needs CIFAR-10, prepared once for tensorflow-datasets; without it the run says how.
"""

from synflow_jax.experiments.config import Config, Grid, PruneConfig


def get_config() -> Config:
    """VGG-19 (BN), CIFAR-10: IMP, and unpruned."""
    return Config(
        model="cifar_vgg19_bn",
        dataset="cifar10",
        prune=PruneConfig(num_iterations=1),
        grid=Grid(seed=(0, 1, 2)),
        grids=(
            Grid(pruner=("magnitude",), compression=(1.0,)),
            Grid(
                pruner=("imp",),
                num_iterations=(1, 2, 4, 8, 16, 32),
                compression=tuple(10 ** (power / 2) for power in range(1, 9)),
            ),
        ),
    )
