"""What the files under configs/ fill in, checked before any work.

Without `from __future__ import annotations`: ml_collections reads the types of the fields, and not as strings.
"""

import copy
import dataclasses
import functools
import hashlib
import inspect
import itertools
import json
import math
import numbers
import os
import re
import typing
from collections.abc import Callable, Mapping
from typing import Any

from synflow_jax import certified, data, models, schedules

IMP = "imp"
CERTIFIED = "certified"  # prunes by `certified.prune`
SCHEDULES = {"exponential": schedules.exponential, "linear": schedules.linear}
LAYERWISE = ("uniform", "erk")  # random within layers whose densities the rule decides
PRUNERS = ("synflow", "snip", "grasp", "magnitude", "random", *LAYERWISE, IMP)
DATA_DRIVEN = ("snip", "grasp")
NON_NEGATIVE = ("synflow", "snip", "magnitude", IMP)  # rules whose scores are never below 0
EVALUATING = (
    "synflow",
    "snip",
    "grasp",
)  # rules that evaluate the network, in one mode or the other
ABLATIONS = ("none", "shuffle", "reinitialize", "invert")
_IMP_LEVEL = 0.8  # what a level of IMP keeps where their number is not given: Frankle & Carbin 2019
_DIGEST = "sha256:"  # what the digest of a file begins with


@dataclasses.dataclass
class DataConfig:
    """Where the data lies. No part of what a run is: its name and its rows are the same elsewhere."""

    dir: str | None = None  # None: each reader's own place


@dataclasses.dataclass
class PruneConfig:
    """How to prune. See `synflow_jax.pruning.prune`."""

    # "uniform" and "erk" are random within layers: with the same density in each, or with those of Erdos-Renyi-Kernel.
    # "imp" trains, prunes the smallest weights and rewinds, num_iterations times: train.py alone runs it.
    pruner: str = "synflow"
    compression: float = 100.0  # total / kept; 1 prunes nothing
    # None: as in the paper, 100 for synflow and 1 for the others; for imp as many as prune a fifth of the weights each.
    num_iterations: int | None = None
    schedule: str = (
        "exponential"  # or "linear", or "certified": no iteration can disconnect the network
    )
    cut_fraction: float = (
        0.5  # certified: of the smallest cut's total score, what one iteration may prune
    )
    scope: str = "global"
    # "float32" as in the published runs; "float64" takes twice as long and is free of rounding; None: see `prune`.
    score_dtype: str | None = "float32"
    scaled: bool = True  # synflow carries a power of two beside every value: float32 at any depth
    # A pruned weight stays pruned. False ranks all weights afresh in each iteration by what their return would change:
    # with snip and several iterations that is FORCE, and nested=True Iterative SNIP (de Jorge et al. 2021).
    nested: bool = True
    kernels: bool = True  # what may be pruned
    biases: bool = False
    norms: bool = False
    exclude: str = ""  # a pattern of names that may not be pruned
    dense_classifier: bool = False  # the last layer may not be pruned
    examples_per_class: int = 10  # for snip and grasp
    batch_size: int = 256
    temperature: float = 200.0  # grasp divides the logits by it
    # What snip and grasp score in place of `dataset`, which then says only what the network looks like: "digits" are
    # enlarged to any input, and their labels are the first ten classes.
    dataset: str | None = None
    # "shuffle": the mask shuffled within each layer, which is random at the rule's densities; "reinitialize": the mask
    # of one initialization on weights that are drawn anew; "invert": the largest scores are pruned first.
    ablation: str = "none"
    mode: str = "eval"  # or "train": the network is scored with the statistics of the batch, for synflow of its input
    rewind_step: int = (
        0  # imp rewinds to the state after so many steps of its first level; 0: to initialization
    )
    # These three decide on no mask, and are no part of what a run is.
    over_devices: bool = (
        False  # one network on all devices of this process, see `sharded.prune`: the same mask
    )
    beyond_maximum: bool = (
        False  # prunes above the maximal compression too, where no network can be left
    )
    record_units: bool = (
        False  # writes every hidden unit's incoming and outgoing score before anything is pruned
    )


@dataclasses.dataclass
class TrainConfig:
    """How to train. The defaults are those of the published VGGs on CIFAR."""

    num_epochs: int = 160
    batch_size: int = 128  # over all devices
    learning_rate: float = 0.1
    drops: tuple[int, ...] = (
        60,
        120,
    )  # epochs after which the learning rate is multiplied by drop_factor
    drop_factor: float = 0.1
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 1e-4
    label_smoothing: float = 0.0
    clip_norm: float | None = None  # of the whole gradient
    compute_dtype: str = (
        "float32"  # or "bfloat16"; parameters and their state are float32 either way
    )
    augment: bool = True
    # Any optax chain in place of the above: a function (steps per epoch) -> optax.GradientTransformation, set in the
    # config file.
    make_optimizer: Any = None
    # True trains the smaller dense network that the mask leaves, False the full, masked one; None: the smaller one
    # where it pays, see `forms.choose`. Both are the same function, and the choice is no part of what a run is.
    compact: bool | None = None
    keep_checkpoints: int = 2
    checkpoint_every: int = 1  # epochs


@dataclasses.dataclass
class SweepConfig:
    """How train.py lays the runs of a grid on devices. No part of what a run is."""

    runs_per_device: int = (
        1  # masked runs of one network that a device trains at a time; halved where memory is short
    )
    batching: str = (
        "map"  # of the runs of a device: one after another in one program, or "vmap", side by side
    )


@dataclasses.dataclass
class Grid:
    """Many runs in one config: every combination of these values. () stands for the config's own value.

    On the command line: --config.grid.seed=0,1,2 or --config.grid.pruner="('snip','grasp')". The order of the fields is
    that of the runs, the last one changing fastest: runs that share a network, then a score, follow one another.
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
    """One run, or with a grid many."""

    model: str = "cifar_vgg16_bn"
    dataset: str = "cifar100"
    width_multiplier: float = 1.0
    seed: int = 0
    # A file of weights in place of random ones, to prune a network that is trained: PyTorch's as .safetensors or .npz,
    # or one of export.py. The run's name has its content, not its path.
    init: str | None = None
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    prune: PruneConfig = dataclasses.field(default_factory=PruneConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    sweep: SweepConfig = dataclasses.field(default_factory=SweepConfig)
    grid: Grid = dataclasses.field(default_factory=Grid)
    # More grids (a tuple of `Grid`, set in the config file), where one product would be too large: the runs are those
    # of each of them in turn, every one with the values of `grid` where it has none of its own.
    grids: Any = ()


def grid_values(config: Config) -> dict[str, tuple[Any, ...]]:
    """The values of the grid's fields that have some, by the key of the config that each replaces; of all `grids`.

    >>> grid_values(Config(grid=Grid(pruner=("snip", "grasp"), seed=(0, 1))))
    {'seed': (0, 1), 'prune.pruner': ('snip', 'grasp')}

    Raises:
      ValueError: a value is of another type than its field.
    """
    products = [_product(config, grid) for grid in config.grids or (config.grid,)]
    keys = [key for key in grid_keys(config) if any(key in values for values in products)]
    return {
        key: tuple(dict.fromkeys(v for values in products for v in values.get(key, ())))
        for key in keys
    }


def grid_keys(config: Config) -> dict[str, Any]:
    """The keys of the config that a grid sets, in the order of `Grid`, and the fields that set them."""
    fields = dataclasses.fields(Grid)
    return {
        field.name if hasattr(config, field.name) else f"prune.{field.name}": field
        for field in fields
    }


def _product(config: Config, grid: Grid) -> dict[str, tuple[Any, ...]]:
    """As `grid_values`, of one grid, with the values of the config's own where it has none."""
    found = {}
    for key, field in grid_keys(config).items():
        values = getattr(grid, field.name) or getattr(config.grid, field.name)
        if values:
            found[key] = tuple(
                _typed(field.name, value, typing.get_args(field.type)[0]) for value in values
            )
    return found


def _typed(name: str, value: Any, kind: type) -> Any:
    """The value as the config's own field would hold it: 10 and 10.0 must be one run."""
    wanted = {int: numbers.Integral, float: numbers.Real, str: str, bool: bool}[kind]
    joined = isinstance(value, str) and "," in value  # a list of words without quotes is one word
    if not isinstance(value, wanted) or isinstance(value, bool) != (kind is bool) or joined:
        example = {int: "0,1", float: "10,100", str: "\"('snip','grasp')\"", bool: "True,False"}[
            kind
        ]
        problem = "several values in one" if joined else f"no {kind.__name__}"
        raise ValueError(
            f"grid.{name} holds {value!r}, which is {problem}. Values are given as {example}."
        )
    return kind(value)


def expand(config: Config) -> list[Config]:
    """The runs of a config, each with an empty grid: every combination, in the order of `Grid`, without duplicates.

    >>> runs = expand(Config(grid=Grid(seed=(0, 1), compression=(10.0, 100.0))))
    >>> [(run.seed, run.prune.compression) for run in runs]
    [(0, 10.0), (0, 100.0), (1, 10.0), (1, 100.0)]
    >>> runs = expand(Config(grid=Grid(seed=(0,)), grids=(Grid(pruner=("snip", "grasp")), Grid(schedule=("linear",)))))
    >>> [(run.seed, run.prune.pruner, run.prune.schedule) for run in runs]
    [(0, 'snip', 'exponential'), (0, 'grasp', 'exponential'), (0, 'synflow', 'linear')]

    Raises:
      ValueError: a value is of another type than its field.
    """
    runs, seen = [], []
    for grid in config.grids or (config.grid,):
        product = _product(config, grid)
        for values in itertools.product(*product.values()):
            run = copy.deepcopy(config)
            run.grid, run.grids = Grid(), ()
            for key, value in zip(product, values, strict=True):
                parent, _, name = key.rpartition(".")
                setattr(_get(run, parent), name, value)
            if _resolved(run) not in seen:
                runs.append(run)
                seen.append(_resolved(run))
    return runs


def _resolved(config: Config) -> Config:
    """The config with what its defaults stand for, so that one run under two names is one."""
    prune = config.prune
    decided: dict[str, Any] = {
        "num_iterations": num_iterations(prune),
        "scope": scope(prune),
        "mode": mode(prune),
    }
    return dataclasses.replace(config, prune=dataclasses.replace(prune, **decided))


def _get(config: Config, key: str) -> Any:
    return functools.reduce(getattr, key.split(".") if key else (), config)


def num_iterations(config: PruneConfig) -> int:
    """The number of iterations, with the paper's in place of None; compression 1 has nothing to iterate.

    Of the certified schedule, the most that it may take.
    """
    if config.num_iterations is None and config.schedule == CERTIFIED:
        return certified.MAX_ITERATIONS
    if config.num_iterations is None and config.pruner == IMP and 1 < config.compression < math.inf:
        return math.ceil(math.log(config.compression) / -math.log(_IMP_LEVEL))
    if config.num_iterations is None:
        return 100 if config.pruner == "synflow" and config.compression != 1 else 1
    return config.num_iterations


def scope(config: PruneConfig) -> str:
    """The scope, which the layerwise rules decide themselves."""
    return "local" if config.pruner in LAYERWISE else config.scope


def mode(config: PruneConfig) -> str:
    """The mode that the network is scored in; of a rule that does not evaluate it, the default."""
    return config.mode if config.pruner in EVALUATING else PruneConfig.mode


def check(config: Config, *, reads_data: bool = True) -> None:
    """Raises ValueError for a value out of its range, in any of the runs, before any work; for missing data too."""
    keys = grid_values(config)
    for run in expand(config):
        try:
            _check_run(run, reads_data)
        except ValueError as error:
            if not keys:
                raise
            values = ", ".join(f"{key}={_get(run, key)!r}" for key in keys)
            raise ValueError(f"{error} This is the grid's run of {values}.") from error


def _check_run(config: Config, reads_data: bool) -> None:
    prune = config.prune
    if prune.pruner not in PRUNERS:
        raise ValueError(
            f"prune.pruner={prune.pruner!r} is unknown. Choose one of {', '.join(PRUNERS)}."
        )
    if prune.scope not in ("global", "local"):
        raise ValueError(f"prune.scope={prune.scope!r} is unknown. Choose 'global' or 'local'.")
    if prune.score_dtype not in (None, "float32", "float64"):
        raise ValueError(
            f"prune.score_dtype={prune.score_dtype!r} is unknown. Choose 'float32' or 'float64'."
        )
    models.create(
        config.model,
        data.spec(config.dataset).num_classes,
        width_multiplier=config.width_multiplier,
    )
    _check_ablation(prune)
    is_certified = prune.schedule == CERTIFIED
    if prune.over_devices and (is_certified or prune.pruner in ("erk", IMP)):
        raise ValueError(
            f"prune.over_devices=True does not go with prune.{'schedule' if is_certified else 'pruner'}="
            f"{prune.schedule if is_certified else prune.pruner!r}, which one device prunes: leave it out."
        )
    if is_certified:
        _check_certified(prune)
    if not is_certified and prune.schedule not in SCHEDULES:
        raise ValueError(
            f"prune.schedule={prune.schedule!r} is unknown. Choose one of "
            f"{sorted([*SCHEDULES, CERTIFIED])}."
        )
    try:
        schedules.check_request(prune.compression, num_iterations(prune))
    except ValueError as error:
        raise ValueError(f"prune.{error}") from error
    for name in ("examples_per_class", "batch_size"):
        if getattr(prune, name) < 1:
            raise ValueError(f"prune.{name}={getattr(prune, name)} must be at least 1.")
    init_digest(config)
    if config.seed < 0:
        raise ValueError(f"seed={config.seed} must not be negative.")
    if not 0 < prune.temperature < math.inf:
        raise ValueError(f"prune.temperature={prune.temperature} must be positive and finite.")
    scored, drawn = data.spec(prune_dataset(config)), data.spec(config.dataset)
    if prune.pruner in DATA_DRIVEN:
        if scored.num_classes > drawn.num_classes or scored.image_shape not in (
            None,
            drawn.image_shape,
        ):
            raise ValueError(
                f"prune.dataset={prune.dataset!r} does not fit a network for dataset={config.dataset!r}: it must "
                "have no more classes, and images of the same shape or such as are enlarged to any. Choose 'digits'."
            )
        if reads_data:
            data.check_readable(prune_dataset(config), config.data.dir)


def _check_certified(prune: PruneConfig) -> None:
    for name, value, wanted in (
        ("pruner", prune.pruner, "synflow"), ("scope", prune.scope, "global"), ("nested", prune.nested, True),
        ("biases", prune.biases, False), ("norms", prune.norms, False), ("mode", prune.mode, "eval"),
    ):  # fmt: skip
        if value != wanted:
            raise ValueError(
                f"prune.{name}={value!r} does not go with schedule='certified', which bounds what SynFlow prunes "
                f"by what a cut of kernels holds: it takes {wanted!r}. Set that, or choose 'exponential' or 'linear'."
            )
    if not 0 < prune.cut_fraction < 1:
        raise ValueError(
            f"prune.cut_fraction={prune.cut_fraction} must be above 0 and below 1: a fraction of a cut."
        )


def _check_ablation(prune: PruneConfig) -> None:
    if prune.ablation not in ABLATIONS:
        raise ValueError(
            f"prune.ablation={prune.ablation!r} is unknown. Choose one of {', '.join(ABLATIONS)}."
        )
    if prune.mode not in ("eval", "train"):
        raise ValueError(f"prune.mode={prune.mode!r} is unknown. Choose 'eval' or 'train'.")
    if prune.ablation in ("shuffle", "invert") and prune.schedule == CERTIFIED:
        raise ValueError(
            f"prune.ablation={prune.ablation!r} does not go with schedule='certified', whose certificate would be of "
            "another mask. Choose 'exponential' or 'linear'."
        )
    if prune.pruner in LAYERWISE and num_iterations(prune) != 1:
        raise ValueError(
            f"prune.num_iterations={prune.num_iterations} does not go with {prune.pruner!r}, which draws its mask at "
            "once: leave it out, or set 1."
        )
    if prune.rewind_step < 0 or (prune.rewind_step and prune.pruner != IMP):
        raise ValueError(
            f"prune.rewind_step={prune.rewind_step} must not be negative, and is 0 for every rule but 'imp': "
            "set that, or prune.pruner='imp'."
        )
    if prune.pruner == IMP and not prune.nested:
        raise ValueError(
            "prune.nested=False does not go with 'imp', which trains no pruned weight: leave it out."
        )
    if prune.rewind_step and prune.ablation == "reinitialize":
        raise ValueError(
            f"prune.rewind_step={prune.rewind_step} does not go with ablation='reinitialize': weights drawn anew have "
            "no earlier state to go back to. Set one of them to its default."
        )


def prune_dataset(config: Config) -> str:
    """The data set that snip and grasp score."""
    return config.dataset if config.prune.dataset is None else config.prune.dataset


def init_digest(config: Config) -> str | None:
    """What a run's name says of the file that its network begins from: "sha256:..." of its bytes.

    Raises:
      ValueError: there is no such file.
    """
    path = config.init
    if path is None or (path.startswith(_DIGEST) and not os.path.exists(path)):
        return path  # from the config of a row, which does not know the path
    try:
        status = os.stat(path)
        return _file_digest(path, status.st_mtime_ns, status.st_size)
    except OSError as error:
        raise ValueError(
            f"init={path!r} cannot be read: {error.strerror}. Name a file of weights, or leave it out."
        ) from error


@functools.lru_cache(8)
def _file_digest(path: str, mtime_ns: int, size: int) -> str:
    del mtime_ns, size  # of another content
    with open(path, "rb") as file:
        return _DIGEST + hashlib.file_digest(file, "sha256").hexdigest()


def check_one(config: Config) -> None:
    """Raises ValueError for a config with a grid."""
    grid = grid_values(config)
    if grid:
        raise ValueError(
            f"config.grid={grid} names {len(expand(config))} runs, and this takes one: set "
            f"{', '.join(f'--config.{key}' for key in grid)}, and take a config without a grid."
        )


def check_prune(config: Config) -> None:
    """Raises ValueError for a rule that prunes by training, which prune.py does not do."""
    if any(run.prune.pruner == IMP for run in expand(config)):
        raise ValueError(
            "prune.pruner='imp' prunes by training: python train.py runs it, with the same flags. Choose another rule "
            "for prune.py."
        )


def check_train(config: Config) -> None:
    """Raises ValueError for a value of the training out of its range, or for data that is not there."""
    train = config.train
    if train.compact and config.prune.rewind_step:
        raise ValueError(
            "train.compact=True does not go with prune.rewind_step: a rewound network is trained masked."
        )
    for name in ("num_epochs", "batch_size", "keep_checkpoints", "checkpoint_every"):
        if getattr(train, name) < 1:
            raise ValueError(f"train.{name}={getattr(train, name)} must be at least 1.")
    for name, low, high in (
        ("learning_rate", 0, math.inf), ("drop_factor", 0, math.inf), ("weight_decay", 0, math.inf),
        ("momentum", 0, 1), ("label_smoothing", 0, 1),
    ):  # fmt: skip
        if not low <= getattr(train, name) < high:
            raise ValueError(
                f"train.{name}={getattr(train, name)} must be at least {low} and below {high}."
            )
    if train.clip_norm is not None and not 0 < train.clip_norm < math.inf:
        raise ValueError(f"train.clip_norm={train.clip_norm} must be positive and finite, or None.")
    if list(train.drops) != sorted(set(train.drops)) or any(epoch < 1 for epoch in train.drops):
        raise ValueError(f"train.drops={train.drops} must be epochs from 1 on, in rising order.")
    if train.compute_dtype not in ("float32", "bfloat16"):
        raise ValueError(
            f"train.compute_dtype={train.compute_dtype!r} is unknown. Choose 'float32' or 'bfloat16'."
        )
    if train.make_optimizer is not None and not callable(train.make_optimizer):
        raise ValueError(
            f"train.make_optimizer={train.make_optimizer!r} must be a function (steps per epoch) -> optax chain, set "
            "in the config file."
        )
    if config.sweep.runs_per_device < 1:
        raise ValueError(
            f"sweep.runs_per_device={config.sweep.runs_per_device} must be at least 1."
        )
    if config.sweep.batching not in ("map", "vmap"):
        raise ValueError(
            f"sweep.batching={config.sweep.batching!r} is unknown. Choose 'map' or 'vmap'."
        )
    data.check_readable(config.dataset, config.data.dir)


def prune_dict(config: Config) -> dict[str, Any]:
    """What decides on the mask, as plain values, with the number of iterations filled in; for imp also the recipe."""
    values = dataclasses.asdict(config)
    values["prune"]["num_iterations"] = num_iterations(config.prune)
    for name in ("over_devices", "beyond_maximum", "record_units"):
        del values["prune"][name]
    if prune_dataset(config) == config.dataset or config.prune.pruner not in DATA_DRIVEN:
        del values["prune"]["dataset"]  # it decides on nothing
    if config.prune.schedule != CERTIFIED:
        del values["prune"]["cut_fraction"]
    values["prune"].update(scope=scope(config.prune), mode=mode(config.prune))
    for name in (
        "ablation",
        "mode",
        "rewind_step",
    ):  # of later versions: at their defaults no earlier name changes
        if values["prune"][name] == getattr(PruneConfig, name):
            del values["prune"][name]
    for name in ("train", "data", "sweep", "grid", "grids"):
        del values[name]
    if config.prune.pruner == IMP:
        values["train"] = _recipe(config.train)
    values["init"] = init_digest(config)
    if values["init"] is None:
        del values["init"]
    return values


def from_dict(values: Mapping[str, Any]) -> Config:
    """The config of `prune_dict`'s values, with defaults for what is not in them.

    >>> from_dict(prune_dict(Config(seed=3))) == Config(seed=3, prune=PruneConfig(num_iterations=100))
    True

    Raises:
      ValueError: a key is no key of the config.
    """
    tuples: Callable[[Any], Any] = lambda part: {
        k: tuple(v) if isinstance(v, list) else v for k, v in part.items()
    }
    try:
        parts = {
            "prune": PruneConfig(**values["prune"]),
            "train": TrainConfig(**tuples(values.get("train", {}))),
        }
        return Config(**{**values, **parts})
    except (TypeError, KeyError) as error:
        raise ValueError(f"this is no config of prune.py: {error}.") from error


def train_dict(config: Config) -> dict[str, Any]:
    """What decides on the trained network, as plain values; a function by its name and its source."""
    return {**prune_dict(config), "train": _recipe(config.train)}


def _recipe(train: TrainConfig) -> dict[str, Any]:
    values = dataclasses.asdict(train)
    for kept in ("compact", "keep_checkpoints", "checkpoint_every"):
        del values[kept]
    if callable(train.make_optimizer):  # else it is None, or what a row says of it
        values["make_optimizer"] = (
            f"{train.make_optimizer.__name__} {_source_hash(train.make_optimizer)}"
        )
    return values


def _source_hash(function: Any) -> str:
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):  # defined where no file holds it
        source = repr(function)
    return hashlib.sha256(source.encode()).hexdigest()[:8]


def run_id(config: Config) -> str:
    """A name that is the same for the same pruning: the parts that a reader looks for, and a hash of everything."""
    return _name(config, prune_dict(config))


def train_id(config: Config) -> str:
    """The name of a training run."""
    return "train-" + _name(config, train_dict(config))


def _name(config: Config, values: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]
    prune = config.prune
    parts = (
        config.model,
        config.dataset,
        prune.pruner,
        f"c{prune.compression:g}",
        f"s{config.seed}",
        digest,
    )
    return re.sub(r"[^A-Za-z0-9_.+-]", "_", "-".join(parts))
