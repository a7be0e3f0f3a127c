"""A small convolutional network on scikit-learn's digits, SynFlow, compression 10: seconds, with real data.

    python prune.py --config=configs/digits.py

@@
"""

from synflow_jax.config import Config, PruneConfig


def get_config() -> Config:
    """Three layers, digits."""
    return Config(model="conv", dataset="digits", prune=PruneConfig(compression=10.0))
