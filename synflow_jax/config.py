"""Floor 6. What the files under configs/ fill in, checked before any work.

Without `from __future__ import annotations`: ml_collections reads the types of the fields, and not as strings.
"""

import dataclasses
import hashlib
import inspect
import json
import math
import re
from typing import Any

from synflow_jax import data, models, schedules

PRUNERS = ("synflow", "snip", "grasp", "magnitude", "random")
DATA_DRIVEN = ("snip", "grasp")


@dataclasses.dataclass
class DataConfig:
    """Where the data lies. No part of what a run is: its name and its rows are the same elsewhere."""

    dir: str | None = None  # None: each reader's own place


@dataclasses.dataclass
class PruneConfig:
    """How to prune. See `synflow_jax.pruning.prune`."""

    pruner: str = "synflow"
    compression: float = 100.0  # total / kept; 1 prunes nothing
    num_iterations: int | None = None  # None: as in the paper, 100 for synflow and 1 for the others
    schedule: str = "exponential"  # or "linear", or "certified": no iteration can disconnect the network
    cut_fraction: float = 0.5  # certified: of the smallest cut's total score, what one iteration may prune
    scope: str = "global"
    # "float32" as in the published runs; "float64" takes twice as long and is free of rounding; None: see `prune`.
    score_dtype: str | None = "float32"
    scaled: bool = True  # synflow carries a power of two beside every value: float32 at any depth
    nested: bool = True  # a pruned weight stays pruned
    kernels: bool = True  # what may be pruned
    biases: bool = False
    norms: bool = False
    exclude: str = ""  # a pattern of names that may not be pruned
    dense_classifier: bool = False  # the last layer may not be pruned
    examples_per_class: int = 10  # for snip and grasp
    batch_size: int = 256
    temperature: float = 200.0  # grasp divides the logits by it


@dataclasses.dataclass
class TrainConfig:
    """How to train. The defaults are those of the published VGGs on CIFAR."""

    num_epochs: int = 160
    batch_size: int = 128  # over all devices
    learning_rate: float = 0.1
    drops: tuple[int, ...] = (60, 120)  # epochs after which the learning rate is multiplied by drop_factor
    drop_factor: float = 0.1
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 1e-4
    label_smoothing: float = 0.0
    clip_norm: float | None = None  # of the whole gradient
    compute_dtype: str = "float32"  # or "bfloat16"; parameters and their state are float32 either way
    augment: bool = True
    # Any optax chain in place of the above: a function (steps per epoch) -> optax.GradientTransformation, set in the
    # config file.
    make_optimizer: Any = None
    keep_checkpoints: int = 2
    checkpoint_every: int = 1  # epochs


@dataclasses.dataclass
class Config:
    """One run."""

    model: str = "cifar_vgg16_bn"
    dataset: str = "cifar100"
    width_multiplier: float = 1.0
    seed: int = 0
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    prune: PruneConfig = dataclasses.field(default_factory=PruneConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)


def num_iterations(config: PruneConfig) -> int:
    """The number of iterations, with the paper's in place of None; compression 1 has nothing to iterate."""
    if config.num_iterations is None:
        return 100 if config.pruner == "synflow" and config.compression != 1 else 1
    return config.num_iterations


def check(config: Config) -> None:
    """Raises ValueError for a value out of its range, before any work."""
    prune = config.prune
    if prune.pruner not in PRUNERS:
        raise ValueError(f"prune.pruner={prune.pruner!r} is unknown. Choose one of {', '.join(PRUNERS)}.")
    if prune.scope not in ("global", "local"):
        raise ValueError(f"prune.scope={prune.scope!r} is unknown. Choose 'global' or 'local'.")
    if prune.score_dtype not in (None, "float32", "float64"):
        raise ValueError(f"prune.score_dtype={prune.score_dtype!r} is unknown. Choose 'float32' or 'float64'.")
    models.create(config.model, data.spec(config.dataset).num_classes, width_multiplier=config.width_multiplier)
    schedules.prune_counts([1], prune.compression, num_iterations(prune), prune.schedule)
    if config.seed < 0:
        raise ValueError(f"seed={config.seed} must not be negative.")
    if not 0 < prune.temperature < math.inf:
        raise ValueError(f"prune.temperature={prune.temperature} must be positive and finite.")
    if prune.pruner in DATA_DRIVEN:
        data.check_readable(config.dataset, config.data.dir)


def check_train(config: Config) -> None:
    """Raises ValueError for a value of the training out of its range, or for data that is not there."""
    train = config.train
    for name in ("num_epochs", "batch_size", "keep_checkpoints", "checkpoint_every"):
        if getattr(train, name) < 1:
            raise ValueError(f"train.{name}={getattr(train, name)} must be at least 1.")
    for name, low, high in (
        ("learning_rate", 0, math.inf), ("drop_factor", 0, math.inf), ("weight_decay", 0, math.inf),
        ("momentum", 0, 1), ("label_smoothing", 0, 1),
    ):  # fmt: skip
        if not low <= getattr(train, name) < high:
            raise ValueError(f"train.{name}={getattr(train, name)} must be at least {low} and below {high}.")
    if train.clip_norm is not None and not 0 < train.clip_norm < math.inf:
        raise ValueError(f"train.clip_norm={train.clip_norm} must be positive and finite, or None.")
    if list(train.drops) != sorted(set(train.drops)) or any(epoch < 1 for epoch in train.drops):
        raise ValueError(f"train.drops={train.drops} must be epochs from 1 on, in rising order.")
    if train.compute_dtype not in ("float32", "bfloat16"):
        raise ValueError(f"train.compute_dtype={train.compute_dtype!r} is unknown. Choose 'float32' or 'bfloat16'.")
    if train.make_optimizer is not None and not callable(train.make_optimizer):
        raise ValueError(
            f"train.make_optimizer={train.make_optimizer!r} must be a function (steps per epoch) -> optax chain, set "
            "in the config file."
        )
    data.check_readable(config.dataset, config.data.dir)


def prune_dict(config: Config) -> dict[str, Any]:
    """What decides on the mask, as plain values, with the number of iterations filled in."""
    values = dataclasses.asdict(config)
    values["prune"]["num_iterations"] = num_iterations(config.prune)
    del values["train"], values["data"]
    return values


def train_dict(config: Config) -> dict[str, Any]:
    """What decides on the trained network, as plain values; a function by its name and its source."""
    values = prune_dict(config)
    values["train"] = dataclasses.asdict(config.train)
    for kept in ("keep_checkpoints", "checkpoint_every"):
        del values["train"][kept]
    make_optimizer = config.train.make_optimizer
    if make_optimizer is not None:
        values["train"]["make_optimizer"] = f"{make_optimizer.__name__} {_source_hash(make_optimizer)}"
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
    parts = (config.model, config.dataset, prune.pruner, f"c{prune.compression:g}", f"s{config.seed}", digest)
    return re.sub(r"[^A-Za-z0-9_.+-]", "_", "-".join(parts))
