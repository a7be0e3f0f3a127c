"""Turns the words of a config into values: pruners, ablations, schedules, scopes, modes.

A config is written by hand and printed into rows, so it says "synflow" or "exponential". Everything
that depends on such a word is in the tables of this file. No other file compares words.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from synflow_jax import certified, data, models, schedules, scores
from synflow_jax.models import Network
from synflow_jax.schedules import Schedule

if TYPE_CHECKING:  # `run` imports the config, which imports this file
    from synflow_jax.experiments.run import Run

# A level of iterative magnitude pruning keeps this fraction unless told otherwise (Frankle and
# Carbin, 2019).
_LEVEL_DENSITY = 0.8


# Score rules


def _synflow(run: Run, network: Network) -> scores.Rule:
    """Makes SynFlow's rule."""
    scaled = run.config.prune.scaled
    if not run.trains_batch_norm:
        apply_fn = models.synflow_fn(network.model, network.batch_stats)
        return scores.synflow(apply_fn, network.input_shape, scaled=scaled)
    apply_fn = models.train_fn(network.model, network.batch_stats)
    rule = scores.synflow(apply_fn, network.input_shape, scaled=scaled)
    # A network that subtracts the mean of its batch is no flow along paths: no cut bounds its
    # scores.
    return dataclasses.replace(rule, flow=None)


def _snip(run: Run, network: Network) -> scores.Rule:
    """Makes SNIP's rule, with its examples."""
    return scores.snip(scores.cross_entropy(_apply_fn(run, network)), _batches(run, network))


def _grasp(run: Run, network: Network) -> scores.Rule:
    """Makes GraSP's rule, with its examples."""
    temperature = run.config.prune.temperature
    loss_fn = scores.cross_entropy(_apply_fn(run, network), temperature=temperature)
    return scores.grasp(loss_fn, _batches(run, network))


def _magnitude(run: Run, network: Network) -> scores.Rule:
    """Makes the rule of magnitudes, which is also that of each level of IMP."""
    del run, network
    return scores.magnitude()


def _random(run: Run, network: Network) -> scores.Rule:
    """Makes the random rule."""
    del run, network
    return scores.random()


def _apply_fn(run: Run, network: Network) -> scores.ApplyFn:
    """Returns the network as a function, in the mode that the run scores it in."""
    make = models.train_fn if run.trains_batch_norm else models.eval_fn
    return make(network.model, network.batch_stats)


def _batches(run: Run, network: Network) -> Any:
    """Reads the examples that a rule scores on."""
    prune, dataset = run.config.prune, run.scored_dataset
    assert dataset is not None, "the rule needs data"
    height, width, channels = network.input_shape
    try:
        return data.prune_batches(
            dataset,
            (height, width, channels),
            run.config.data.dir,
            examples_per_class=prune.examples_per_class,
            batch_size=prune.batch_size,
            seed=run.config.seed,
        )
    except ValueError as error:
        # The data wing does not know that the argument is a key of the config.
        prefix = "prune." if str(error).startswith("examples_per_class") else ""
        raise ValueError(f"{prefix}{error}") from error


# The tables


@dataclasses.dataclass(frozen=True)
class Pruner:
    """Describes what a rule needs and how it is run.

    make_rule: makes the score rule of a run for its network.
    num_iterations: the number of iterations that the paper uses.
    schedule: decides how many weights each layer keeps, in place of the config's schedule.
    evaluates: the rule runs the network, in eval or in train mode.
    reads_data: the rule scores on examples.
    non_negative: no score is below 0 (in eval mode).
    layerwise: the weights of each layer are drawn by themselves, all at once.
    trains: the rule prunes by training (IMP); only train.py runs it.
    over_devices: several devices can prune one network together.
    """

    make_rule: Callable[[Run, Network], scores.Rule]
    num_iterations: int = 1
    schedule: Schedule | None = None
    evaluates: bool = False
    reads_data: bool = False
    non_negative: bool = False
    layerwise: bool = False
    trains: bool = False
    over_devices: bool = True


PRUNERS = {
    "synflow": Pruner(_synflow, num_iterations=100, evaluates=True, non_negative=True),
    "snip": Pruner(_snip, evaluates=True, reads_data=True, non_negative=True),
    "grasp": Pruner(_grasp, evaluates=True, reads_data=True),
    "magnitude": Pruner(_magnitude, non_negative=True),
    "random": Pruner(_random),
    "uniform": Pruner(_random, layerwise=True),
    "erk": Pruner(
        _random, layerwise=True, schedule=schedules.erdos_renyi_kernel, over_devices=False
    ),
    "imp": Pruner(_magnitude, non_negative=True, trains=True, over_devices=False),
}


@dataclasses.dataclass(frozen=True)
class Ablation:
    """Describes what an ablation changes.

    shuffles: the mask is shuffled within each layer.
    redraws: the weights are drawn again before training.
    inverts: the largest scores are pruned first.
    """

    shuffles: bool = False
    redraws: bool = False
    inverts: bool = False


ABLATIONS = {
    "none": Ablation(),
    "shuffle": Ablation(shuffles=True),
    "reinitialize": Ablation(redraws=True),
    "invert": Ablation(inverts=True),
}

# "certified" has no schedule: `certified.prune` prunes as much as the scores allow.
SCHEDULES: dict[str, Schedule | None] = {
    "exponential": schedules.exponential,
    "linear": schedules.linear,
    "certified": None,
}
SCOPES = ("global", "local")
MODES = ("eval", "train")


# What a run is made of


def score_rule(run: Run, network: Network) -> scores.Rule:
    """Returns the score rule of a run for its network.

    Raises:
      ValueError: the data cannot be used.
    """
    rule = run.pruner.make_rule(run, network)
    return scores.inverted(rule) if run.ablation.inverts else rule


def schedule(run: Run) -> Schedule:
    """Returns the schedule of a run, which must not be a certified one."""
    if run.pruner.schedule is not None:
        return run.pruner.schedule
    found = SCHEDULES[run.config.prune.schedule]
    assert found is not None, "certified.prune takes no schedule"
    return schedules.per_layer(found) if run.config.prune.scope == "local" else found


def is_certified(schedule: str) -> bool:
    """Returns whether the schedule is the one that provably cannot disconnect the network."""
    return schedule == "certified"


def trains_batch_norm(mode: str) -> bool:
    """Returns whether batch norm uses the statistics of its batch."""
    return mode == "train"


def num_iterations(pruner: str, schedule: str, compression: float) -> int:
    """Returns the usual number of iterations; of the certified schedule, the most it may take."""
    if is_certified(schedule):
        return certified.MAX_ITERATIONS
    if compression == 1:
        return 1  # nothing is pruned
    if PRUNERS[pruner].trains and 1 < compression < math.inf:
        return math.ceil(math.log(compression) / -math.log(_LEVEL_DENSITY))
    return PRUNERS[pruner].num_iterations


def scope(pruner: str, scope: str) -> str:
    """Returns the scope that a rule is run with: "local" for the layerwise rules."""
    return "local" if PRUNERS[pruner].layerwise else scope


def mode(pruner: str, mode: str) -> str:
    """Returns the mode that a rule is run with: "eval" if it does not run the network."""
    return mode if PRUNERS[pruner].evaluates else "eval"
