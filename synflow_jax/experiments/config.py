"""Defines the settings of a run: the dataclasses that the files under configs/ fill in.

Every key is also a flag, e.g. `--config.prune.compression=1000`. Each field declares which values
it may have (see `expected.py`), and whether it is part of the run's identity, from which its name
is made (see `identity.py`). `settings.checked` checks each value by itself, `checks.py` what they
need of each other. `run.resolve` turns a config into its runs.
"""

# `from __future__ import annotations` must not be used here: ml_collections reads the types of the
# fields, and would find strings.
import dataclasses
from typing import Any

from synflow_jax import arguments
from synflow_jax.experiments import expected, rules
from synflow_jax.experiments.identity import (
    file_digest,
    never,
    part,
    setting,
    source_digest,
    when_changed,
)

MOST_SEED = 2**32 - 1  # a larger seed would draw the network of a smaller one
MOST_EPOCHS = 10**6  # more would take weeks, and a run records each of them


def when_certified(value: Any, default: Any, config: "Config") -> bool:
    """Returns whether the schedule is "certified", the only one that uses the setting."""
    del value, default
    return rules.is_certified(config.prune.schedule)


def when_scored(value: Any, default: Any, config: "Config") -> bool:
    """Returns whether the rule scores on examples of another data set than `config.dataset`."""
    del default
    reads_data = rules.PRUNERS[config.prune.pruner].reads_data
    return reads_data and value not in (None, config.dataset)


def when_pruned_by_training(value: Any, default: Any, config: "Config") -> bool:
    """Returns whether the rule prunes by training, so that the mask depends on the recipe."""
    del value, default
    return rules.PRUNERS[config.prune.pruner].trains


@dataclasses.dataclass
class DataConfig:
    """Where to find the data. Moving the data changes neither the name of a run nor its row."""

    # The folder of the data sets. None: the usual place of each reader.
    dir: str | None = setting(None, expected.optional(expected.path("a folder")))


@dataclasses.dataclass
class PruneConfig:
    """How to prune. See `synflow_jax.prune`."""

    # The rule: "synflow", "snip", "grasp", "magnitude" or "random". "uniform" and "erk" are random
    # within layers: with the same density in every layer, or with those of Erdos-Renyi-Kernel.
    # "imp" trains, prunes the smallest weights and rewinds, num_iterations times (train.py only).
    pruner: str = setting("synflow", expected.one_of(*rules.PRUNERS))

    # Number of prunable weights / number kept. 1 prunes nothing.
    compression: float = setting(
        100.0,
        expected.number(
            1, why="it is total / kept, so 1 keeps every weight and 100 keeps one in a hundred"
        ),
    )

    # None: as in the paper, 100 for synflow and 1 for the other rules. For imp: as many levels as
    # it takes to prune a fifth of the weights in each.
    num_iterations: int | None = setting(
        None, expected.optional(expected.whole(1, arguments.MAX_ITERATIONS))
    )

    # "exponential", "linear" or "certified". A certified run prunes, in each iteration, only as
    # much as provably cannot disconnect the network.
    schedule: str = setting("exponential", expected.one_of(*rules.SCHEDULES))

    # For schedule="certified": the fraction of the smallest cut's score that an iteration may
    # prune. Above 0 and below 1.
    cut_fraction: float = setting(
        0.5,
        expected.number(
            0, 1, above=True, why="it is the fraction of a cut that one iteration may prune"
        ),
        identity=when_certified,
    )

    # "global" ranks the weights of all layers together, "local" those of each layer.
    scope: str = setting("global", expected.one_of(*rules.SCOPES))

    # "float32", as in the published runs, or "float64", which takes twice as long.
    # None: the dtype of the parameters.
    score_dtype: str | None = setting("float32", expected.one_of(None, "float32", "float64"))

    # For synflow: carries a power of two with every value, so that float32 is enough at any depth.
    scaled: bool = setting(True, expected.flag())

    # True: a pruned weight stays pruned. False: every iteration ranks all weights again, by what
    # each would change if it came back. With snip and several iterations, False is FORCE and True
    # is Iterative SNIP (de Jorge et al., 2021).
    nested: bool = setting(True, expected.flag())

    # Which parameters may be pruned.
    kernels: bool = setting(True, expected.flag())
    biases: bool = setting(False, expected.flag())
    norms: bool = setting(False, expected.flag())

    # A regular expression. Parameters whose name matches it are not pruned.
    exclude: str = setting("", expected.pattern())

    # True: the last layer is not pruned.
    dense_classifier: bool = setting(False, expected.flag())

    # For snip and grasp: the examples that they score on.
    examples_per_class: int = setting(10, expected.whole(1))
    batch_size: int = setting(256, expected.whole(1))

    # For grasp: the logits are divided by it.
    temperature: float = setting(200.0, expected.number(0, above=True))

    # For snip and grasp: the data set that they score on, if it is not `dataset`. Then `dataset`
    # decides only on the shape of the network. "digits" is resized to any input, and its labels
    # are the first ten classes.
    dataset: str | None = setting(
        None, expected.optional(expected.text("the name of a data set")), identity=when_scored
    )

    # "shuffle" shuffles the mask within each layer: a random mask with the densities of the rule.
    # "reinitialize" puts the mask of one initialization on weights that are drawn again.
    # "invert" prunes the largest scores first.
    ablation: str = setting("none", expected.one_of(*rules.ABLATIONS), identity=when_changed)

    # The mode that the network is scored in. "train" uses the statistics of the batch (for synflow,
    # of its input of ones).
    mode: str = setting("eval", expected.one_of(*rules.MODES), identity=when_changed)

    # For imp: rewinds to the state after this many steps of training. 0: to initialization.
    rewind_step: int = setting(0, expected.steps(), identity=when_changed)

    # True: prunes one network on all devices of this process. The mask is the same.
    over_devices: bool = setting(False, expected.flag(), identity=never)

    # True: accepts a compression above the maximum, where no network can be left.
    beyond_maximum: bool = setting(False, expected.flag(), identity=never)

    # True: writes the incoming and outgoing score of every hidden unit before pruning.
    record_units: bool = setting(False, expected.flag(), identity=never)


@dataclasses.dataclass
class TrainConfig:
    """How to train. The defaults are those of the published VGGs on CIFAR."""

    num_epochs: int = setting(160, expected.whole(1, MOST_EPOCHS))

    # Examples per step, over all devices.
    batch_size: int = setting(128, expected.whole(1))

    # The learning rate is multiplied by drop_factor after each of the epochs in drops.
    learning_rate: float = setting(0.1, expected.number(0))
    drops: tuple[int, ...] = setting((60, 120), expected.epochs())
    drop_factor: float = setting(0.1, expected.number(0))

    momentum: float = setting(0.9, expected.number(0, 1))
    nesterov: bool = setting(True, expected.flag())
    weight_decay: float = setting(1e-4, expected.number(0))
    label_smoothing: float = setting(0.0, expected.number(0, 1))

    # The largest norm of the whole gradient. None: the gradient is not clipped.
    clip_norm: float | None = setting(None, expected.optional(expected.number(0, above=True)))

    # "float32" or "bfloat16". Parameters and optimizer state are float32 in both.
    compute_dtype: str = setting("float32", expected.one_of("float32", "bfloat16"))

    augment: bool = setting(True, expected.flag())

    # Replaces all of the above optimizer by any optax chain: a function
    # (steps per epoch) -> optax.GradientTransformation, set in the config file.
    make_optimizer: Any = setting(
        None,
        expected.optional(expected.function("(steps per epoch) -> optax chain")),
        named_by=source_digest,
    )

    # True trains the smaller dense network that the mask leaves, False the full, masked network.
    # None: the smaller one where it is faster (see `training.forms.choose`). Both compute the same
    # function, so this is not part of a run's identity.
    compact: bool | None = setting(None, expected.optional(expected.flag()), identity=never)

    # How many checkpoints to keep, and how many epochs between two of them.
    keep_checkpoints: int = setting(2, expected.whole(1), identity=never)
    checkpoint_every: int = setting(1, expected.whole(1), identity=never)


@dataclasses.dataclass
class SweepConfig:
    """How train.py distributes the runs of a grid over devices. It changes no result."""

    # How many runs of one network a device trains at a time. Halved while memory is short.
    runs_per_device: int = setting(1, expected.whole(1))

    # "map" runs them one after another inside one program, "vmap" side by side.
    batching: str = setting("map", expected.one_of("map", "vmap"))


@dataclasses.dataclass
class Grid:
    """Many runs in one config: every combination of these values.

    A field with no values, (), stands for the value of the config. On the command line:
    --config.grid.seed=0,1,2 or --config.grid.pruner="('snip','grasp')".

    The runs come in the order of the fields; the last field changes fastest. So runs that share a
    network, and then a score, follow one another.
    """

    model: tuple[str, ...] = ()
    dataset: tuple[str, ...] = ()
    width_multiplier: tuple[float, ...] = ()
    seed: tuple[int, ...] = ()
    pruner: tuple[str, ...] = ()
    mode: tuple[str, ...] = ()
    ablation: tuple[str, ...] = ()
    num_iterations: tuple[int, ...] = ()
    nested: tuple[bool, ...] = ()
    scope: tuple[str, ...] = ()
    schedule: tuple[str, ...] = ()
    compression: tuple[float, ...] = ()


@dataclasses.dataclass
class Config:
    """One run, or many with a grid."""

    model: str = setting("cifar_vgg16_bn", expected.text("the name of a network"))
    dataset: str = setting("cifar100", expected.text("the name of a data set"))
    width_multiplier: float = setting(1.0, expected.number(0, 1024, above=True))
    seed: int = setting(0, expected.whole(0, MOST_SEED))

    # A file of weights to start from, in place of a random initialization: PyTorch's as
    # .safetensors or .npz, or one of export.py. The run is named by the content of the file.
    init: str | None = setting(
        None,
        expected.optional(expected.path("a file of weights")),
        identity=when_changed,
        named_by=file_digest,
    )

    data: DataConfig = part(DataConfig, identity=never)
    prune: PruneConfig = part(PruneConfig)
    train: TrainConfig = part(TrainConfig, identity=when_pruned_by_training)
    sweep: SweepConfig = part(SweepConfig, identity=never)

    # Many runs: every combination of the grid's values.
    grid: Grid = part(Grid, identity=never)

    # Several grids, where one product would be too large: a tuple of `Grid`, set in the config
    # file. The runs of each grid follow in turn. A grid without values for a field takes those of
    # `grid`.
    grids: Any = setting((), identity=never)
