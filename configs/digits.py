"""A small convolutional network on scikit-learn's digits, SynFlow, compression 10: seconds, with real data.

    python prune.py --config=configs/digits.py --workdir=runs/digits
    python train.py --config=configs/digits.py --workdir=runs/digits   # prunes too

Expect 26,039 of 260,384 weights kept in 3 layers, no layer empty, and a test accuracy of 97.8 %.
Measured on two CPU cores, compilation included: 8 s of pruning; training takes 1 s an epoch.
"""

from synflow_jax.experiments.config import Config, PruneConfig, TrainConfig


def get_config() -> Config:
    """Three layers, digits."""
    return Config(
        model="conv",
        dataset="digits",
        prune=PruneConfig(compression=10.0),
        train=TrainConfig(num_epochs=15, batch_size=64, learning_rate=0.02, drops=(10, 13)),
    )
