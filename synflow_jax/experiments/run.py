"""Resolves a config into its runs: every default filled in, one `Run` per combination of its grid.

>>> from synflow_jax.experiments.config import Config, Grid
>>> runs = resolve(Config(grid=Grid(seed=(0, 1))))
>>> [run.config.seed for run in runs]
[0, 1]
>>> runs[0].config.prune.num_iterations  # None in the config
100
>>> runs[0].prune_id
'cifar_vgg16_bn-cifar100-synflow-c100-s0-807e93ec'
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from synflow_jax.experiments import expected, identity, rules, settings
from synflow_jax.experiments.config import Config, Grid

# More runs than anybody trains. A list of them would fill the memory.
_MOST_RUNS = 10**6


@dataclasses.dataclass(frozen=True)
class Run:
    """One run: a config whose every default is filled in. Made by `resolve`; not to be changed.

    config: its grid is empty; prune.num_iterations, prune.scope and prune.mode have the values that
      the run uses.
    """

    config: Config

    @functools.cached_property
    def prune_id(self) -> str:
        """Returns the name of the pruning run: the same for every config that prunes alike."""
        return _name(self.config, self.prune_dict)

    @functools.cached_property
    def train_id(self) -> str:
        """Returns the name of the training run."""
        return "train-" + _name(self.config, self.train_dict)

    @property
    def prune_dict(self) -> dict[str, Any]:
        """Returns the settings that decide on the mask, as rows and checkpoints hold them."""
        return identity.named_values(self.config, self.config)

    @property
    def train_dict(self) -> dict[str, Any]:
        """Returns the settings that decide on the trained network."""
        return {**self.prune_dict, "train": identity.named_values(self.config.train, self.config)}

    @property
    def num_iterations(self) -> int:
        """Returns the number of iterations; of a certified run, the most that it may take."""
        assert self.config.prune.num_iterations is not None, "resolve() fills it in"
        return self.config.prune.num_iterations

    @property
    def pruner(self) -> rules.Pruner:
        """Returns the properties of the run's rule."""
        return rules.PRUNERS[self.config.prune.pruner]

    @property
    def ablation(self) -> rules.Ablation:
        """Returns what the run's ablation changes."""
        return rules.ABLATIONS[self.config.prune.ablation]

    @property
    def is_certified(self) -> bool:
        """Returns whether the schedule is the one that provably cannot disconnect the network."""
        return rules.is_certified(self.config.prune.schedule)

    @property
    def trains_batch_norm(self) -> bool:
        """Returns whether the network is scored with the statistics of the batch."""
        return rules.trains_batch_norm(self.config.prune.mode)

    @property
    def shapes_key(self) -> tuple[Any, ...]:
        """Returns a value that is equal for runs whose networks have the same shapes.

        Such runs share compiled programs.
        """
        config = self.config
        return config.model, config.dataset, config.width_multiplier

    @property
    def network_key(self) -> tuple[Any, ...]:
        """Returns a value that is equal for runs that prune the same network."""
        return *self.shapes_key, self.config.seed, self.config.init

    @property
    def scored_dataset(self) -> str | None:
        """Returns the data set that the rule scores on, or None if it needs no data."""
        if not self.pruner.reads_data:
            return None
        return self.config.prune.dataset or self.config.dataset

    # The keys are made when they are used: JAX must not start before several processes have joined.

    @property
    def init_key(self) -> jax.Array:
        """Returns the key that draws the network."""
        return identity.key(self.config.seed)

    @property
    def score_key(self) -> jax.Array:
        """Returns the key of the scores, which the random rules use."""
        return jax.random.fold_in(self.init_key, 1)

    @property
    def train_key(self) -> jax.Array:
        """Returns the key of training: the order of the examples and their augmentation."""
        return jax.random.fold_in(self.init_key, 2)

    @property
    def shuffle_key(self) -> jax.Array:
        """Returns the key that shuffles the mask, for ablation="shuffle"."""
        return jax.random.fold_in(self.init_key, 3)

    @property
    def redraw_key(self) -> jax.Array:
        """Returns the key that draws another network, for ablation="reinitialize"."""
        return jax.random.fold_in(self.init_key, 4)

    def value(self, key: str) -> Any:
        """Returns the setting of a key, e.g. "seed" or "prune.compression"."""
        return functools.reduce(getattr, key.split("."), self.config)

    def deciding_values(self) -> dict[str, Any]:
        """Returns, by key, the settings that decide on results and that no grid varies.

        All runs of a sweep share them.
        """
        values = identity.deciding_values(self.config)
        return {key: value for key, value in values.items() if key not in grid_fields()}


def _name(config: Config, values: dict[str, Any]) -> str:
    """Returns a name: the settings that a reader looks for, and a hash of all `values`."""
    # Sorted, so that the order of the fields does not matter.
    content = json.dumps(values, sort_keys=True).encode()
    digest = hashlib.sha256(content).hexdigest()[:8]
    shown = (
        config.model,
        config.dataset,
        config.prune.pruner,
        f"c{config.prune.compression:g}",
        f"s{config.seed}",
        digest,
    )
    return re.sub(r"[^A-Za-z0-9_.+-]", "_", "-".join(shown))


# Resolving


def resolve(config: Config) -> list[Run]:
    """Returns the runs of a config in the order of `Grid`, without duplicates.

    >>> grid = Grid(seed=(0, 1), compression=(10.0, 100.0))
    >>> [(run.config.seed, run.config.prune.compression) for run in resolve(Config(grid=grid))]
    [(0, 10.0), (0, 100.0), (1, 10.0), (1, 100.0)]

    Several grids follow one another, and have the common values of `grid`:

    >>> grids = (Grid(pruner=("snip", "grasp")), Grid(schedule=("linear",)))
    >>> runs = resolve(Config(grid=Grid(seed=(0,)), grids=grids))
    >>> [(run.config.prune.pruner, run.config.prune.schedule) for run in runs]
    [('snip', 'exponential'), ('grasp', 'exponential'), ('synflow', 'linear')]

    Raises:
      ValueError: a value has another type than its field, or is out of its range.
    """
    runs: dict[tuple[Any, ...], Run] = {}
    for combination in combinations(config):
        run = with_defaults(combination)
        # Two combinations may be one run, e.g. if they differ in a mode that the rule does not use.
        # They agree in all that no grid varies.
        varied = tuple(run.value(key) for key in grid_fields())
        runs.setdefault(varied, run)
    return list(runs.values())


def resolve_one(config: Config) -> Run:
    """Returns the run of a config without a grid.

    Raises:
      ValueError: the config has several runs.
    """
    runs = resolve(config)
    if len(runs) > 1:
        keys = ", ".join(f"--config.{key}" for key in grid_values(config))
        raise ValueError(
            f"config.grid={grid_values(config)} names {len(runs)} runs, and this takes one: set "
            f"{keys}, and take a config without a grid."
        )
    return runs[0]


def from_dict(values: Mapping[str, Any], init: str | None = None) -> Run:
    """Returns the run of `Run.prune_dict` or `train_dict`, as a row holds it.

    >>> run = resolve_one(Config(seed=3))
    >>> from_dict(run.prune_dict) == run
    True

    Args:
      values: the settings; those that are missing have their defaults.
      init: the file of weights that the run began from, if it did: a row has only its digest.

    Raises:
      ValueError: a key is unknown; `init` has another digest than the file of the run.
    """
    try:
        config = settings.from_values(values)
        if "prune" not in values:
            raise ValueError("it has no key 'prune'")
    except ValueError as error:
        raise ValueError(f"this is no config of prune.py: {error}") from error
    if init is not None and config.init is not None:
        if identity.file_digest(expected.expand_user(init)) != config.init:
            raise ValueError(
                f"init={init!r} is not the file that the run began from: its digest is not "
                f"{config.init}. Name the file of the run."
            )
        config.init = init
    return with_defaults(config)


def combinations(config: Config) -> Iterator[Config]:
    """Yields one config without a grid per combination of values, defaults not yet filled in.

    Raises:
      ValueError: a value has another type than its field, or is out of its range.
    """
    config = settings.checked(config)
    products = [_values(config, grid) for grid in config.grids or (config.grid,)]
    _check_values(products)
    for values in products:
        for combination in itertools.product(*values.values()):
            yield _with_values(config, dict(zip(values, combination, strict=True)))


def _check_values(products: Sequence[Mapping[str, tuple[Any, ...]]]) -> None:
    """Checks each value of a grid as one of its field in the config, and counts the runs.

    Raises:
      ValueError: a value is out of its range, or there are too many runs.
    """
    fields = settings.fields()
    for values in products:
        for key, of_key in values.items():
            for value in of_key:
                try:
                    settings.read(value, fields[key], key)
                except ValueError as error:
                    first = {other: found[0] for other, found in values.items()} | {key: value}
                    raise ValueError(f"{error} {grids_run(first)}") from error
    num_runs = sum(math.prod(map(len, values.values())) for values in products)
    if num_runs > _MOST_RUNS:
        raise ValueError(
            f"the config's grid names {num_runs} runs, and at most {_MOST_RUNS} are possible: give "
            "it fewer values."
        )


def grids_run(values: Mapping[str, Any]) -> str:
    """Returns a sentence that names the run of a grid which has these values."""
    listed = ", ".join(f"{key}={value!r}" for key, value in values.items())
    return f"This is the grid's run of {listed}."


def _with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """Returns the config without its grid, and with other values for some keys."""
    own: dict[str, Any] = {"grid": Grid(), "grids": ()}
    of_prune = {}
    for key, value in values.items():
        part, _, name = key.rpartition(".")
        if part:
            assert part == "prune", "grid_fields() names no other part"
            of_prune[name] = value
        else:
            own[name] = value
    return dataclasses.replace(config, prune=dataclasses.replace(config.prune, **of_prune), **own)


def with_defaults(config: Config) -> Run:
    """Returns the run of a checked config without a grid: its defaults have their values.

    One run that is asked for in two ways (num_iterations=None, or the number itself) is one config.
    """
    prune = config.prune
    num_iterations = prune.num_iterations
    if num_iterations is None:
        num_iterations = rules.num_iterations(prune.pruner, prune.schedule, prune.compression)
    filled = dataclasses.replace(
        prune,
        num_iterations=num_iterations,
        scope=rules.scope(prune.pruner, prune.scope),
        mode=rules.mode(prune.pruner, prune.mode),
    )
    return Run(dataclasses.replace(config, prune=filled))


# The grid


@functools.cache
def grid_fields() -> dict[str, dataclasses.Field[Any]]:
    """Returns the fields of `Grid` by the key of the config that each of them sets."""
    own = {field.name for field in dataclasses.fields(Config)}
    found = {}
    for field in dataclasses.fields(Grid):
        key = field.name if field.name in own else f"prune.{field.name}"
        found[key] = field
    return found


def grid_values(config: Config) -> dict[str, tuple[Any, ...]]:
    """Returns the values that the grids of a config set, by key, without duplicates.

    >>> grid_values(Config(grid=Grid(pruner=("snip", "grasp"), seed=(0, 1))))
    {'seed': (0, 1), 'prune.pruner': ('snip', 'grasp')}

    Raises:
      ValueError: a value has another type than its field, or is out of its range.
    """
    config = settings.checked(config)
    found: dict[str, tuple[Any, ...]] = {}
    grids = [_values(config, grid) for grid in config.grids or (config.grid,)]
    for key in grid_fields():
        values: list[Any] = []
        for grid in grids:
            values += grid.get(key, ())
        if values:
            # Without duplicates, in their order, which a set would lose.
            found[key] = tuple(dict.fromkeys(values))
    return found


def _values(config: Config, grid: Grid) -> dict[str, tuple[Any, ...]]:
    """Returns the values of one grid by key; where it has none, those of `config.grid`."""
    found = {}
    for key, field in grid_fields().items():
        values = getattr(grid, field.name) or getattr(config.grid, field.name)
        if values:
            found[key] = values
    return found
