"""One run of iterative magnitude pruning: from a config to a mask and a row in a folder, over many trainings.

It leaves what `prune_run` leaves, so that the masked network is then trained like any other. It can be stopped at any
moment: a level that is done is known by its files, and one that is not goes on from its last checkpoint.
"""

from __future__ import annotations

import functools
import json
import pathlib
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from synflow_jax import pruning, schedules, scores, storage, trees
from synflow_jax.experiments import config, prune_run, train_run
from synflow_jax.experiments.config import Config
from synflow_jax.experiments.prune_run import Network
from synflow_jax.experiments.train_run import Plan, Progress
from synflow_jax.storage import checkpoints
from synflow_jax.training import TrainState, forms, imp
from synflow_jax.training.forms import Form
from synflow_jax.trees import Mask

ProgressFn = Callable[
    [int, Progress], None
]  # (level from 1, or 0 for the steps before the state that is rewound to)


def find_or_make_mask(
    settings: Config,
    network: Network,
    workdir: pathlib.Path,
    plan: Plan | None = None,
    *,
    overwrite: bool = False,
    on_progress: ProgressFn | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[Mask, dict[str, Any]]:
    """The mask and the row of a run: those that `workdir` holds, or else made by training level after level.

    Every level trains the full, masked network by the config's recipe, and prunes by magnitude. (A compact one would
    leave the weights of dead units without decay, and they would rank otherwise.)

    Args:
      settings: with prune.pruner="imp", checked by `config.check` and `config.check_train`.
      network: from `prune_run.build`.
      workdir: the folder.
      plan: from `train_run.prepare`, which is called if it is not given.
      overwrite: begins anew.
      on_progress: called on the host as `train_run.train` does, with the level.
      should_stop: asked as often; True saves and raises `storage.Stopped`.

    Raises:
      ValueError: the data or a file of an earlier time cannot be used; says why.
      FloatingPointError: a loss or a weight is not finite.
      OSError: something cannot be written.
      storage.Stopped: see `should_stop`.
    """
    run_id = config.run_id(settings)
    if overwrite:
        shutil.rmtree(levels_path(workdir, run_id), ignore_errors=True)
        checkpoints.delete(train_run.checkpoint_path(workdir, run_id))
        prune_run.rewind_path(workdir, run_id).unlink(missing_ok=True)
    else:
        found = prune_run.find_mask(settings, network, workdir)
        if found is not None:
            return found
    plan = train_run.prepare(settings, network.input_shape) if plan is None else plan
    options = settings.prune
    if options.rewind_step >= plan.num_steps:
        raise ValueError(
            f"prune.rewind_step={options.rewind_step} must be below {plan.num_steps}, the steps of a training: "
            f"{settings.train.num_epochs} epochs of {plan.steps_per_epoch}."
        )
    form = forms.choose(*network[:3], network.mask, network.input_shape, compact=False)

    def train(number: int, plan: Plan, tested: dict[str, float], state: TrainState) -> TrainState:
        """Trains a level, from its last checkpoint if there is one; writes its last test into `tested`."""
        state, info, _, _ = train_run.train_from(
            settings, plan, form, state,
            folder=_checkpoint_path(workdir, run_id, number),
            run={"run_id": run_id, "level": number, "config": config.prune_dict(settings),
                 "mask_sha256": storage.mask_digest(state.mask)},
            curve=train_run.curve_path(workdir, f"{run_id}-level-{number}"),
            on_progress=None if on_progress is None else functools.partial(on_progress, number),
            should_stop=should_stop,
        )  # fmt: skip
        tested.update({name: float(info.curve[f"test_{name}"][-1]) for name in ("top1", "loss")})
        return state

    start = _start(settings, plan, form, workdir, lambda plan, state: train(0, plan, {}, state))
    schedule = config.SCHEDULES[options.schedule]
    if config.scope(options) == "local":
        schedule = schedules.per_layer(schedule)
    shapes = [leaf.shape for leaf in jax.tree.leaves(network.mask)]
    counts = schedule(shapes, options.compression, config.num_iterations(options))
    score_fn = scores.magnitude()
    rule = prune_run.Rule(score_fn, None)
    score_fn = scores.inverted(score_fn) if options.ablation == "invert" else score_fn
    mask, records = network.mask, []
    for number, row in enumerate(counts, 1):
        found_level = _read_level(workdir, run_id, number, network)
        if found_level is None:
            began = time.perf_counter()
            tested: dict[str, float] = {}
            level = imp.level(
                functools.partial(train, number, plan, tested), start, mask, row.tolist(),
                score_fn=score_fn,
            )  # fmt: skip
            record = _record(number, level, tested, time.perf_counter() - began)
            _write_level(workdir, run_id, level.mask, record)
            found_level = level.mask, record
        mask, record = found_level
        records.append(record)
    told = ("level", "kept", "compression", "test_top1", "test_loss")
    prune_run.write(
        settings, network, rule, mask, _info(records), workdir,
        started=time.perf_counter() - sum(record["seconds"] for record in records),
        more={"rewind_step": options.rewind_step,
              "levels": [{name: record[name] for name in told} for record in records]},
    )  # fmt: skip
    checkpoints.delete(train_run.checkpoint_path(workdir, run_id))
    made = prune_run.find_mask(settings, network, workdir)
    assert made is not None
    return made


def levels_path(workdir: pathlib.Path, run_id: str) -> pathlib.Path:
    """Where the masks of a run's levels lie, and what is said of them: level-1.safetensors, level-1.json and so on."""
    return workdir / "levels" / run_id


def _checkpoint_path(workdir: pathlib.Path, run_id: str, number: int) -> pathlib.Path:
    return train_run.checkpoint_path(workdir, run_id) / f"level-{number}"


def _start(
    settings: Config,
    plan: Plan,
    form: Form,
    workdir: pathlib.Path,
    train: Callable[[Plan, TrainState], TrainState],
) -> TrainState:
    """The state that every level starts from: at initialization, or after the first steps, which are trained here."""
    start = train_run.initial_state(settings, plan, form)
    step = settings.prune.rewind_step
    if not step:
        return start
    path = prune_run.rewind_path(workdir, config.run_id(settings))
    if not path.exists():
        state = train(plan._replace(num_steps=step), jax.tree.map(lambda leaf: leaf.copy(), start))
        train_run.save_rewind(settings, workdir, state)
        checkpoints.delete(_checkpoint_path(workdir, config.run_id(settings), 0))
    return train_run.load_rewind(settings, workdir, start)


def _record(
    number: int, level: imp.Level, tested: Mapping[str, float], seconds: float
) -> dict[str, Any]:
    kept = np.asarray(level.info.kept[0])
    total = sum(trees.sizes(level.mask))
    return {
        "level": number,
        "kept": int(kept.sum()),
        "compression": total / max(1, int(kept.sum())),
        "test_top1": tested["top1"],  # of the network that was trained, before this level pruned it
        "test_loss": tested["loss"],
        "layers": kept.tolist(),
        "score_total": np.asarray(level.info.score_total[0]).tolist(),
        "pruned_score": float(level.info.pruned_score[0]),
        "seconds": seconds,
    }


def _write_level(workdir: pathlib.Path, run_id: str, mask: Mask, record: Mapping[str, Any]) -> None:
    path = levels_path(workdir, run_id) / f"level-{record['level']}.json"
    digest = storage.save_mask(
        path.with_suffix(".safetensors"), mask, {"run_id": run_id, "level": record["level"]}
    )
    storage.write_json(
        path, {**record, "mask_sha256": digest}
    )  # last: it says that the level is done
    checkpoints.delete(_checkpoint_path(workdir, run_id, record["level"]))


def _read_level(
    workdir: pathlib.Path, run_id: str, number: int, network: Network
) -> tuple[Mask, dict[str, Any]] | None:
    path = levels_path(workdir, run_id) / f"level-{number}.json"
    if not path.exists():
        return None
    try:
        record = dict(json.loads(path.read_text()))
        mask = storage.load_mask(path.with_suffix(".safetensors"), network.params)
        whole = record["mask_sha256"] == storage.mask_digest(mask)
    except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
        raise ValueError(
            f"{str(path)!r} or the mask beside it is damaged: {error!r}. --overwrite runs it again."
        ) from error
    if not whole:
        raise ValueError(
            f"{str(path)!r} does not belong to the mask beside it. --overwrite runs it again."
        )
    return mask, record


def _info(records: Sequence[Mapping[str, Any]]) -> pruning.PruneInfo:
    """All levels as the iterations of one run."""
    unknown = jnp.full(len(records), jnp.nan, jnp.float32)
    column = lambda name, dtype: jnp.asarray([record[name] for record in records], dtype)
    return pruning.PruneInfo(
        num_done=jnp.int32(len(records)),
        kept=column("layers", jnp.int32),
        score_total=column("score_total", jnp.float32),
        pruned_score=column("pruned_score", jnp.float32),
        cut=unknown,
        exponent=jnp.zeros(len(records), jnp.int32),
    )
