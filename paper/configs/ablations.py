"""Makes the rows of the ablations that every method of pruning at initialization is asked for.

    python train.py --config=paper/configs/ablations.py --workdir=runs/ablations
    python -m paper ablations --rows=runs/ablations
    python prune.py --config=paper/configs/ablations.py --workdir=runs/ablations  # only the masks

The network is VGG-11 at an eighth of its width on the digits. The table compares:
- masks shuffled within layers, weights drawn anew and inverted scores (Frankle et al. 2021, Su et
  al. 2020);
- random pruning, uniform density and ERK;
- linear and exponential schedules of 1, 10 and 100 iterations;
- scores in training mode;
- ten iterations of SNIP and GraSP, nested or with regrowth (FORCE).

These are 93 runs, three seeds of each kind. --config.grid.seed=0, runs one seed: it took 13 minutes
on two CPU cores that other jobs shared.

SynFlow in one iteration collapses, and so do inverted scores, except GraSP's. Shuffled masks do as
well as their rule. SynFlow in training mode does worse: a norm then subtracts the mean of its only
input.
"""

from paper.configs import recipes
from synflow_jax.experiments.config import Config, Grid, PruneConfig, TrainConfig


def get_config() -> Config:
    """Returns VGG-11 at an eighth of its width, 144,856 weights, at compression 30."""
    ablations = ("none", "shuffle", "reinitialize", "invert")
    schedules = ("exponential", "linear")
    return recipes.narrow_vgg11(
        prune=PruneConfig(compression=30.0),
        train=TrainConfig(num_epochs=10, batch_size=64, learning_rate=0.05, drops=(6, 8)),
        grid=Grid(seed=recipes.SEEDS),
        grids=(
            Grid(pruner=("synflow", "snip", "grasp", "magnitude"), ablation=ablations),
            Grid(pruner=("random", "uniform", "erk")),
            Grid(pruner=("synflow",), schedule=schedules, num_iterations=(1, 10, 100)),
            Grid(pruner=("synflow", "snip", "grasp"), mode=("train",)),
            Grid(pruner=("snip", "grasp"), num_iterations=(10,), nested=(True, False)),
        ),
    )
