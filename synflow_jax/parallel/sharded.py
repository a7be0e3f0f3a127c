"""One network pruned over several devices, of one process or of many: the same mask to the last bit.

Mask and scores, and the parameters at rest, are spread over the devices: each holds one part of every prunable leaf,
flattened, filled up to a multiple of the number of devices and cut. To score, the devices put the parameters together
(exact copies), take the batches of SNIP and GraSP in turns (`scores.over_devices`), and keep their parts of the scores.
The threshold is found by counts that are added up (`masking`), so that no score leaves its device. What is filled up is
above every threshold, and never kept.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from synflow_jax import pruning, schedules, scores, trees
from synflow_jax.pruning import ProgressFn, PruneInfo, PruneState
from synflow_jax.scores import Flow, ScoreFn
from synflow_jax.trees import Mask, Params, Scores, Tree

_AXIS = "devices"
_Split = tuple[bool, ...]  # which leaves of a score function are split over the devices
_Shapes = tuple[tuple[int, ...], ...]  # of the prunable leaves


def prune(
    score_fn: ScoreFn,
    params: Params,
    *,
    compression: float,
    num_iterations: int = 100,
    schedule: str = "exponential",
    scope: str = "global",
    key: chex.PRNGKey | None = None,
    mask: Mask | None = None,
    nested: bool = True,
    score_dtype: Any = None,
    on_progress: ProgressFn | None = None,
    devices: Sequence[jax.Device] | None = None,
    shard_params: bool = True,
) -> tuple[Mask, PruneInfo]:
    """`pruning.prune` over several devices: the same arguments, and a mask that is equal to its in every bit.

    Where the devices are those of several processes (`hosts.join`), each of them calls this with the same arguments.
    Compiled once for all compressions, schedules, keys and batches of one `score_fn`, as there.

    Args:
      score_fn: a rule of `synflow_jax.scores`; SNIP and GraSP share their batches among the devices. A function of the
        user's own is computed by every device.
      params, compression, num_iterations, schedule, scope, key, mask, nested, score_dtype, on_progress: as
        `pruning.prune` takes them, the schedule "certified" excepted, which ranks no batches and adds up scores.
      devices: all of all processes by default.
      shard_params: the prunable parameters are spread too, and whole only while they are scored. False keeps them whole
        on each device, which saves an exchange in each iteration.

    Returns:
      The whole mask, on the first device of each process, and the info, whose sums agree with those of one device up to
      rounding: they are added in another order.

    Raises:
      ValueError, FloatingPointError: as `pruning.prune`; this process has none of the devices.
    """
    mask = trees.prunable(params) if mask is None else mask
    pruning.check_request(params, mask, compression, scope)
    if schedule == schedules.CERTIFIED:
        raise ValueError(
            "schedule='certified' is not pruned over several devices: SynFlow shares no batches, and its budget is a "
            "sum of scores, not a count. Use pruning.prune, or choose 'exponential' or 'linear'."
        )
    sizes = trees.sizes(mask)
    host_counts = schedules.prune_counts(
        [sum(sizes)] if scope == "global" else sizes, compression, num_iterations, schedule
    )
    mesh = _mesh(devices)
    key, impl = _words(key)
    shapes = tuple(leaf.shape for leaf in jax.tree.leaves(mask))
    with (
        jax.enable_x64(True)
        if pruning.is_wide(score_dtype, params, mask)
        else contextlib.nullcontext()
    ):
        rule, params = _widened(score_fn, params, score_dtype, mask)
        placed_rule, split = _share(mesh, rule)
        state = pruning.init_state(mask, num_iterations, pruning.score_type(params, mask))
        parts = jax.tree.map(
            lambda leaf: _parts(np, np.asarray(leaf), mesh), (mask, trees.select(params, mask))
        )
        state = PruneState(_place(mesh, parts[0], P(_AXIS)), *_place(mesh, tuple(state[1:]), P()))
        laid_out = trees.merge(parts[1], params) if shard_params else params
        laid_out = _place(mesh, laid_out, _params_specs(params, mask, shard_params))
        counts, key = _place(mesh, (np.asarray(host_counts, np.int32), key), P())
        for start, stop in pruning.stretches(num_iterations, False, on_progress is not None):
            state = _advance(
                placed_rule, laid_out, counts, key, state, start, stop,
                mesh=mesh, shapes=shapes, split=split, impl=impl, spread=shard_params, scope=scope, nested=nested,
            )  # fmt: skip
            info = _local(state.info)
            if not bool(_local(state.finite)):
                pruning.check_finite(info, mask, scores.unscaled(rule, params))
            if on_progress is not None:
                on_progress(int(info.num_done), info)
        return _local(_put_together(state.mask, mesh=mesh, shapes=shapes)), info


def first_scores(
    score_fn: ScoreFn,
    params: Params,
    *,
    key: chex.PRNGKey | None = None,
    mask: Mask | None = None,
    score_dtype: Any = None,
    devices: Sequence[jax.Device] | None = None,
) -> Scores:
    """`pruning.first_scores` over several devices: equal in every bit, whole, on the first device of each process."""
    mask = trees.prunable(params) if mask is None else mask
    trees.check_mask(mask, params)
    mesh = _mesh(devices)
    key, impl = _words(key)
    with (
        jax.enable_x64(True)
        if pruning.is_wide(score_dtype, params, mask)
        else contextlib.nullcontext()
    ):
        score_fn, params = _widened(score_fn, params, score_dtype, mask)
        score_fn, split = _share(mesh, score_fn)
        params, mask, key = _place(mesh, (params, mask, key), P())
        return _local(_first_scores(score_fn, params, mask, key, mesh=mesh, split=split, impl=impl))


@functools.partial(
    jax.jit, static_argnames=("mesh", "shapes", "split", "impl", "spread", "scope", "nested")
)
def _advance(
    score_fn: ScoreFn,
    params: Params,
    counts: jax.Array,
    words: jax.Array,
    state: PruneState,
    start: chex.Numeric,
    stop: chex.Numeric,
    *,
    mesh: Mesh,
    shapes: _Shapes,
    split: _Split,
    impl: Any,
    spread: bool,
    scope: str,
    nested: bool,
) -> PruneState:
    """`pruning.advance` for arrays that lie on the mesh."""
    dtype = state.info.score_total.dtype

    def on_device(score_fn: ScoreFn, params: Params, state: PruneState, *rest: Any) -> PruneState:
        counts, words, start, stop = rest

        def score(params: Params, mask: Mask, key: jax.Array) -> Flow:
            if spread:
                params = trees.merge(_gather(trees.select(params, mask), shapes), params)
            flow = pruning.flow_of(score_fn, params, _gather(mask, shapes), key, dtype)
            return flow._replace(scores=jax.tree.map(part, flow.scores))

        def part(leaf: jax.Array) -> jax.Array:
            """What of a whole leaf is this device's."""
            return _parts(jnp, leaf, mesh).reshape(mesh.size, -1)[jax.lax.axis_index(_AXIS)]

        real = jax.tree.map(
            lambda like: part(jnp.ones(like.shape, bool)), _like(state.mask, shapes)
        )
        return pruning.advance(
            score, params, counts, jax.random.wrap_key_data(words, impl=impl), state, start, stop,
            scope=scope, nested=nested, axis_name=_AXIS, real=real,
        )  # fmt: skip

    state_specs: Any = PruneState(P(_AXIS), *[P()] * 3)  # type: ignore[arg-type]
    in_specs = (
        _specs(score_fn, split),
        _params_specs(params, state.mask, spread),
        state_specs,
        P(),
        P(),
        P(),
        P(),
    )
    # check_vma=False: a gradient of a replicated parameter is this device's own, and is not added up by JAX.
    run = jax.shard_map(
        on_device, mesh=mesh, in_specs=in_specs, out_specs=state_specs, check_vma=False
    )
    return run(score_fn, params, state, counts, words, start, stop)


@functools.partial(jax.jit, static_argnames=("mesh", "split", "impl"))
def _first_scores(
    score_fn: ScoreFn,
    params: Params,
    mask: Mask,
    words: jax.Array,
    *,
    mesh: Mesh,
    split: _Split,
    impl: Any,
) -> Scores:
    def on_device(score_fn: ScoreFn, params: Params, mask: Mask, words: jax.Array) -> Scores:
        with jax.default_matmul_precision("highest"):
            return score_fn(
                params, mask, jax.random.fold_in(jax.random.wrap_key_data(words, impl=impl), 0)
            )

    in_specs = (_specs(score_fn, split), P(), P(), P())
    run = jax.shard_map(on_device, mesh=mesh, in_specs=in_specs, out_specs=P(), check_vma=False)
    return run(score_fn, params, mask, words)


@functools.partial(jax.jit, static_argnames=("mesh", "shapes"))
def _put_together(mask: Mask, *, mesh: Mesh, shapes: _Shapes) -> Mask:
    on_device = functools.partial(_gather, shapes=shapes)
    return jax.shard_map(
        on_device, mesh=mesh, in_specs=(P(_AXIS),), out_specs=P(), check_vma=False
    )(mask)


def _gather(parts: Tree, shapes: _Shapes) -> Tree:
    """Whole leaves from every device's parts."""

    def whole(part: jax.Array, shape: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.lax.all_gather(part, _AXIS, tiled=True)[: shape.size].reshape(shape.shape)

    return jax.tree.map(whole, parts, _like(parts, shapes))


def _like(tree: Tree, shapes: _Shapes) -> Tree:
    structs = [jax.ShapeDtypeStruct(shape, jnp.bool_) for shape in shapes]
    return jax.tree.unflatten(jax.tree.structure(tree), structs)


def _parts(xp: Any, leaf: Any, mesh: Mesh) -> Any:
    """A leaf, flattened and filled up with zeros to a multiple of the number of devices."""
    return xp.pad(leaf.reshape(-1), (0, -leaf.size % mesh.size))


def _params_specs(params: Params, mask: Mask, spread: bool) -> Tree:
    specs = jax.tree.map(lambda _: P(), params)
    return trees.merge(jax.tree.map(lambda _: P(_AXIS), mask), specs) if spread else specs


def _specs(score_fn: ScoreFn, split: _Split) -> Tree:
    return jax.tree.unflatten(
        jax.tree.structure(score_fn), [P(None, _AXIS) if s else P() for s in split]
    )


def _words(key: chex.PRNGKey | None) -> tuple[Any, Any]:
    """A key as an array of words, which any sharding takes, and how it was made."""
    key = jax.random.key(0) if key is None else key
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    return jax.random.key_data(key), jax.random.key_impl(key)


def _widened(
    score_fn: ScoreFn, params: Params, score_dtype: Any, mask: Mask
) -> tuple[ScoreFn, Params]:
    pair = scores.as_partial(score_fn), params
    return pruning.widen(pair) if pruning.is_wide(score_dtype, params, mask) else pair


def _share(mesh: Mesh, score_fn: ScoreFn) -> tuple[ScoreFn, _Split]:
    """The score function that shares its batches, on the mesh, and which of its leaves are split."""
    score_fn, split = scores.over_devices(score_fn, mesh.size, _AXIS)
    split = tuple(jax.tree.leaves(split))
    return _place(mesh, score_fn, _specs(score_fn, split)), split


def _place(mesh: Mesh, tree: Tree, specs: Tree) -> Tree:
    """A tree of this process's arrays, which all processes have alike, on the devices of the mesh."""

    def place(spec: P, leaf: Any) -> jax.Array:
        host = np.asarray(leaf)
        return jax.make_array_from_callback(
            host.shape, NamedSharding(mesh, spec), lambda index: host[index]
        )

    specs = jax.tree.map(lambda _: specs, tree) if isinstance(specs, P) else specs
    return jax.tree.map(place, specs, tree)


def _local(tree: Tree) -> Tree:
    """What is whole on every device, as arrays of this process's first one."""
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)


def _mesh(devices: Sequence[jax.Device] | None) -> Mesh:
    devices = jax.devices() if devices is None else devices
    if jax.process_index() not in {device.process_index for device in devices}:
        raise ValueError(
            f"devices has none of process {jax.process_index()}, which takes no part then: name some of its "
            "jax.local_devices(), or let only the other processes prune."
        )
    return Mesh(np.array(devices), (_AXIS,))
