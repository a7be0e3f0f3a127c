"""Checks the values of a config before any work is done.

The tables at the end list small rules. Each rule takes the config of one run and returns a message
that names the argument, its value and the cure, or None. A rule may also call a function of another
wing that raises ValueError with such a message.
"""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

from synflow_jax import data, models
from synflow_jax.experiments import identity, rules
from synflow_jax.experiments.config import Config
from synflow_jax.experiments.run import Run, combinations, grid_values

Rule = Callable[[Config], str | None]


# What a config is checked for


def check(config: Config, *, reads_data: bool = True) -> None:
    """Checks everything that pruning uses, in every run of the config.

    Args:
      config: one run, or many with a grid.
      reads_data: also check that the data set that the rule scores on is on the disk.

    Raises:
      ValueError: a value is out of its range, or does not go with another one.
    """
    _check_runs(config, (*PRUNE_RULES, _scored_data_is_readable) if reads_data else PRUNE_RULES)


def check_prune(config: Config) -> None:
    """Checks that prune.py can make the masks.

    Raises:
      ValueError: a rule prunes by training.
    """
    _check_runs(config, (_prunes_without_training,))


def check_train(config: Config) -> None:
    """Checks everything that training uses, in every run of the config, and the training data.

    Raises:
      ValueError: a value is out of its range, or the data is not on the disk.
    """
    _check_runs(config, TRAIN_RULES)


def _check_runs(config: Config, table: Sequence[Rule]) -> None:
    """Applies the rules to every combination of the grid, and names the one that fails."""
    keys = grid_values(config)
    for single in combinations(config):
        message = _first_message(table, single)
        if message is None:
            continue
        if keys:
            values = ", ".join(f"{key}={_get(single, key)!r}" for key in keys)
            message = f"{message} This is the grid's run of {values}."
        raise ValueError(message)


def _first_message(table: Sequence[Rule], config: Config) -> str | None:
    """Returns the message of the first rule that the config breaks, if it breaks one."""
    for rule in table:
        try:
            message = rule(config)
        except ValueError as error:
            message = str(error)
        if message is not None:
            return message
    return None


def _get(config: Config, key: str) -> Any:
    """Returns the value of a key, e.g. "prune.compression"."""
    return functools.reduce(getattr, key.split("."), config)


# Rules for one value


def _one_of(key: str, choices: Sequence[str | None]) -> Rule:
    """Makes a rule: the value is one of the choices."""
    words = ", ".join(str(choice) for choice in choices)

    def rule(config: Config) -> str | None:
        value = _get(config, key)
        if value in choices:
            return None
        return f"{key}={value!r} is unknown. Choose one of {words}."

    return rule


def _at_least(key: str, low: int) -> Rule:
    """Makes a rule: the value is None or a whole number of at least `low`."""

    def rule(config: Config) -> str | None:
        value = _get(config, key)
        is_whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        if value is None or (is_whole and value >= low):
            return None
        return f"{key}={value!r} must be a whole number of at least {low}."

    return rule


def _from_to(key: str, low: float, high: float = math.inf) -> Rule:
    """Makes a rule: low <= value < high."""

    def rule(config: Config) -> str | None:
        value = _get(config, key)
        if low <= value < high:
            return None
        return f"{key}={value} must be at least {low} and below {high}."

    return rule


def _positive(key: str) -> Rule:
    """Makes a rule: the value is None, or positive and finite."""

    def rule(config: Config) -> str | None:
        value = _get(config, key)
        if value is None or 0 < value < math.inf:
            return None
        return f"{key}={value} must be positive and finite."

    return rule


def _compression_is_finite(config: Config) -> str | None:
    compression = config.prune.compression
    if 1 <= compression < math.inf:
        return None
    return (
        f"prune.compression={compression!r} must be a finite number of at least 1: it is total / "
        "kept, so 1 keeps every weight and 100 keeps one in a hundred."
    )


def _init_is_readable(config: Config) -> str | None:
    identity.file_digest(config.init)
    return None


# Rules for combinations: pruning


def _model_fits_dataset(config: Config) -> str | None:
    num_classes = data.spec(config.dataset).num_classes
    models.create(config.model, num_classes, width_multiplier=config.width_multiplier)
    return None


def _one_device_prunes(config: Config) -> str | None:
    """Refuses over_devices for what one device prunes."""
    prune = config.prune
    if not prune.over_devices:
        return None
    if rules.is_certified(prune.schedule):
        word = f"schedule={prune.schedule!r}"
    elif not rules.PRUNERS[prune.pruner].over_devices:
        word = f"pruner={prune.pruner!r}"
    else:
        return None
    return (
        f"prune.over_devices=True does not go with prune.{word}, which one device prunes: leave it "
        "out."
    )


# The certified schedule bounds SynFlow's scores by those of a cut of kernels.
_CERTIFIED_NEEDS = {
    "pruner": "synflow",
    "scope": "global",
    "nested": True,
    "biases": False,
    "norms": False,
    "mode": "eval",
}


def _certified_bound_holds(config: Config) -> str | None:
    if not rules.is_certified(config.prune.schedule):
        return None
    for name, needed in _CERTIFIED_NEEDS.items():
        value = getattr(config.prune, name)
        if value != needed:
            return (
                f"prune.{name}={value!r} does not go with schedule='certified', which compares "
                "SynFlow's scores with those of a cut of kernels: it needs "
                f"{needed!r}. Set that, or choose 'exponential' or 'linear'."
            )
    return None


def _cut_fraction_is_a_fraction(config: Config) -> str | None:
    fraction = config.prune.cut_fraction
    if not rules.is_certified(config.prune.schedule) or 0 < fraction < 1:
        return None
    return (
        f"prune.cut_fraction={fraction} must be above 0 and below 1: it is the fraction of a cut "
        "that one iteration may prune."
    )


def _certified_mask_is_kept(config: Config) -> str | None:
    prune = config.prune
    ablation = rules.ABLATIONS[prune.ablation]
    changes_mask = ablation.shuffles or ablation.inverts
    if not rules.is_certified(prune.schedule) or not changes_mask:
        return None
    return (
        f"prune.ablation={prune.ablation!r} does not go with schedule='certified': the certificate "
        "would be of another mask. Choose 'exponential' or 'linear'."
    )


def _layerwise_is_drawn_at_once(config: Config) -> str | None:
    prune = config.prune
    if not rules.PRUNERS[prune.pruner].layerwise or prune.num_iterations in (None, 1):
        return None
    return (
        f"prune.num_iterations={prune.num_iterations} does not go with {prune.pruner!r}, which "
        "draws its mask at once: leave it out, or set 1."
    )


def _only_imp_rewinds(config: Config) -> str | None:
    step = config.prune.rewind_step
    is_allowed = step == 0 or rules.PRUNERS[config.prune.pruner].trains
    if step >= 0 and is_allowed:
        return None
    return (
        f"prune.rewind_step={step} must not be negative, and must be 0 for every rule but 'imp': "
        "set that, or prune.pruner='imp'."
    )


def _imp_is_nested(config: Config) -> str | None:
    if not rules.PRUNERS[config.prune.pruner].trains or config.prune.nested:
        return None
    return "prune.nested=False does not go with 'imp', which trains no pruned weight: leave it out."


def _redrawn_weights_have_no_past(config: Config) -> str | None:
    prune = config.prune
    if not prune.rewind_step or not rules.ABLATIONS[prune.ablation].redraws:
        return None
    return (
        f"prune.rewind_step={prune.rewind_step} does not go with ablation='reinitialize': weights "
        "that are drawn again have no earlier state. Set one of them to its default."
    )


def _scored_data_fits_network(config: Config) -> str | None:
    run = Run(config)
    if run.scored_dataset is None:
        return None
    scored, network = data.spec(run.scored_dataset), data.spec(config.dataset)
    shape_fits = scored.image_shape in (None, network.image_shape)
    if shape_fits and scored.num_classes <= network.num_classes:
        return None
    return (
        f"prune.dataset={config.prune.dataset!r} does not fit a network for "
        f"dataset={config.dataset!r}: it must not have more classes, and its images must have the "
        "same shape, or one that is resized. Choose 'digits'."
    )


def _scored_data_is_readable(config: Config) -> str | None:
    dataset = Run(config).scored_dataset
    if dataset is not None:
        data.check_readable(dataset, config.data.dir)
    return None


def _prunes_without_training(config: Config) -> str | None:
    if not rules.PRUNERS[config.prune.pruner].trains:
        return None
    return (
        f"prune.pruner={config.prune.pruner!r} prunes by training: python train.py runs it, with "
        "the same flags. Choose another rule for prune.py."
    )


# Rules for combinations: training


def _rewound_network_is_masked(config: Config) -> str | None:
    if not config.train.compact or not config.prune.rewind_step:
        return None
    return (
        "train.compact=True does not go with prune.rewind_step: a rewound network is trained "
        "masked. Leave one of them out."
    )


def _drops_rise(config: Config) -> str | None:
    drops = list(config.train.drops)
    if drops == sorted(set(drops)) and all(epoch >= 1 for epoch in drops):
        return None
    return f"train.drops={config.train.drops} must be epochs from 1 on, in rising order."


def _optimizer_is_a_function(config: Config) -> str | None:
    optimizer = config.train.make_optimizer
    if optimizer is None or callable(optimizer):
        return None
    return (
        f"train.make_optimizer={optimizer!r} must be a function (steps per epoch) -> optax chain, "
        "set in the config file."
    )


def _training_data_is_readable(config: Config) -> str | None:
    data.check_readable(config.dataset, config.data.dir)
    return None


# The tables. The words come first: the rules after them look them up.

PRUNE_RULES: tuple[Rule, ...] = (
    _one_of("prune.pruner", tuple(rules.PRUNERS)),
    _one_of("prune.schedule", tuple(rules.SCHEDULES)),
    _one_of("prune.scope", rules.SCOPES),
    _one_of("prune.mode", rules.MODES),
    _one_of("prune.ablation", tuple(rules.ABLATIONS)),
    _one_of("prune.score_dtype", (None, "float32", "float64")),
    _model_fits_dataset,
    _one_device_prunes,
    _certified_bound_holds,
    _cut_fraction_is_a_fraction,
    _certified_mask_is_kept,
    _compression_is_finite,
    _at_least("prune.num_iterations", 1),
    _layerwise_is_drawn_at_once,
    _only_imp_rewinds,
    _imp_is_nested,
    _redrawn_weights_have_no_past,
    _at_least("prune.examples_per_class", 1),
    _at_least("prune.batch_size", 1),
    _init_is_readable,
    _at_least("seed", 0),
    _positive("prune.temperature"),
    _scored_data_fits_network,
)

TRAIN_RULES: tuple[Rule, ...] = (
    _rewound_network_is_masked,
    _at_least("train.num_epochs", 1),
    _at_least("train.batch_size", 1),
    _at_least("train.keep_checkpoints", 1),
    _at_least("train.checkpoint_every", 1),
    _from_to("train.learning_rate", 0),
    _from_to("train.drop_factor", 0),
    _from_to("train.weight_decay", 0),
    _from_to("train.momentum", 0, 1),
    _from_to("train.label_smoothing", 0, 1),
    _positive("train.clip_norm"),
    _drops_rise,
    _one_of("train.compute_dtype", ("float32", "bfloat16")),
    _optimizer_is_a_function,
    _at_least("sweep.runs_per_device", 1),
    _one_of("sweep.batching", ("map", "vmap")),
    _training_data_is_readable,
)
