"""Rules of the products that sum: a kernel meets its input."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from synflow_jax.units.tracing.meeting import matched, meet
from synflow_jax.units.tracing.notes import Notes, Rule
from synflow_jax.units.tracing.records import NONE, Read
from synflow_jax.units.tracing.values import ACTIVATIONS, PARAMETERS, Value, all_axes, along, moved


def _dot_general(notes: Notes, eqn: Any, values: list[Value]) -> list[Value]:
    (a_contract, b_contract), (a_batch, b_batch) = eqn.params["dimension_numbers"]
    a, b = values
    num_batch = len(a_batch)
    a_free = [i for i in range(len(a.shape)) if i not in (*a_contract, *a_batch)]
    b_free = [i for i in range(len(b.shape)) if i not in (*b_contract, *b_batch)]
    a_out = {axis: i for i, axis in enumerate([*a_batch, *a_free])}
    b_out = {axis: i for i, axis in enumerate(b_batch)}
    b_out |= {axis: num_batch + len(a_free) + i for i, axis in enumerate(b_free)}
    return [_product(notes, a, b, a_contract, b_contract, a_out, b_out, eqn.outvars[0].aval.shape)]


def _conv_general_dilated(notes: Notes, eqn: Any, values: list[Value]) -> list[Value] | None:
    x, kernel = values
    if kernel.kind != PARAMETERS or eqn.params["batch_group_count"] != 1:
        return None
    numbers, num_groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    x_batch, x_feature = numbers.lhs_spec[:2]
    kernel_out, kernel_in = numbers.rhs_spec[:2]
    out_batch, out_feature = numbers.out_spec[:2]
    shape = eqn.outvars[0].aval.shape
    if num_groups == 1:
        places = {x_batch: out_batch}, {kernel_out: out_feature}
        whole = all(tuple(p) == (0, 0) for p in eqn.params["padding"]) and set(
            eqn.params["lhs_dilation"]
        ) <= {1}
        return [_product(notes, x, kernel, [x_feature], [kernel_in], *places, shape, whole)]
    fields = [f for f in x.fields if f.support == {x_feature}]
    outs = [f for f in kernel.fields if f.support == {kernel_out}]
    if num_groups != x.shape[x_feature] or len(fields) != 1 or len(outs) != 1 or not outs[0].zero:
        return None  # in blocks of channels
    (field,), (out,) = fields, outs
    lost = [f for f in x.fields if f is not field and not f.support <= {x_batch}]
    notes.fix(lost, "convolution over units")
    notes.leave(lost)
    ids = np.repeat(field.ids.ravel(), shape[out_feature] // num_groups)
    notes.unify(ids, out.ids.ravel())
    notes.scales |= all_axes([out])
    new = field._replace(ids=along(ids, out_feature, len(shape)), support=frozenset([out_feature]))
    return [Value((new,), ACTIVATIONS, shape)]


def _product(notes: Notes, a: Value, b: Value, a_contract: Sequence[int], b_contract: Sequence[int],
    a_out: dict[int, int], b_out: dict[int, int], shape: tuple[int, ...], whole: bool = True,
) -> Value:  # fmt: skip
    """A sum of products: `contract` axes meet pairwise and are summed over, the others go to their new places.

    whole: all of the kernel is used at each place (and nothing of it lies on padding).
    """
    kind = max(a.kind, b.kind)
    inner, outer = [], []
    for value, contract, out in ((a, a_contract, a_out), (b, b_contract, b_out)):
        summed = tuple(f for f in value.fields if f.support <= set(contract))
        passing = tuple(f for f in value.fields if f.support <= set(out))
        lost = [
            f for f in value.fields if not (f.support <= set(contract) or f.support <= set(out))
        ]
        if value.kind == ACTIVATIONS or any(f.support & set(contract) for f in lost):
            notes.fix(lost, "summed over with other axes")
            notes.leave(lost)
        where = [contract.index(i) if i in contract else None for i in range(len(value.shape))]
        sizes = tuple(value.shape[i] for i in contract)
        inner.append(moved(value._replace(fields=summed), where, sizes))
        where = [out.get(i) for i in range(len(value.shape))]
        new = frozenset(range(len(shape))) - set(out.values())
        outer.append(moved(value._replace(fields=passing), where, shape, new))
    _contraction(notes, *inner, *outer)
    if kind == ACTIVATIONS:
        outer = [
            v._replace(fields=tuple(f._replace(axes=frozenset(), open=False) for f in v.fields))
            if v.kind == PARAMETERS else v
            for v in outer
        ]  # fmt: skip
    result = meet(notes, "mul", *[v._replace(kind=kind) for v in outer])
    if {a.kind, b.kind} != {PARAMETERS, ACTIVATIONS}:
        return result
    if a.kind == PARAMETERS:
        read = _reads_of(notes, b, a, b_contract, a_contract, a_out, whole)
    else:
        read = _reads_of(notes, a, b, a_contract, b_contract, b_out, whole)
    notes.reads += read
    return result._replace(product=len(notes.reads) - 1 if len(read) == 1 else None)


def _reads_of(
    notes: Notes,
    x: Value,
    kernel: Value,
    x_contract: Sequence[int],
    contract: Sequence[int],
    out: dict,
    whole: bool,
) -> list[Read]:
    leaves = {leaf for f in kernel.fields for leaf, _ in f.axes}
    notes.met.update(leaves)
    is_leaf = kernel.leaf is not None and kernel.shape == notes.leaf_shapes[kernel.leaf]
    if not is_leaf or kernel.leaf is None or len(contract) != 1 or len(out) != 1:
        return [Read(leaf, NONE, NONE) for leaf in sorted(leaves)]
    read = Read(kernel.leaf, contract[0], next(iter(out)), whole=whole)
    if x.array is None:
        return [read]
    rows = jnp.moveaxis(x.array, x_contract[0], -1).reshape(-1, x.shape[x_contract[0]])
    same = jnp.all(jnp.abs(rows - rows[:1]) <= 1e-6 * jnp.abs(rows[:1]), axis=0)
    return [read._replace(values=rows[0], steady=same)]


def _contraction(notes: Notes, a: Value, b: Value, a_outer: Value, b_outer: Value) -> None:
    """What meets in the axes that are summed over. a, b: these axes alone; *_outer: the others."""
    kinds = {a.kind, b.kind}
    if kinds != {PARAMETERS, ACTIVATIONS}:
        reason = (
            "summed over without parameters" if ACTIVATIONS in kinds else "a product of parameters"
        )
        notes.fix([*a.fields, *b.fields], reason)
    a, b = matched(notes, a, b)
    for f, g in itertools.product(a.fields, b.fields):
        if f.support & g.support:
            notes.unify(f.ids, g.ids)
    x, kernel, written = (a, b, b_outer) if b.kind == PARAMETERS else (b, a, a_outer)
    for f in x.fields:
        if not any(f.support & g.support for g in kernel.fields):
            notes.fix([f], "summed over without parameters")
    notes.leave([f for v in (x, kernel) if v.kind == ACTIVATIONS for f in v.fields])
    if kinds == {PARAMETERS, ACTIVATIONS}:
        fields = (*kernel.fields, *written.fields)
        if not all(f.zero for f in fields):
            notes.fix([*fields, *x.fields], "a kernel that is not 0 where its parameter is")
        notes.readers |= all_axes(kernel.fields)
        notes.writers |= all_axes(written.fields)


RULES: dict[str, Rule] = {
    "conv_general_dilated": _conv_general_dilated,
    "dot_general": _dot_general,
}
