"""The ablations that every method of pruning at initialization is asked for, on the digits: one config, one table.

    python train.py --config=paper/configs/ablations.py --workdir=runs/ablations
    python -m paper ablations --rows=runs/ablations
    python prune.py --config=paper/configs/ablations.py --workdir=runs/ablations   # the masks alone

Masks shuffled within layers (random at the rule's densities), weights drawn anew, scores inverted (Frankle et al. 2021,
Su et al. 2020); random, uniform and ERK beside them; linear against exponential and 1, 10 and 100 iterations; scores in
training mode; ten iterations of SNIP and GraSP, nested or with regrowth (FORCE). Three seeds of each: 93 runs.
--config.grid.seed=0, takes one: 13 minutes on two CPU cores that others used as well.
Expect SynFlow in one iteration and inverted scores (but GraSP's) to collapse, shuffled masks to do as well as their
rule, and SynFlow in training mode, where a norm subtracts its one input's mean, to do worse.
"""

from synflow_jax.experiments.config import Config, Grid, PruneConfig, TrainConfig


def get_config() -> Config:
    """VGG-11 at an eighth of its width, 144,856 weights, compression 30."""
    return Config(
        model="cifar_vgg11_bn",
        dataset="digits",
        width_multiplier=0.125,
        prune=PruneConfig(compression=30.0),
        train=TrainConfig(num_epochs=10, batch_size=64, learning_rate=0.05, drops=(6, 8)),
        grid=Grid(seed=(0, 1, 2)),
        grids=(
            Grid(
                pruner=("synflow", "snip", "grasp", "magnitude"),
                ablation=("none", "shuffle", "reinitialize", "invert"),
            ),
            Grid(pruner=("random", "uniform", "erk")),
            Grid(
                pruner=("synflow",), schedule=("exponential", "linear"), num_iterations=(1, 10, 100)
            ),
            Grid(pruner=("synflow", "snip", "grasp"), mode=("train",)),
            Grid(pruner=("snip", "grasp"), num_iterations=(10,), nested=(True, False)),
        ),
    )
