"""Tests iterative magnitude pruning (IMP).

- One level without training is magnitude pruning.
- Every level starts from the rewound state: parameters, statistics and momentum, in every bit.
- A stopped run resumes and ends in the same bits. Damaged levels are found.
- The id of a pruning run depends on the training recipe for IMP, and for no other rule.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from synflow_jax import models, pruning, schedules, scores, storage, training, trees
from synflow_jax.experiments import checks, engine, initialization, levels, programs, rules, starts
from synflow_jax.experiments import masks as masks_of_runs
from synflow_jax.experiments.config import Config, Grid, PruneConfig, TrainConfig
from synflow_jax.experiments.events import Finished
from synflow_jax.experiments.programs import Recipe
from synflow_jax.experiments.run import from_dict, resolve, resolve_one
from synflow_jax.storage import Workdir
from synflow_jax.training import TrainState, forms, imp

SETTINGS = Config(
    model="fc",
    dataset="digits",
    width_multiplier=0.1,
    prune=PruneConfig(pruner="imp", compression=8.0, num_iterations=3, rewind_step=1),
    train=TrainConfig(
        num_epochs=2, batch_size=719, learning_rate=0.05, drops=(1,), weight_decay=1e-3
    ),
)


RUN = resolve_one(SETTINGS)


def _start() -> TrainState:
    """Returns a state in which momentum and batch statistics are not 0."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    params = {"a": {"kernel": draw(7, 9), "bias": draw(9)}, "b": {"kernel": draw(9, 4)}}
    optimizer = training.sgd(
        lambda count: 0.1 / (1 + count), momentum=0.9, nesterov=True, weight_decay=1e-4
    )
    mask = trees.prunable(params)
    state = training.init_state(
        params, {"norm": {"mean": draw(9)}}, mask, optimizer, jax.random.key(3)
    )
    gradient = jax.tree.map(lambda leaf: draw(*leaf.shape), params)
    updates, opt_state = optimizer.update(gradient, state.opt_state, params)
    return state._replace(
        params=optax.apply_updates(params, updates), opt_state=opt_state, step=jnp.int32(1)
    )


def _bits(tree: trees.Tree) -> list[bytes]:
    data = lambda leaf: (
        jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    )
    return [np.asarray(data(leaf)).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("scope", ["global", "local"])
def test_one_level_without_training_is_magnitude_pruning(scope: str) -> None:
    start = _start()
    sizes = trees.sizes(start.mask)
    for compression, num_levels in ((1.7, 1), (10.0, 1), (10.0, 4)):
        schedule = schedules.exponential
        if scope == "local":
            schedule = schedules.per_layer(schedule)
        shapes = [leaf.shape for leaf in jax.tree.leaves(start.mask)]
        counts = schedule(shapes, compression, num_levels)
        levels = imp.run(lambda state: state, start, counts)
        wanted, info = pruning.prune(
            scores.magnitude(), start.params, compression=compression, schedule=schedule
        )
        jax.tree.map(np.testing.assert_array_equal, levels[-1].mask, wanted)
        assert [int(level.info.kept.sum()) for level in levels] == (
            sum(sizes) - counts.sum(axis=1)
        ).tolist()
        np.testing.assert_array_equal(levels[-1].info.kept[-1], info.kept[-1])


def test_rewinding_restores_every_leaf_bit_for_bit() -> None:
    start = _start()
    before = _bits(start)
    given: list[TrainState] = []

    def train(state: TrainState) -> TrainState:
        given.append(jax.tree.map(lambda leaf: leaf.copy(), state))
        noise = lambda leaf: leaf + jax.random.normal(jax.random.key(len(given)), leaf.shape)
        params = trees.apply_mask(jax.tree.map(noise, state.params), state.mask)
        trained = state._replace(
            params=params, batch_stats=jax.tree.map(noise, state.batch_stats), step=state.step + 5
        )
        # A compiled loop may reuse the memory of its input, so the caller must not read it again.
        jax.tree.map(lambda leaf: leaf.delete(), state.params)
        return trained

    levels = imp.run(train, start, schedules.exponential([(63 + 36,)], 8, 3))
    assert _bits(start) == before and _bits(given[0]) == before
    masks = [start.mask, *(level.mask for level in levels)]
    for state, mask in zip(given, masks, strict=False):
        assert _bits(state.mask) == _bits(mask)
        for name in ("batch_stats", "step", "key"):
            assert _bits(getattr(state, name)) == _bits(getattr(start, name)), name
        assert _bits(state.params) == _bits(trees.apply_mask(start.params, mask))
        # Kept weights have the momentum of the rewound step. The count of steps is restored too.
        momentum = lambda s: s.opt_state[2][0].trace
        assert _bits(momentum(state)) == _bits(trees.apply_mask(momentum(start), mask))
        assert np.any(np.asarray(momentum(state)["a"]["bias"]))
        outside = lambda s: [s.opt_state[:2], s.opt_state[2][1:]]
        assert _bits(outside(state)) == _bits(outside(start))
    # Each level prunes the smallest trained weights of those that were left.
    for level, old in zip(levels, masks, strict=False):
        weights = [
            np.abs(np.asarray(leaf))
            for leaf in jax.tree.leaves(trees.select(level.state.params, old))
        ]
        flat = lambda tree: np.concatenate([np.asarray(leaf).reshape(-1) for leaf in tree])
        kept, was = flat(jax.tree.leaves(level.mask)), flat(jax.tree.leaves(old))
        assert not np.any(kept & ~was)
        assert flat(weights)[kept].min() > flat(weights)[was & ~kept].max()
    inverted = imp.level(
        lambda s: s, start, start.mask, [40], score_fn=scores.inverted(scores.magnitude())
    )
    upright = imp.level(lambda s: s, start, start.mask, [99 - 40])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, ~b), inverted.mask, upright.mask)


def test_weights_that_are_not_finite_are_named() -> None:
    def explode(state: TrainState) -> TrainState:
        return state._replace(params=jax.tree.map(lambda leaf: leaf * jnp.inf, state.params))

    with pytest.raises(FloatingPointError, match="'a/kernel' are not finite"):
        imp.run(explode, _start(), np.array([[50]]))


@pytest.fixture(scope="module")
def network() -> models.Network:
    return initialization.build(RUN)


@pytest.fixture(scope="module")
def recipe(network: models.Network) -> Recipe:
    return programs.make_recipe(RUN)


Made = tuple[pathlib.Path, trees.Mask, dict[str, Any]]


@pytest.fixture(scope="module")
def made(network: models.Network, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Returns the folder, mask and row of a run that was left alone."""
    workdir = tmp_path_factory.mktemp("imp")
    return workdir, *levels.find_or_make_mask(RUN, network, Workdir(workdir), recipe)


def test_a_run_leaves_what_pruning_leaves(
    made: Made, network: models.Network, recipe: Recipe
) -> None:
    workdir, mask, row = made
    total = sum(trees.sizes(network.mask))
    counts = schedules.exponential([(total,)], 8.0, 3)[:, 0]
    assert row["kept"] == total - counts[-1]
    assert [level["kept"] for level in row["levels"]] == (total - counts).tolist()
    assert row["iterations"]["kept"] == (total - counts).tolist() and row["num_iterations"] == 3
    assert row["pruner"] == "imp" and row["rewind_step"] == 1 and row["ablation"] == "none"
    assert all(0 <= level["test_top1"] <= 1 for level in row["levels"])
    assert storage.mask_digest(mask) == row["mask_sha256"]
    assert from_dict(row["config"]).prune_id == row["run_id"]
    # A second call finds the mask without training, and the checkpoints of the levels are gone.
    again, found = levels.find_or_make_mask(
        RUN, network, Workdir(workdir), recipe, should_stop=lambda: pytest.fail("trains")
    )
    assert found == row and storage.mask_digest(again) == row["mask_sha256"]
    assert not (workdir / "checkpoints" / row["run_id"]).exists()
    rewind_path = Workdir(workdir).rewind_path(row["run_id"])
    rewind_path.rename(workdir / "away")
    assert masks_of_runs.find_mask(RUN, network, Workdir(workdir)) is None
    (workdir / "away").rename(rewind_path)


def test_training_goes_on_from_the_state_that_was_rewound_to(
    made: Made, network: models.Network, recipe: Recipe
) -> None:
    workdir, mask, _ = made
    dense = forms.choose(models.Network(*network[:5]), compact=False)
    compiled = programs.one(RUN, network.model, recipe, split=True)
    initial = starts.initial_state(RUN, recipe, dense)
    first, _ = compiled.advance(initial, training.init_info(2), 0, 1)
    form = starts.choose_form(RUN, network, mask)
    state = starts.first_state(RUN, recipe, form, Workdir(workdir))
    assert int(state.step) == 1 and _bits(state) == _bits(imp.rewind(first, mask))
    assert not form.compact

    row = engine.train(RUN, network, mask, Workdir(workdir))
    assert row["num_steps"] == 4 and row["kept"] == int(
        sum(jnp.sum(leaf) for leaf in jax.tree.leaves(mask))
    )
    restored = starts.restore_full(RUN, network, mask, Workdir(workdir))
    assert all(
        not np.any(np.asarray(weight)[~np.asarray(keep)])
        for weight, keep in zip(
            jax.tree.leaves(trees.select(restored.params, mask)), jax.tree.leaves(mask), strict=True
        )
    )


def test_the_state_comes_back_from_its_file_bit_for_bit(tmp_path: pathlib.Path) -> None:
    """Restores batch statistics, momentum and counts as well."""
    state = _start()
    starts.save_rewind(RUN, Workdir(tmp_path), state)
    blank = jax.tree.map(jnp.zeros_like, state._replace(key=None))._replace(
        key=state.key, mask=state.mask
    )
    assert _bits(starts.load_rewind(RUN, Workdir(tmp_path), blank)) == _bits(state)
    other = blank._replace(batch_stats={"norm": {"mean": jnp.zeros(8)}})
    with pytest.raises(ValueError, match=r"the state of another network\. --overwrite"):
        starts.load_rewind(RUN, Workdir(tmp_path), other)
    path = Workdir(tmp_path).rewind_path(RUN.prune_id)
    another = resolve_one(dataclasses.replace(SETTINGS, seed=1))
    shutil.copy(path, Workdir(tmp_path).rewind_path(another.prune_id))
    message = (
        rf"its run_id is '{RUN.prune_id}', and the run's is '{another.prune_id}'\. --overwrite"
    )
    with pytest.raises(ValueError, match=message):
        starts.load_rewind(another, Workdir(tmp_path), blank)
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(ValueError, match="sha256"):
        starts.load_rewind(RUN, Workdir(tmp_path), blank)


def test_a_stopped_run_ends_as_one_that_was_left_alone(
    made: Made, network: models.Network, recipe: Recipe, tmp_path: pathlib.Path
) -> None:
    asked = [0]

    def stop_at(number: int) -> bool:
        asked[0] += 1
        return asked[0] >= number  # as after a signal

    stops = 0
    # Stop before the state to rewind to, within levels and between them.
    for number in (1, 2, 4, 3, 99):
        asked[0] = 0
        try:
            _, row = levels.find_or_make_mask(
                RUN,
                network,
                Workdir(tmp_path),
                recipe,
                should_stop=functools.partial(stop_at, number),
            )
        except storage.Stopped:
            stops += 1
    assert stops >= 3
    strip = lambda row: {key: value for key, value in row.items() if key != "seconds"}
    assert strip(row) == strip(made[2])
    saved = [
        storage.load_arrays(Workdir(folder).rewind_path(row["run_id"]))
        for folder in (tmp_path, made[0])
    ]
    assert _bits(saved[0]) == _bits(saved[1]) and saved[0].keys() == saved[1].keys()


def test_damaged_levels_are_found(made: Made, network: models.Network, recipe: Recipe) -> None:
    workdir, _, row = made
    path = Workdir(workdir).level_mask_path(row["run_id"], 2)
    whole, mask_file = path.read_bytes(), Workdir(workdir).mask_path(row["run_id"])
    path.write_bytes(whole[:-3])
    mask_file.unlink()
    with pytest.raises(ValueError, match=r"is damaged: .*--overwrite"):
        levels.find_or_make_mask(RUN, network, Workdir(workdir), recipe)
    # The files of another level, and a mask of another run, fit as well.
    record = Workdir(workdir).level_path(row["run_id"], 2)
    own = record.read_bytes()
    shutil.copy(Workdir(workdir).level_path(row["run_id"], 1), record)
    shutil.copy(Workdir(workdir).level_mask_path(row["run_id"], 1), path)
    with pytest.raises(ValueError, match=r"its level is 1, and the run's is 2\. --overwrite"):
        levels.find_or_make_mask(RUN, network, Workdir(workdir), recipe)
    record.write_bytes(own)
    path.write_bytes(whole)
    mask = storage.load_mask(path)
    storage.save_mask(path, mask, {"run_id": "another", "level": 2})
    with pytest.raises(
        ValueError, match=r"its run_id is 'another', and the run's is .*--overwrite"
    ):
        levels.find_or_make_mask(RUN, network, Workdir(workdir), recipe)
    # The record is in the row of the run, so every entry of it must be the level's own.
    path.write_bytes(whole)
    values = json.loads(own)
    for edited, problem in (
        ({**values, "test_top1": 1.0}, "does not match its record_sha256"),
        ({**values, "seconds": "1"}, "seconds='1' is not a finite number"),
        ({"mask_sha256": values["mask_sha256"]}, "level is missing"),
        # A file of an earlier version has no digest.
        ({**values, "kept": 1, "record_sha256": None}, "does not belong to its mask"),
    ):
        record.write_text(json.dumps(edited))
        with pytest.raises(ValueError, match=f"{problem}.*--overwrite"):
            levels.find_or_make_mask(RUN, network, Workdir(workdir), recipe)
    record.write_bytes(own)
    # If all levels are intact, the mask is made from them without training.
    path.write_bytes(whole)
    _, again = levels.find_or_make_mask(
        RUN, network, Workdir(workdir), recipe, should_stop=lambda: pytest.fail("trains")
    )
    assert again["mask_sha256"] == row["mask_sha256"] and mask_file.exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # orbax warns
def test_a_sweep_takes_imp_together_with_other_rules(tmp_path: pathlib.Path) -> None:
    settings = dataclasses.replace(
        SETTINGS,
        prune=PruneConfig(compression=4.0, num_iterations=2),
        grid=Grid(pruner=("magnitude", "imp"), ablation=("none", "reinitialize")),
    )
    outcomes = engine.run(resolve(settings), Workdir(tmp_path))
    assert len(outcomes) == 4 and all(isinstance(outcome, Finished) for outcome in outcomes)
    rows = storage.read_rows(tmp_path / "rows.jsonl")
    masks = {
        (row["pruner"], row["ablation"]): row["mask_sha256"] for row in rows if "layers" in row
    }
    assert masks["imp", "none"] == masks["imp", "reinitialize"] != masks["magnitude", "none"]
    assert masks["magnitude", "none"] == masks["magnitude", "reinitialize"]
    trained = {row["params_sha256"] for row in rows if "curve" in row}
    assert len(trained) == 4


def test_a_run_id_holds_the_recipe_that_made_the_mask() -> None:
    with_train = lambda **values: dataclasses.replace(
        SETTINGS, train=dataclasses.replace(SETTINGS.train, **values)
    )
    assert resolve_one(with_train(learning_rate=0.1)).prune_id != resolve_one(SETTINGS).prune_id
    assert resolve_one(with_train(keep_checkpoints=1)).prune_id == resolve_one(SETTINGS).prune_id
    other = dataclasses.replace(
        SETTINGS, prune=dataclasses.replace(SETTINGS.prune, pruner="synflow", rewind_step=0)
    )
    changed = dataclasses.replace(other, train=with_train(learning_rate=0.1).train)
    assert resolve_one(other).prune_id == resolve_one(changed).prune_id
    # Without a given number, each level prunes a fifth of the weights.
    assert rules.num_iterations("imp", "exponential", 1 / 0.8**3) in (3, 4)
    assert rules.num_iterations("imp", "exponential", 10.0) == 11


BAD = {
    "rule": ({"pruner": "magnitude"}, "prune.rewind_step=1 .* 0 for every rule but 'imp'"),
    "reinitialize": ({"ablation": "reinitialize"}, "does not go with ablation='reinitialize'"),
    "nested": ({"nested": False}, "prune.nested=False does not go with 'imp'"),
    "negative": ({"rewind_step": -1}, "prune.rewind_step=-1 must not be negative"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_values(case: str) -> None:
    values, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        checks.check(
            dataclasses.replace(SETTINGS, prune=dataclasses.replace(SETTINGS.prune, **values))
        )


def test_what_is_refused_before_any_work(
    network: models.Network, recipe: Recipe, tmp_path: pathlib.Path
) -> None:
    late = dataclasses.replace(SETTINGS, prune=dataclasses.replace(SETTINGS.prune, rewind_step=4))
    with pytest.raises(
        ValueError, match="rewind_step=4 must be below 4, the steps of a training: 2 epochs of 2"
    ):
        levels.find_or_make_mask(resolve_one(late), network, Workdir(tmp_path), recipe)
    with pytest.raises(ValueError, match=r"prunes by training: python train\.py"):
        checks.check_prune(SETTINGS)
    compact = dataclasses.replace(SETTINGS, train=dataclasses.replace(SETTINGS.train, compact=True))
    with pytest.raises(ValueError, match=r"train\.compact=True does not go with prune.rewind_step"):
        checks.check_train(compact)
    assert not list(tmp_path.iterdir())
