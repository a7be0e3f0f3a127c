"""Checks what the values of a config need of each other, before any work is done.

`settings.checked` comes first, and checks each value by itself.

The tables at the end list small checks. Each check takes a run, and returns None or a message that
names the argument, its value and the cure. A check may also call a function of another wing that
raises ValueError with such a message.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from synflow_jax import data, models
from synflow_jax.experiments import identity
from synflow_jax.experiments.config import Config
from synflow_jax.experiments.run import Run, combinations, grid_values, grids_run, with_defaults

Check = Callable[[Run], str | None]


# What a config is checked for


def check(config: Config, *, reads_data: bool = True) -> None:
    """Checks everything that pruning uses, in every run of the config.

    Args:
      config: one run, or many with a grid.
      reads_data: also check that the data set that the rule scores on is on the disk.

    Raises:
      ValueError: a value is out of its range, or does not go with another one.
    """
    _check_runs(config, (*PRUNE_CHECKS, _scored_data_is_readable) if reads_data else PRUNE_CHECKS)


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
    _check_runs(config, TRAIN_CHECKS)


def _check_runs(config: Config, table: Sequence[Check]) -> None:
    """Applies the checks to every combination of the grid, and names the one that fails."""
    keys = grid_values(config)
    for single in combinations(config):
        message = _first_message(single, table)
        if message is None:
            continue
        if keys:
            run = Run(single)
            message = f"{message} {grids_run({key: run.value(key) for key in keys})}"
        raise ValueError(message)


def _first_message(single: Config, table: Sequence[Check]) -> str | None:
    """Returns the message of the first check that fails, if one does."""
    try:
        return _apply(table, with_defaults(single))
    except ValueError as error:
        return str(error)


def _apply(table: Sequence[Check], run: Run) -> str | None:
    """Returns the first message of a table of checks, if there is one."""
    return next(filter(None, (check_run(run) for check_run in table)), None)


# Checks of one value


def _init_is_readable(run: Run) -> str | None:
    identity.file_digest(run.config.init)
    return None


# Checks of combinations: pruning


def _model_fits_dataset(run: Run) -> str | None:
    num_classes = data.spec(run.config.dataset).num_classes
    models.create(run.config.model, num_classes, width_multiplier=run.config.width_multiplier)
    return None


def _one_device_prunes(run: Run) -> str | None:
    """Refuses over_devices for what one device prunes."""
    prune = run.config.prune
    if not prune.over_devices:
        return None
    if run.is_certified:
        word = f"schedule={prune.schedule!r}"
    elif not run.pruner.over_devices:
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


def _certified_bound_holds(run: Run) -> str | None:
    if not run.is_certified:
        return None
    for name, needed in _CERTIFIED_NEEDS.items():
        value = getattr(run.config.prune, name)
        if value != needed:
            return (
                f"prune.{name}={value!r} does not go with schedule='certified', which compares "
                "SynFlow's scores with those of a cut of kernels: it needs "
                f"{needed!r}. Set that, or choose 'exponential' or 'linear'."
            )
    return None


def _certified_mask_is_kept(run: Run) -> str | None:
    prune = run.config.prune
    changes_mask = run.ablation.shuffles or run.ablation.inverts
    if not run.is_certified or not changes_mask:
        return None
    return (
        f"prune.ablation={prune.ablation!r} does not go with schedule='certified': the certificate "
        "would be of another mask. Choose 'exponential' or 'linear'."
    )


def _layerwise_is_drawn_at_once(run: Run) -> str | None:
    prune = run.config.prune
    if not run.pruner.layerwise or prune.num_iterations == 1:
        return None
    return (
        f"prune.num_iterations={prune.num_iterations} does not go with {prune.pruner!r}, which "
        "draws its mask at once: leave it out, or set 1."
    )


def _only_imp_rewinds(run: Run) -> str | None:
    step = run.config.prune.rewind_step
    if step == 0 or run.pruner.trains:
        return None
    return (
        f"prune.rewind_step={step} must be 0 for every rule but 'imp': "
        "set that, or prune.pruner='imp'."
    )


def _imp_is_nested(run: Run) -> str | None:
    if not run.pruner.trains or run.config.prune.nested:
        return None
    return "prune.nested=False does not go with 'imp', which trains no pruned weight: leave it out."


def _redrawn_weights_start_at_0(run: Run) -> str | None:
    prune = run.config.prune
    if not prune.rewind_step or not run.ablation.redraws:
        return None
    return (
        f"prune.rewind_step={prune.rewind_step} does not go with ablation='reinitialize': weights "
        "that are drawn again have no earlier state. Set one of them to its default."
    )


def _scored_data_fits_network(run: Run) -> str | None:
    if run.scored_dataset is None:
        return None
    scored, network = data.spec(run.scored_dataset), data.spec(run.config.dataset)
    shape_fits = scored.image_shape in (None, network.image_shape)
    if shape_fits and scored.num_classes <= network.num_classes:
        return None
    return (
        f"prune.dataset={run.config.prune.dataset!r} does not fit a network for "
        f"dataset={run.config.dataset!r}: it must not have more classes, and its images must have "
        "the same shape, or one that is resized. Choose 'digits'."
    )


def _scored_data_is_readable(run: Run) -> str | None:
    dataset = run.scored_dataset
    if dataset is not None:
        data.check_readable(dataset, run.config.data.dir)
    return None


def _prunes_without_training(run: Run) -> str | None:
    if not run.pruner.trains:
        return None
    return (
        f"prune.pruner={run.config.prune.pruner!r} prunes by training: python train.py runs it, "
        "with the same flags. Choose another rule for prune.py."
    )


# Checks of combinations: training


def _rewound_network_is_masked(run: Run) -> str | None:
    if not run.config.train.compact or not run.config.prune.rewind_step:
        return None
    return (
        "train.compact=True does not go with prune.rewind_step: a rewound network is trained "
        "masked. Leave one of them out."
    )


def _optimizer_is_a_function(run: Run) -> str | None:
    optimizer = run.config.train.make_optimizer
    if optimizer is None or callable(optimizer):
        return None
    return (
        f"train.make_optimizer={optimizer!r} must be a function (steps per epoch) -> optax chain, "
        "set in the config file."
    )


def _training_data_is_readable(run: Run) -> str | None:
    data.check_readable(run.config.dataset, run.config.data.dir)
    return None


# The tables

PRUNE_CHECKS: tuple[Check, ...] = (
    _model_fits_dataset,
    _one_device_prunes,
    _certified_bound_holds,
    _certified_mask_is_kept,
    _layerwise_is_drawn_at_once,
    _only_imp_rewinds,
    _imp_is_nested,
    _redrawn_weights_start_at_0,
    _init_is_readable,
    _scored_data_fits_network,
)

TRAIN_CHECKS: tuple[Check, ...] = (
    _rewound_network_is_masked,
    _optimizer_is_a_function,
    _training_data_is_readable,
)
