"""Fig. 2 of the paper: what is kept in each layer of VGG-19, ImageNet input, five rules, compression 2^0 to 2^24.

    python prune.py --config=paper/configs/fig2.py --workdir=runs/fig2
    python -m paper fig2 --rows=runs/fig2

Expect every rule but SynFlow to empty a layer far below the maximal compression, 7,560,660; 2^24 lies above it.
Not timed as a whole: SynFlow's 13 runs of 100 iterations are 22 minutes at the 1.0 s an iteration that
paper/configs/schedule.py took (two idle cores); the other rules score once each (paper/configs/fig4.py: four minutes).
Without ImageNet SNIP and GraSP score ten of scikit-learn's digits, enlarged, whose labels are the first ten classes;
with it, --config.prune.dataset=imagenet scores one image of each class.
"""

from synflow_jax.experiments.config import Config, Grid, PruneConfig


def get_config() -> Config:
    """VGG-19 at 13 compressions by five rules; SNIP and GraSP score enlarged digits, one a class."""
    return Config(
        model="imagenet_vgg19",
        dataset="imagenet",
        prune=PruneConfig(
            dataset="digits", examples_per_class=1, batch_size=2, beyond_maximum=True
        ),
        grid=Grid(
            pruner=("random", "magnitude", "snip", "grasp", "synflow"),
            compression=tuple(2.0**power for power in range(0, 25, 2)),
        ),
    )
