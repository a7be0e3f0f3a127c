"""Fig. 5b of the paper: average squared weight of each layer of VGG-19 (BN) before and after training on CIFAR-10.

    python train.py --config=paper/configs/fig5b.py --workdir=runs/fig5b
    python -m paper fig5b --rows=runs/fig5b

Three runs of 160 epochs without pruning, each of them hours on a GPU; not run here. paper/configs/fig5b_digits.py is a
variant for two cores.
Expect the averages after training to be inversely proportional to the sizes of the layers: slope 1.
Needs CIFAR-10, prepared once for tensorflow-datasets; without it the run says how.
"""

from synflow_jax.experiments.config import Config, Grid, PruneConfig


def get_config() -> Config:
    """VGG-19 (BN), CIFAR-10, unpruned."""
    return Config(
        model="cifar_vgg19_bn",
        dataset="cifar10",
        prune=PruneConfig(pruner="magnitude", compression=1.0),
        grid=Grid(seed=(0, 1, 2)),
    )
