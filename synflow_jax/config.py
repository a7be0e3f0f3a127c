"""Floor 6. What the files under configs/ fill in, checked before any work.

Without `from __future__ import annotations`: ml_collections reads the types of the fields, and not as strings.
"""

import dataclasses
import hashlib
import json
import math
import re
from typing import Any

from synflow_jax import data, models, schedules

PRUNERS = ("synflow", "snip", "grasp", "magnitude", "random")
DATA_DRIVEN = ("snip", "grasp")


@dataclasses.dataclass
class PruneConfig:
    """How to prune. See `synflow_jax.pruning.prune`."""

    pruner: str = "synflow"
    compression: float = 100.0  # total / kept
    num_iterations: int | None = None  # None: as in the paper, 100 for synflow and 1 for the others
    schedule: str = "exponential"
    scope: str = "global"
    # "float32" as in the published runs; "float64" takes twice as long and is free of rounding; None: see `prune`.
    score_dtype: str | None = "float32"
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
class Config:
    """One run."""

    model: str = "cifar_vgg16_bn"
    dataset: str = "cifar100"
    width_multiplier: float = 1.0
    seed: int = 0
    prune: PruneConfig = dataclasses.field(default_factory=PruneConfig)


def num_iterations(config: PruneConfig) -> int:
    """The number of iterations, with the paper's in place of None."""
    if config.num_iterations is None:
        return 100 if config.pruner == "synflow" else 1
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
        data.check_readable(config.dataset)


def as_dict(config: Config) -> dict[str, Any]:
    """The config as plain values, with the number of iterations filled in."""
    values = dataclasses.asdict(config)
    values["prune"]["num_iterations"] = num_iterations(config.prune)
    return values


def run_id(config: Config) -> str:
    """A name that is the same for the same config: the parts that a reader looks for, and a hash of everything."""
    digest = hashlib.sha256(json.dumps(as_dict(config), sort_keys=True).encode()).hexdigest()[:8]
    prune = config.prune
    parts = (config.model, config.dataset, prune.pruner, f"c{prune.compression:g}", f"s{config.seed}", digest)
    return re.sub(r"[^A-Za-z0-9_.+-]", "_", "-".join(parts))
