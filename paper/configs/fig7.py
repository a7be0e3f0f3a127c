"""Makes the rows of Fig. 7: SynFlow, iterative SNIP, iterative GraSP and IMP.

    python train.py --config=paper/configs/fig7.py --workdir=runs/fig7
    python -m paper fig7 --rows=runs/fig7

SNIP and GraSP run in 100 iterations and in one, IMP in ten levels. The network is VGG-16 (BN) on
CIFAR-10. A run of 160 epochs takes hours on a GPU, and IMP takes eleven times as long. We have not
run them; paper/configs/fig7_digits.py is a variant for two cores. We did not have the paper's own
figure: the network, the data set and the number of levels are our choice.

Needs CIFAR-10, prepared once for tensorflow-datasets. Without it the run says how.
"""

from paper.configs import recipes
from synflow_jax.experiments.config import Config, Grid, PruneConfig


def get_config() -> Config:
    """Returns VGG-16 (BN) on CIFAR-10, with the unpruned network once per seed."""
    at = recipes.powers_of_ten(0.5, 4, per_decade=2)
    return Config(
        model="cifar_vgg16_bn",
        dataset="cifar10",
        prune=PruneConfig(num_iterations=1),
        grid=Grid(seed=recipes.SEEDS),
        grids=(
            recipes.unpruned(),
            Grid(pruner=("snip", "grasp"), compression=at),
            Grid(pruner=("snip", "grasp", "synflow"), num_iterations=(100,), compression=at),
            Grid(pruner=("imp",), num_iterations=(10,), compression=at),
        ),
    )
