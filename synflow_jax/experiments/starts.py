"""Makes the state that a training run starts from, and finds the state that it ended with.

A run starts from initialization, or from the state that IMP rewinds to, which a file holds. It
trains the masked network or its compact form.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from synflow_jax import storage, training
from synflow_jax.experiments import initialization, programs, recorded
from synflow_jax.experiments.loop import Job
from synflow_jax.experiments.programs import Recipe
from synflow_jax.experiments.results import digest
from synflow_jax.experiments.run import Run
from synflow_jax.models import Network
from synflow_jax.storage import Workdir, checkpoints
from synflow_jax.training import TrainState, forms, imp
from synflow_jax.training.forms import Form
from synflow_jax.trees import Mask
from synflow_jax.units import compaction


def make_job(run: Run, mask: Mask, form: Form, recipe: Recipe, workdir: Workdir) -> Job:
    """Describes the training of a pruned network to the loop.

    Args:
      run: its config and names.
      mask: of the full network.
      form: from `choose_form`.
      recipe: from `programs.make_recipe`.
      workdir: the folder.
    """
    return Job(
        run=run,
        form=form,
        first_state=lambda: first_state(run, recipe, form, workdir),
        folder=workdir.checkpoint_path(run.train_id),
        description=describe(run, mask, form),
        curve=workdir.curve_path(run.train_id),
    )


def choose_form(run: Run, network: Network, mask: Mask) -> Form:
    """Chooses by `train.compact` between the masked network and its compact form.

    A rewound network is trained masked: its biases have moved, so that leaving out a unit would
    change the function.

    Args:
      run: its config and names.
      network: from `initialization.build`, the one that was pruned.
      mask: of that network.

    Raises:
      ValueError: train.compact is True, and the network has collapsed.
    """
    options = run.config.train
    masked = _trained(run, network, mask)
    if run.config.prune.rewind_step:
        return forms.choose(masked, compact=False)._replace(reason=forms.Reason.REWOUND)
    return forms.choose(masked, options.compact, own_optimizer=options.make_optimizer is not None)


def _trained(run: Run, network: Network, mask: Mask) -> Network:
    """Returns the network that training begins from, with its mask."""
    return initialization.for_training(run, network)._replace(mask=mask)


def describe(run: Run, mask: Mask, form: Form) -> dict[str, Any]:
    """Describes a run, for its checkpoints."""
    return {
        "run_id": run.train_id,
        "config": run.train_dict,
        "mask_sha256": digest(mask),
        "compact": form.compact,
        "size": form.size,
    }


def first_state(run: Run, recipe: Recipe, form: Form, workdir: Workdir) -> TrainState:
    """Returns the state before the first step: at initialization, or the one that IMP rewinds to.

    Raises:
      ValueError: the file of the rewind state is damaged.
      FileNotFoundError: that file is missing.
    """
    initial = initial_state(run, recipe, form)
    if not run.config.prune.rewind_step:
        return initial
    return load_rewind(run, workdir, initial)


def initial_state(run: Run, recipe: Recipe, form: Form) -> TrainState:
    """Returns the state of a network that was just initialized."""
    network = form.network
    arrays = (network.params, network.batch_stats, network.mask)
    # Copies, since training reuses the memory of the state that it is given.
    params, batch_stats, mask = jax.tree.map(jnp.copy, arrays)
    return training.init_state(params, batch_stats, mask, recipe.optimizer, run.train_key)


def save_rewind(run: Run, workdir: Workdir, state: TrainState) -> None:
    """Writes the state that IMP rewinds to, without the key and the mask.

    The key follows from the config, and the mask from its own file.
    """
    flat = checkpoints.flatten(_without_key_and_mask(state))
    arrays = {name: np.asarray(leaf) for name, leaf in flat.items()}
    metadata = {"run_id": run.prune_id, "config": run.prune_dict}
    storage.save_arrays(workdir.rewind_path(run.prune_id), arrays, metadata)


def load_rewind(run: Run, workdir: Workdir, initial: TrainState) -> TrainState:
    """Reads the state that IMP rewinds to, under the mask and with the key of `initial`.

    Raises:
      ValueError: the file is damaged or belongs to another network.
      FileNotFoundError: there is none.
    """
    path = workdir.rewind_path(run.prune_id)
    wanted = {"run_id": run.prune_id}
    recorded.check_run(path, "state file", wanted, "--overwrite begins anew.")
    arrays = storage.load_arrays(path)
    like = _without_key_and_mask(initial)
    expected = checkpoints.flatten(like)
    if _layout(arrays) != _layout(expected):
        raise ValueError(f"{str(path)!r} is the state of another network. --overwrite begins anew.")
    state = checkpoints.unflatten(arrays, like)._replace(key=initial.key)
    # The file is of the unpruned network: `rewind` sets what is pruned since to 0.
    return imp.rewind(state, initial.mask)


def _without_key_and_mask(state: TrainState) -> Any:
    hole: Any = None
    return state._replace(key=hole, mask=hole)


def _layout(arrays: dict[str, Any]) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    on_host = {name: np.asarray(leaf) for name, leaf in arrays.items()}
    return {name: (array.shape, array.dtype) for name, array in on_host.items()}


def restore_full(run: Run, network: Network, mask: Mask, workdir: Workdir) -> TrainState:
    """Restores the last checkpoint of a run as the state of the full, masked network.

    It does so whichever form was trained. After a compact training, weights outside of the compact
    network are as they were initialized and their momentum is 0, which no output sees. Training can
    continue from this state.

        (run,) = resolve(config)
        network = initialization.build(run)
        mask, _ = masks.find_mask(run, network, workdir)
        state = starts.restore_full(run, network, mask, workdir)
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        logits = network.model.apply(variables, images)

    Args:
      run: its config and names.
      network: from `initialization.build`.
      mask: of the full network, from `masks.find_mask`.
      workdir: the folder of the run.

    Raises:
      ValueError: there is no checkpoint; or it is damaged, belongs to another run or is older than
        the row of the run.
    """
    recipe = programs.make_recipe(run)
    full = _trained(run, network, mask)
    masked = forms.choose(full, compact=False)
    # Not the form that the config would choose now: an earlier command may have had another flag.
    saved = _saved_description(run, workdir)
    form = forms.choose(full, compact=True) if saved.get("compact") else masked
    options = run.config.train
    info = training.init_info(options.num_epochs)
    like = first_state(run, recipe, form, workdir), info
    path = workdir.checkpoint_path(run.train_id)
    # A form that was chosen by speed knows the size of its compact network, which this one may not.
    description = describe(run, mask, form) | {"size": saved.get("size")}
    with checkpoints.open_folder(path, description, None) as folder:
        restored = checkpoints.restore_latest(folder, like)
    assert restored is not None, "its description was read above"
    _, (state, _) = restored
    row = workdir.find_row(run.train_id)
    # A run that is still in training has no row, and its newest checkpoint is what is asked for.
    if row is not None:
        found = {"num_steps": int(state.step), "params_sha256": digest(state.params)}
        recorded.check_checkpoint(found, row, workdir)
    if form.plan is None:
        return state
    # Weights that the compact network leaves out are as they were before the first step.
    rest = first_state(run, recipe, masked, workdir)
    expanded: TrainState = compaction.expand_tree(form.plan, state, rest)
    return expanded


def _saved_description(run: Run, workdir: Workdir) -> dict[str, Any]:
    """Returns the description of the run in its newest checkpoint.

    Raises:
      ValueError: there is no checkpoint, or it is damaged.
    """
    path = workdir.checkpoint_path(run.train_id)
    found = None
    if path.is_dir():
        with checkpoints.open_folder(path, {}, None) as folder:
            found = checkpoints.latest_run(folder)
    if found is None:
        raise ValueError(
            f"{str(path)!r} holds no checkpoint of this run: train it first, by train.py."
        )
    return found
