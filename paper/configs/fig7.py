"""Fig. 7 of the paper: SynFlow beside SNIP and GraSP in 100 iterations and IMP in ten levels; VGG-16 (BN) on CIFAR-10.

    python train.py --config=paper/configs/fig7.py --workdir=runs/fig7
    python -m paper fig7 --rows=runs/fig7

SNIP and GraSP run in a single iteration as well. Hours on a GPU for each run of 160 epochs, and eleven times as long
for one of IMP; not run here. paper/configs/fig7_digits.py is a variant for two cores.
The paper's own figure was not at hand: network, data set and number of levels are our choice.
Needs CIFAR-10, prepared once for tensorflow-datasets; without it the run says how.
"""

from synflow_jax.experiments.config import Config, Grid, PruneConfig

_COMPRESSIONS = tuple(10 ** (power / 2) for power in range(1, 9))


def get_config() -> Config:
    """VGG-16 (BN), CIFAR-10; the unpruned network once a seed."""
    return Config(
        model="cifar_vgg16_bn",
        dataset="cifar10",
        prune=PruneConfig(num_iterations=1),
        grid=Grid(seed=(0, 1, 2)),
        grids=(
            Grid(pruner=("magnitude",), compression=(1.0,)),
            Grid(pruner=("snip", "grasp"), compression=_COMPRESSIONS),
            Grid(
                pruner=("snip", "grasp", "synflow"),
                num_iterations=(100,),
                compression=_COMPRESSIONS,
            ),
            Grid(pruner=("imp",), num_iterations=(10,), compression=_COMPRESSIONS),
        ),
    )
