"""Makes the rows of Fig. 5a: iterative magnitude pruning (IMP) of VGG-19 (BN) on CIFAR-10.

    python train.py --config=paper/configs/fig5a.py --workdir=runs/fig5a
    python -m paper fig5a --rows=runs/fig5a

Level k of n prunes to compression^(k/n) and rewinds. A run of n levels trains n + 1 times for 160
epochs, which takes days on a GPU. We have not run it; paper/configs/fig5a_digits.py is a variant
for two cores. The numbers of levels, 1 to 32, are our choice. Runs with few levels are expected to
collapse at compressions where runs with many do not.

Needs CIFAR-10, prepared once for tensorflow-datasets. Without it the run says how.
"""

from paper.configs import recipes
from synflow_jax.experiments.config import Config, Grid, PruneConfig


def get_config() -> Config:
    """Returns IMP and the unpruned network: VGG-19 (BN) on CIFAR-10."""
    return Config(
        model="cifar_vgg19_bn",
        dataset="cifar10",
        prune=PruneConfig(num_iterations=1),
        grid=Grid(seed=recipes.SEEDS),
        grids=(
            recipes.unpruned(),
            Grid(
                pruner=("imp",),
                num_iterations=(1, 2, 4, 8, 16, 32),
                compression=recipes.powers_of_ten(0.5, 4, per_decade=2),
            ),
        ),
    )
