"""A small convolutional network on scikit-learn's digits, SynFlow, compression 10: seconds, with real data.

    python prune.py --config=configs/digits.py

Expect 26,039 of 260,384 weights kept in 3 layers, no layer empty.
Measured on two CPU cores, compilation included: 8 s.
"""

from synflow_jax.config import Config, PruneConfig


def get_config() -> Config:
    """Three layers, digits."""
    return Config(model="conv", dataset="digits", prune=PruneConfig(compression=10.0))
