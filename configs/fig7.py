"""Fig. 7 of the paper: SynFlow beside SNIP and GraSP in 100 iterations and IMP in ten levels; VGG-16 (BN) on CIFAR-10.

    python train.py --config=configs/fig7.py:iterative --workdir=runs/fig7/iterative
    python train.py --config=configs/fig7.py:single --workdir=runs/fig7/single
    python train.py --config=configs/fig7.py:imp --workdir=runs/fig7/imp
    python -m synflow_jax.figures fig7 --rows=runs/fig7/iterative,runs/fig7/single,runs/fig7/imp

"single" is SNIP and GraSP in one iteration, and the unpruned network. Hours on a GPU for each run of 160 epochs, and
eleven times as long for one of IMP; not run here. configs/fig7_digits.py is a variant for two cores.
Expect iterations to move the critical compressions of SNIP and GraSP up. The paper's own figure was not at hand:
network, data set and number of levels are our choice.
Needs CIFAR-10, prepared once for tensorflow-datasets; without it the run says how.
"""

from synflow_jax.config import Config, Grid, PruneConfig

_SETTINGS = {
    "iterative": (("snip", "grasp", "synflow"), 100, 1),
    "single": (("snip", "grasp"), 1, 0),
    "imp": (("imp",), 10, 1),
}


def get_config(name: str = "iterative") -> Config:
    """VGG-16 (BN), CIFAR-10: "iterative", "single" or "imp"."""
    if name not in _SETTINGS:
        raise ValueError(f"fig7.py:{name} is unknown: name one of {', '.join(_SETTINGS)}.")
    pruners, num_iterations, first = _SETTINGS[name]
    return Config(
        model="cifar_vgg16_bn",
        dataset="cifar10",
        prune=PruneConfig(num_iterations=num_iterations),
        grid=Grid(
            seed=(0, 1, 2),
            pruner=pruners,
            compression=tuple(10 ** (power / 2) for power in range(first, 9)),
        ),
    )
