"""Fig. 5b of the paper on scikit-learn's digits: average squared weight of each layer before and after training.

    python train.py --config=paper/configs/fig5b_digits.py --workdir=runs/fig5b_digits
    python -m paper fig5b --rows=runs/fig5b_digits

The network of fig1_digits, trained for longer, and with a weight decay that lets the layers reach their balance in that
time. Slope 0.57 before training and 0.85 after it. The head, which no batch norm follows, lies apart.
Measured on two CPU cores: one minute.
"""

from synflow_jax.experiments.config import Config, Grid, PruneConfig, TrainConfig


def get_config() -> Config:
    """VGG-11 (BN) at an eighth of its width, unpruned, three seeds."""
    return Config(
        model="cifar_vgg11_bn",
        dataset="digits",
        width_multiplier=0.125,
        prune=PruneConfig(pruner="magnitude", compression=1.0),
        train=TrainConfig(
            num_epochs=60,
            batch_size=64,
            learning_rate=0.1,
            drops=(54,),
            weight_decay=5e-3,
            augment=False,
            compact=False,
            keep_checkpoints=1,
            checkpoint_every=20,
        ),
        grid=Grid(seed=(0, 1, 2)),
    )
