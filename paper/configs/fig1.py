"""Fig. 1 of the paper: test accuracy of VGG-16 (BN) on CIFAR-100 at compression 10^0 to 10^6, five rules, three seeds.

    python train.py --config=paper/configs/fig1.py --workdir=runs/fig1
    python -m paper fig1 --rows=runs/fig1 --published=paper/published/fig1.json

375 runs of 160 epochs, each of them hours on a GPU; not run here. paper/configs/fig1_digits.py is a variant that was.
Expect the published curves behind ours: chance (1 %) from 10^2.5 on for magnitude, 10^3 for random, 10^3.25 for GraSP
and 10^3.5 for SNIP. Near the maximum, 10^6.02, SynFlow's accuracy is chance too, but two of the three published runs
keep a path.
Needs CIFAR-100, prepared once for tensorflow-datasets; without it the run says how.
"""

from synflow_jax.experiments.config import Config, Grid


def get_config() -> Config:
    """VGG-16 (BN), CIFAR-100, the published recipe; a quarter of a decade between compressions."""
    return Config(
        model="cifar_vgg16_bn",
        dataset="cifar100",
        grid=Grid(
            seed=(0, 1, 2),
            pruner=("random", "magnitude", "snip", "grasp", "synflow"),
            compression=tuple(10 ** (power / 4) for power in range(25)),
        ),
    )
