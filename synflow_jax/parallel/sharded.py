"""Prunes one network over several devices, of one process or of many, to the mask of one device.

Mask, scores and the parameters between two iterations are spread over the devices. Each device
holds one part of every prunable leaf: the leaf is flattened, filled up to a multiple of the number
of devices, and cut. To score, the devices join the parameters (exact copies) and share the batches
of SNIP and GraSP (`batches`). Each keeps its part of the scores. The threshold is found by counts
that are added up (`masking.Exchange`), so no score leaves its device. Elements that only fill up an
array are above every threshold and are never kept.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from synflow_jax import arguments, pruning, schedules, trees
from synflow_jax.jaxprs.compiled import bounded_jit
from synflow_jax.jaxprs.precision import Precision
from synflow_jax.masking import Exchange
from synflow_jax.parallel import batches
from synflow_jax.pruning import ProgressFn, PruneInfo, PruneState
from synflow_jax.schedules import Schedule
from synflow_jax.scores import Rule, ScoreFn, as_rule
from synflow_jax.trees import Mask, Params, Scores, Tree

_AXIS = "devices"
_Split = tuple[bool, ...]  # for each leaf of a rule, whether it is split over the devices
_Shapes = tuple[tuple[int, ...], ...]  # the shapes of the prunable leaves


# On the host -------------------------------------------------------------------------------------


def prune(
    score_fn: ScoreFn,
    params: Params,
    *,
    compression: float,
    num_iterations: int | None = None,
    schedule: Schedule = schedules.exponential,
    key: chex.PRNGKey | None = None,
    mask: Mask | None = None,
    nested: bool = True,
    score_dtype: Any = None,
    on_progress: ProgressFn | None = None,
    devices: Sequence[jax.Device] | None = None,
    shard_params: bool = True,
) -> tuple[Mask, PruneInfo]:
    """Prunes over several devices: `pruning.prune` with the same arguments and an equal mask.

    If the devices belong to several processes (`hosts.join`), each process calls this with the same
    arguments. The loop is compiled once for all compressions, schedules, keys and batches.

    Args:
      score_fn: a rule of `synflow_jax.scores`. The batches of SNIP and GraSP are shared among the
        devices. A function that you wrote is computed in full on every device.
      params, compression, num_iterations, schedule, key, mask, nested, score_dtype, on_progress: as
        in `pruning.prune`.
      devices: by default all devices of all processes.
      shard_params: spreads the prunable parameters too, so that they are whole only while they are
        scored. False keeps them whole on each device and saves an exchange per iteration.

    Returns:
      The whole mask, on the first device of each process, and the info. The sums in the info agree
      with those of one device up to rounding, because they are added in another order.

    Raises:
      ValueError, FloatingPointError: as in `pruning.prune`. Also ValueError if `devices` has none
        of this process.
    """
    rule = as_rule(score_fn)
    mask = trees.default_mask(params) if mask is None else mask
    arguments.check_flag("shard_params", shard_params)
    pruning.check_options(nested=nested, on_progress=on_progress)
    pruning.check_request(rule, params, mask, compression, key)
    if num_iterations is None:
        num_iterations = pruning.usual_iterations(rule, compression)
    shapes = tuple(leaf.shape for leaf in jax.tree.leaves(mask))
    counts = pruning.schedule_counts(schedule, mask, compression, num_iterations, nested=nested)
    mesh = _mesh(devices)

    with pruning.scoring_dtype(score_dtype, params, mask) as precision:
        placed_rule, num_batches, split = _place_rule(mesh, rule)
        words, impl = _key_words(key)

        # The state: a part of the mask on each device, everything else whole on all of them.
        whole_state = pruning.init_state(mask, len(counts), precision.dtype)
        mask_parts = _pad_leaves(mask, mesh)
        placed_mask = _place(mesh, mask_parts, P(_AXIS))
        rest = _place(mesh, tuple(whole_state[1:]), P())
        state = PruneState(placed_mask, *rest)

        # The parameters. Those that cannot be pruned are whole on every device in any case.
        laid_out = params
        if shard_params:
            param_parts = _pad_leaves(trees.select(params, mask), mesh)
            laid_out = trees.merge(param_parts, params)
        param_specs = _params_specs(params, mask, shard_params)
        laid_out = _place(mesh, laid_out, param_specs)

        # Counts, key and numbers of batches are arguments, not constants of the program, so that
        # it is compiled only once.
        placed = (np.asarray(counts, np.int32), words, num_batches)
        placed_counts, words, num_batches = _place(mesh, placed, P())

        def run(state: PruneState, start: jax.Array, stop: jax.Array) -> PruneState:
            start, stop = _place(mesh, (start, stop), P())
            return _advance(
                placed_rule,
                laid_out,
                placed_counts,
                words,
                num_batches,
                state,
                start,
                stop,
                mesh=mesh,
                shapes=shapes,
                split=split,
                impl=impl,
                shard_params=shard_params,
                nested=nested,
                precision=precision,
            )

        def report(num_done: int, info: PruneInfo) -> None:
            if on_progress is not None:
                on_progress(num_done, _local(info))

        num_rows = len(state.info.kept)
        # Without a reporter the whole loop is one call.
        reporter = report if on_progress is not None else None
        state = pruning.run_in_stretches(run, state, num_rows, reporter)
        joined = _join_mask(state.mask, mesh=mesh, shapes=shapes)
        found = _local(state._replace(mask=joined))
        pruning.raise_unless_finite(found, rule, params)
    pruning.check_kept(found.info, counts, mask)
    return found.mask, found.info


def first_scores(
    score_fn: ScoreFn,
    params: Params,
    *,
    key: chex.PRNGKey | None = None,
    mask: Mask | None = None,
    score_dtype: Any = None,
    devices: Sequence[jax.Device] | None = None,
) -> Scores:
    """Computes `pruning.first_scores` over several devices, bit for bit.

    Returns:
      The whole scores, on the first device of each process.
    """
    rule = as_rule(score_fn)
    mask = trees.default_mask(params) if mask is None else mask
    pruning.check_network(params, mask, key)
    pruning.check_batches(rule, params)
    mesh = _mesh(devices)
    words, impl = _key_words(key)
    with pruning.scoring_dtype(score_dtype, params, mask) as precision:
        rule, num_batches, split = _place_rule(mesh, rule)
        on_host = (params, mask, words, num_batches)
        params, mask, words, num_batches = _place(mesh, on_host, P())
        found = _first_scores(
            rule,
            params,
            mask,
            words,
            num_batches,
            mesh=mesh,
            split=split,
            impl=impl,
            precision=precision,
        )
        return _local(found)


# On the devices ----------------------------------------------------------------------------------


@bounded_jit
def _advance(
    rule: Rule,
    params: Params,
    counts: jax.Array,
    words: jax.Array,
    num_batches: jax.Array | None,
    state: PruneState,
    start: chex.Numeric,
    stop: chex.Numeric,
    *,
    mesh: Mesh,
    shapes: _Shapes,
    split: _Split,
    impl: Any,
    shard_params: bool,
    nested: bool,
    precision: Precision,
) -> PruneState:
    """Computes `pruning.advance` on arrays that are spread over the mesh."""
    exchange = Exchange(
        sum=lambda value: jax.lax.psum(value, _AXIS),
        gather=_gather,
        num_parts=mesh.size,
    )

    def on_device(rule: Rule, params: Params, state: PruneState, *rest: Any) -> PruneState:
        counts, words, num_batches, start, stop = rest
        rule = pruning.in_precision(batches.whole_rule(rule, num_batches, _AXIS), precision)
        key = jax.random.wrap_key_data(words, impl=impl)

        def part(leaf: jax.Array) -> jax.Array:
            """Cuts this device's part out of a whole leaf."""
            index = jax.lax.axis_index(_AXIS)
            parts = _pad(jnp, leaf, mesh).reshape(mesh.size, -1)
            return parts[index]

        def flow_of_parts(params: Params, mask: Mask, key: chex.PRNGKey) -> Any:
            # Whole parameters exist only here, while they are scored.
            if shard_params:
                joined = _join(trees.select(params, mask), shapes)
                params = trees.merge(joined, params)
            whole_mask = _join(mask, shapes)
            flow = pruning.flow_of(rule, params, whole_mask, key, precision.dtype)
            score_parts = jax.tree.map(part, flow.scores)
            return flow._replace(scores=score_parts)

        # The elements that stand for weights; those that only fill up the arrays are False.
        ones = jax.tree.map(lambda like: jnp.ones(like.shape, bool), _like(state.mask, shapes))
        real = jax.tree.map(part, ones)
        propose = pruning.propose_smallest(counts, nested=nested, exchange=exchange, real=real)
        return pruning.advance(
            Rule(rule.score, flow=flow_of_parts),
            params,
            key,
            state,
            start,
            stop,
            propose,
            exchange=exchange,
        )

    state_specs: Any = PruneState(P(_AXIS), *[P()] * 3)  # type: ignore[arg-type]
    in_specs = (
        _rule_specs(rule, split),
        _params_specs(params, state.mask, shard_params),
        state_specs,
        *[P()] * 5,
    )
    # check_vma=False: each device computes its own gradient of a parameter that all devices hold.
    # JAX must not add these gradients up over the devices.
    run = jax.shard_map(
        on_device, mesh=mesh, in_specs=in_specs, out_specs=state_specs, check_vma=False
    )
    return run(rule, params, state, counts, words, num_batches, start, stop)


@bounded_jit
def _first_scores(
    rule: Rule,
    params: Params,
    mask: Mask,
    words: jax.Array,
    num_batches: jax.Array | None,
    *,
    mesh: Mesh,
    split: _Split,
    impl: Any,
    precision: Precision,
) -> Scores:
    """Computes the scores of the first iteration, whole on every device."""

    def on_device(
        rule: Rule,
        params: Params,
        mask: Mask,
        words: jax.Array,
        num_batches: jax.Array | None,
    ) -> Scores:
        rule = pruning.in_precision(batches.whole_rule(rule, num_batches, _AXIS), precision)
        key = jax.random.wrap_key_data(words, impl=impl)
        # The key and the precision of the first iteration of the loop.
        first_key = jax.random.fold_in(key, 0)
        with jax.default_matmul_precision("highest"):
            return rule(params, mask, first_key)

    in_specs = (_rule_specs(rule, split), P(), P(), P(), P())
    run = jax.shard_map(on_device, mesh=mesh, in_specs=in_specs, out_specs=P(), check_vma=False)
    return run(rule, params, mask, words, num_batches)


@bounded_jit
def _join_mask(mask: Mask, *, mesh: Mesh, shapes: _Shapes) -> Mask:
    """Joins the parts of a mask, whole on every device."""
    join = functools.partial(_join, shapes=shapes)
    run = jax.shard_map(join, mesh=mesh, in_specs=(P(_AXIS),), out_specs=P(), check_vma=False)
    return run(mask)


# Parts and whole arrays --------------------------------------------------------------------------


def _join(parts: Tree, shapes: _Shapes) -> Tree:
    """Joins the parts of every device to whole leaves."""

    def whole(part: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
        unpadded = _gather(part)[: like.size]
        return unpadded.reshape(like.shape)

    return jax.tree.map(whole, parts, _like(parts, shapes))


def _gather(part: jax.Array) -> jax.Array:
    """Joins the parts of every device along the first axis. A leaf may be empty."""
    # Of nothing XLA gathers nothing.
    return jax.lax.all_gather(part, _AXIS, tiled=True) if part.size else part


def _like(tree: Tree, shapes: _Shapes) -> Tree:
    """Returns the shapes of whole leaves, with the structure of a tree of their parts."""
    structs = [jax.ShapeDtypeStruct(shape, jnp.bool_) for shape in shapes]
    structure = jax.tree.structure(tree)
    return jax.tree.unflatten(structure, structs)


def _pad(xp: Any, leaf: Any, mesh: Mesh) -> Any:
    """Flattens a leaf and fills it up with zeros to a multiple of the number of devices.

    Args:
      xp: `numpy` on the host, `jax.numpy` in a compiled function.
      leaf: an array of any shape.
      mesh: the devices.
    """
    flat = leaf.reshape(-1)
    num_missing = -leaf.size % mesh.size
    return xp.pad(flat, (0, num_missing))


def _pad_leaves(tree: Tree, mesh: Mesh) -> Tree:
    """Flattens and fills up the leaves of a tree on the host."""
    return jax.tree.map(lambda leaf: _pad(np, np.asarray(leaf), mesh), tree)


# Placement ---------------------------------------------------------------------------------------


def _params_specs(params: Params, mask: Mask, shard_params: bool) -> Tree:
    """Returns how each parameter is placed: in parts if it can be pruned, else whole."""
    whole = jax.tree.map(lambda _: P(), params)
    if not shard_params:
        return whole
    in_parts = jax.tree.map(lambda _: P(_AXIS), mask)
    return trees.merge(in_parts, whole)


def _rule_specs(rule: Rule, split: _Split) -> Tree:
    """Returns how each leaf of a rule is placed: dealt batches by their second axis, else whole."""
    specs = [P(None, _AXIS) if is_split else P() for is_split in split]
    structure = jax.tree.structure(rule)
    return jax.tree.unflatten(structure, specs)


def _place_rule(mesh: Mesh, rule: Rule) -> tuple[Rule, Any, _Split]:
    """Deals out the batches of a rule and places it on the mesh; see `batches.deal`."""
    rule, num_batches, split_tree = batches.deal(rule, mesh.size)
    split = tuple(jax.tree.leaves(split_tree))
    specs = _rule_specs(rule, split)
    return _place(mesh, rule, specs), num_batches, split


def _place(mesh: Mesh, tree: Tree, specs: Tree) -> Tree:
    """Places arrays on the devices of the mesh. Every process must pass equal arrays."""

    def place(spec: P, leaf: Any) -> jax.Array:
        dtype = getattr(leaf, "dtype", None)
        if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
            # A key among the parameters, as of dropout in NNX. NumPy knows only its words.
            words = place(spec, jax.random.key_data(leaf))
            return jax.random.wrap_key_data(words, impl=jax.random.key_impl(leaf))
        host = np.asarray(leaf)
        sharding = NamedSharding(mesh, spec)
        # Each process fills only its own devices. `jax.device_put` would compare the arrays of all
        # processes first.
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    if isinstance(specs, P):
        one_spec = specs
        specs = jax.tree.map(lambda _: one_spec, tree)
    # These transfers are meant, also under jax_transfer_guard="disallow".
    with jax.transfer_guard_host_to_device("allow"):
        return jax.tree.map(place, specs, tree)


def _local(tree: Tree) -> Tree:
    """Takes arrays that are whole on every device from the first device of this process."""
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)


def _key_words(key: chex.PRNGKey | None) -> tuple[Any, Any]:
    """Splits a key into an array of words, which any sharding takes, and its implementation."""
    key = pruning.default_key() if key is None else key
    # Old-style keys are words already.
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    return jax.random.key_data(key), jax.random.key_impl(key)


def _mesh(devices: Sequence[jax.Device] | None) -> Mesh:
    """Returns the mesh of the given devices, by default of all."""
    devices = jax.devices() if devices is None else devices
    index = jax.process_index()
    processes = {device.process_index for device in devices}
    # A process without a device could not read the mask.
    if index not in processes:
        raise ValueError(
            f"devices has none of process {index}. Name some of its jax.local_devices(), or let "
            "only the other processes prune."
        )
    return Mesh(np.array(devices), (_AXIS,))
