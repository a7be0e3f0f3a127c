"""Fig. 3 of the paper: what enters and what leaves each hidden unit of VGG-19, ImageNet input, five rules.

    python prune.py --config=paper/configs/fig3.py --workdir=runs/fig3
    python -m paper fig3 --rows=runs/fig3

Expect SynFlow's 13,696 units on the line; nine of ten of GraSP's within 0.55 and 1.6 of it, SNIP's within 0.02 and 3.7.
Measured on two CPU cores that others used as well: four minutes, 6.3 GB; 90 MB of masks.
Without ImageNet SNIP and GraSP score ten of scikit-learn's digits, enlarged, whose labels are the first ten classes;
with it, --config.prune.dataset=imagenet scores one image of each class.
"""

from synflow_jax.experiments.config import Config, Grid, PruneConfig


def get_config() -> Config:
    """VGG-19, scored once by every rule; SNIP and GraSP score enlarged digits, one a class."""
    return Config(
        model="imagenet_vgg19",
        dataset="imagenet",
        prune=PruneConfig(
            compression=1.0, dataset="digits", examples_per_class=1, batch_size=2, record_units=True
        ),
        grid=Grid(pruner=("random", "magnitude", "snip", "grasp", "synflow")),
    )
