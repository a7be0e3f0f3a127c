"""Fig. 1 of the paper on scikit-learn's digits: five rules, VGG-11 (BN) at an eighth of its width, up to the maximum.

    python train.py --config=paper/configs/fig1_digits.py --workdir=runs/fig1_digits
    python -m paper fig1 --rows=runs/fig1_digits

Expect every rule but SynFlow to collapse far below the maximal compression, 16,095 (one weight in each of nine layers):
seed 0 at 100 (random) and 316 (magnitude, SNIP, GraSP). SynFlow's networks stay connected in all three seeds, but from
10^4 on, with 15 weights and less, learn nothing. Unpruned: 99.3 %.
Measured on two CPU cores that others used as well: 22 minutes, 11.5 of processor time.
"""

from synflow_jax.experiments.config import Config, Grid, TrainConfig


def get_config() -> Config:
    """144,856 weights, five rules, ten compressions, three seeds: 150 runs of six epochs."""
    return Config(
        model="cifar_vgg11_bn",
        dataset="digits",
        width_multiplier=0.125,
        train=TrainConfig(
            num_epochs=6,
            batch_size=64,
            learning_rate=0.05,
            drops=(4,),
            augment=False,
            compact=False,
            keep_checkpoints=1,
        ),
        grid=Grid(
            seed=(0, 1, 2),
            pruner=("random", "magnitude", "snip", "grasp", "synflow"),
            compression=(*(10 ** (power / 2) for power in range(9)), 144_856 / 9),
        ),
    )
