"""Fig. 4 of the paper: the average score of each layer of VGG-19 before pruning, ImageNet input, five rules.

    python prune.py --config=paper/configs/fig4.py --workdir=runs/fig4
    python -m paper fig4 --rows=runs/fig4

Expect the slopes random 0.00, magnitude 0.20, SNIP 0.55, GraSP 0.83, SynFlow 1.00 against 1 / layer size.
Measured on two CPU cores that others used as well: four minutes, 6.3 GB; 90 MB of masks.
Rows of paper/configs/fig3.py in the same folder serve as well.
Without ImageNet SNIP and GraSP score ten of scikit-learn's digits, enlarged, whose labels are the first ten classes;
with it, --config.prune.dataset=imagenet scores one image of each class.
"""

from synflow_jax.experiments.config import Config, Grid, PruneConfig


def get_config() -> Config:
    """VGG-19, scored once by every rule; SNIP and GraSP score enlarged digits, one a class."""
    return Config(
        model="imagenet_vgg19",
        dataset="imagenet",
        prune=PruneConfig(compression=1.0, dataset="digits", examples_per_class=1, batch_size=2),
        grid=Grid(pruner=("random", "magnitude", "snip", "grasp", "synflow")),
    )
