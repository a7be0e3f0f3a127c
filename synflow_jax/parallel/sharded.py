"""Prunes one network over several devices, of one process or of many, to the mask of one device.

Mask, scores and the parameters at rest are spread over the devices. Each device holds one part of
every prunable leaf: the leaf is flattened, filled up to a multiple of the number of devices, and
cut. To score, the devices join the parameters (exact copies), share the batches of SNIP and GraSP
(`batches`), and keep their parts of the scores. The threshold is found by counts that are added up
(`masking.Exchange`), so no score leaves its device. Elements that only fill up an array are above
every threshold and are never kept.
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

from synflow_jax import pruning, schedules, trees
from synflow_jax.masking import Exchange
from synflow_jax.parallel import batches
from synflow_jax.pruning import ProgressFn, PruneInfo, PruneState
from synflow_jax.schedules import Schedule
from synflow_jax.scores import Rule, ScoreFn, as_rule
from synflow_jax.trees import Mask, Params, Scores, Tree

_AXIS = "devices"
_Split = tuple[bool, ...]  # per leaf of a rule, whether it is split over the devices
_Shapes = tuple[tuple[int, ...], ...]  # of the prunable leaves


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

    Where the devices belong to several processes (`hosts.join`), each process calls this with the
    same arguments. The loop is compiled once for all compressions, schedules, keys and batches.

    Args:
      score_fn: a rule of `synflow_jax.scores`. SNIP and GraSP share their batches among the
        devices. Every device computes a function of your own.
      params, compression, num_iterations, schedule, key, mask, nested, score_dtype, on_progress: as
        in `pruning.prune`.
      devices: by default all devices of all processes.
      shard_params: spreads the prunable parameters too, so that they are whole only while they are
        scored. False keeps them whole on each device and saves an exchange per iteration.

    Returns:
      The whole mask, on the first device of each process, and the info. The sums of the info agree
      with those of one device up to rounding: they are added in another order.

    Raises:
      ValueError, FloatingPointError: as in `pruning.prune`; or this process has no device.
    """
    rule = as_rule(score_fn)
    mask = trees.prunable(params) if mask is None else mask
    pruning.check_request(params, mask, compression)
    if num_iterations is None:
        num_iterations = pruning.usual_iterations(rule, compression)
    shapes = tuple(leaf.shape for leaf in jax.tree.leaves(mask))
    counts = schedule(shapes, compression, num_iterations)
    counts = schedules.check_counts(counts, trees.sizes(mask))
    mesh = _mesh(devices)

    with pruning.scoring_dtype(score_dtype, params, mask) as cast:
        rule, params = cast((rule, params))
        placed_rule, num_batches, split = _place_rule(mesh, rule)
        words, impl = _key_words(key)
        state = pruning.init_state(mask, len(counts), pruning.score_type(params, mask))
        mask_parts = _pad_leaves(mask, mesh)
        param_parts = _pad_leaves(trees.select(params, mask), mesh)
        state = PruneState(_place(mesh, mask_parts, P(_AXIS)), *_place(mesh, tuple(state[1:]), P()))
        laid_out = trees.merge(param_parts, params) if shard_params else params
        laid_out = _place(mesh, laid_out, _params_specs(params, mask, shard_params))
        counts = np.asarray(counts, np.int32)
        counts, words, num_batches = _place(mesh, (counts, words, num_batches), P())

        def run(state: PruneState, start: int, stop: int) -> PruneState:
            return _advance(
                placed_rule,
                laid_out,
                counts,
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
            )

        def report(num_done: int, info: PruneInfo) -> None:
            if on_progress is not None:
                on_progress(num_done, _local(info))

        num_rows = len(state.info.kept)
        reporter = report if on_progress is not None else None
        state = pruning.run_in_stretches(run, state, num_rows, reporter)
        whole_mask = _local(_join_mask(state.mask, mesh=mesh, shapes=shapes))
        info = _local(state.info)
        found = PruneState(whole_mask, info, _local(state.finite), _local(state.done))
        pruning.raise_unless_finite(found, rule, params)
    return whole_mask, info


def first_scores(
    score_fn: ScoreFn,
    params: Params,
    *,
    key: chex.PRNGKey | None = None,
    mask: Mask | None = None,
    score_dtype: Any = None,
    devices: Sequence[jax.Device] | None = None,
) -> Scores:
    """Scores over several devices: `pruning.first_scores`, equal in every bit.

    Returns:
      The whole scores, on the first device of each process.
    """
    mask = trees.prunable(params) if mask is None else mask
    trees.check_mask(mask, params)
    mesh = _mesh(devices)
    words, impl = _key_words(key)
    with pruning.scoring_dtype(score_dtype, params, mask) as cast:
        rule, params = cast((as_rule(score_fn), params))
        rule, num_batches, split = _place_rule(mesh, rule)
        params, mask, words, num_batches = _place(mesh, (params, mask, words, num_batches), P())
        found = _first_scores(
            rule, params, mask, words, num_batches, mesh=mesh, split=split, impl=impl
        )
        return _local(found)


# On the devices ----------------------------------------------------------------------------------


@functools.partial(
    jax.jit, static_argnames=("mesh", "shapes", "split", "impl", "shard_params", "nested")
)
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
) -> PruneState:
    """Runs `pruning.advance` on arrays that are spread over the mesh."""
    dtype = state.info.score_total.dtype
    exchange = Exchange(
        sum=lambda value: jax.lax.psum(value, _AXIS),
        gather=lambda array: jax.lax.all_gather(array, _AXIS, tiled=True),
        num_parts=mesh.size,
    )

    def on_device(rule: Rule, params: Params, state: PruneState, *rest: Any) -> PruneState:
        counts, words, num_batches, start, stop = rest
        rule = batches.whole_rule(rule, num_batches, _AXIS)

        def part(leaf: jax.Array) -> jax.Array:
            """Cuts this device's part out of a whole leaf."""
            parts = _pad(jnp, leaf, mesh).reshape(mesh.size, -1)
            return parts[jax.lax.axis_index(_AXIS)]

        def flow_of_parts(params: Params, mask: Mask, key: chex.PRNGKey) -> Any:
            if shard_params:
                params = trees.merge(_join(trees.select(params, mask), shapes), params)
            flow = pruning.flow_of(rule, params, _join(mask, shapes), key, dtype)
            return flow._replace(scores=jax.tree.map(part, flow.scores))

        ones = jax.tree.map(lambda like: jnp.ones(like.shape, bool), _like(state.mask, shapes))
        propose = pruning.propose_smallest(
            counts, nested=nested, exchange=exchange, real=jax.tree.map(part, ones)
        )
        return pruning.advance(
            Rule(rule.score, flow=flow_of_parts),
            params,
            jax.random.wrap_key_data(words, impl=impl),
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
    # check_vma=False: the gradient of a replicated parameter belongs to this device alone, and JAX
    # must not add it up over the devices.
    run = jax.shard_map(
        on_device, mesh=mesh, in_specs=in_specs, out_specs=state_specs, check_vma=False
    )
    return run(rule, params, state, counts, words, num_batches, start, stop)


@functools.partial(jax.jit, static_argnames=("mesh", "split", "impl"))
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
) -> Scores:
    def on_device(
        rule: Rule,
        params: Params,
        mask: Mask,
        words: jax.Array,
        num_batches: jax.Array | None,
    ) -> Scores:
        rule = batches.whole_rule(rule, num_batches, _AXIS)
        key = jax.random.wrap_key_data(words, impl=impl)
        with jax.default_matmul_precision("highest"):
            return rule(params, mask, jax.random.fold_in(key, 0))

    in_specs = (_rule_specs(rule, split), P(), P(), P(), P())
    run = jax.shard_map(on_device, mesh=mesh, in_specs=in_specs, out_specs=P(), check_vma=False)
    return run(rule, params, mask, words, num_batches)


@functools.partial(jax.jit, static_argnames=("mesh", "shapes"))
def _join_mask(mask: Mask, *, mesh: Mesh, shapes: _Shapes) -> Mask:
    join = functools.partial(_join, shapes=shapes)
    run = jax.shard_map(join, mesh=mesh, in_specs=(P(_AXIS),), out_specs=P(), check_vma=False)
    return run(mask)


# Parts and whole arrays --------------------------------------------------------------------------


def _join(parts: Tree, shapes: _Shapes) -> Tree:
    """Joins the parts of every device to whole leaves."""

    def whole(part: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
        joined = jax.lax.all_gather(part, _AXIS, tiled=True)
        return joined[: like.size].reshape(like.shape)

    return jax.tree.map(whole, parts, _like(parts, shapes))


def _like(tree: Tree, shapes: _Shapes) -> Tree:
    structs = [jax.ShapeDtypeStruct(shape, jnp.bool_) for shape in shapes]
    return jax.tree.unflatten(jax.tree.structure(tree), structs)


def _pad(xp: Any, leaf: Any, mesh: Mesh) -> Any:
    """Flattens a leaf and fills it up with zeros to a multiple of the number of devices."""
    return xp.pad(leaf.reshape(-1), (0, -leaf.size % mesh.size))


def _pad_leaves(tree: Tree, mesh: Mesh) -> Tree:
    return jax.tree.map(lambda leaf: _pad(np, np.asarray(leaf), mesh), tree)


# Placement ---------------------------------------------------------------------------------------


def _params_specs(params: Params, mask: Mask, shard_params: bool) -> Tree:
    whole = jax.tree.map(lambda _: P(), params)
    if not shard_params:
        return whole
    return trees.merge(jax.tree.map(lambda _: P(_AXIS), mask), whole)


def _rule_specs(rule: Rule, split: _Split) -> Tree:
    specs = [P(None, _AXIS) if is_split else P() for is_split in split]
    return jax.tree.unflatten(jax.tree.structure(rule), specs)


def _place_rule(mesh: Mesh, rule: Rule) -> tuple[Rule, Any, _Split]:
    """Deals out the batches of a rule and places it on the mesh; see `batches.deal`."""
    rule, num_batches, split_tree = batches.deal(rule, mesh.size)
    split = tuple(jax.tree.leaves(split_tree))
    return _place(mesh, rule, _rule_specs(rule, split)), num_batches, split


def _place(mesh: Mesh, tree: Tree, specs: Tree) -> Tree:
    """Places arrays that all processes have alike on the devices of the mesh."""

    def place(spec: P, leaf: Any) -> jax.Array:
        host = np.asarray(leaf)
        sharding = NamedSharding(mesh, spec)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    if isinstance(specs, P):
        spec = specs
        specs = jax.tree.map(lambda _: spec, tree)
    return jax.tree.map(place, specs, tree)


def _local(tree: Tree) -> Tree:
    """Takes arrays that are whole on every device from the first device of this process."""
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)


def _key_words(key: chex.PRNGKey | None) -> tuple[Any, Any]:
    """Splits a key into an array of words, which any sharding takes, and its implementation."""
    key = jax.random.key(0) if key is None else key
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    return jax.random.key_data(key), jax.random.key_impl(key)


def _mesh(devices: Sequence[jax.Device] | None) -> Mesh:
    devices = jax.devices() if devices is None else devices
    index = jax.process_index()
    if index not in {device.process_index for device in devices}:
        raise ValueError(
            f"devices has none of process {index}. Name some of its jax.local_devices(), or let "
            "only the other processes prune."
        )
    return Mesh(np.array(devices), (_AXIS,))
