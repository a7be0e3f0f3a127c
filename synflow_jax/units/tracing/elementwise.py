"""Rules of the primitives that act on each element, and of those that sum over axes of one value."""

from __future__ import annotations

import functools
from typing import Any

from synflow_jax.units.tracing.layout import broadcast, without
from synflow_jax.units.tracing.meeting import meet
from synflow_jax.units.tracing.notes import Notes, Rule
from synflow_jax.units.tracing.primitives import (
    CUMULATIVE,
    ELEMENTWISE,
    KEEP_ZERO,
    REDUCTIONS,
    SUMS,
    WINDOWS,
    neutral,
)
from synflow_jax.units.tracing.values import ACTIVATIONS, Value, flagged, moved


def _elementwise(notes: Notes, eqn: Any, values: list[Value]) -> list[Value]:
    if len(eqn.outvars) > 1:  # optimization_barrier
        return values
    name, shape = eqn.primitive.name, eqn.outvars[0].aval.shape
    values = [broadcast(notes, v, list(range(len(v.shape))), shape) for v in values]
    if name == "select_n":  # which case it is does not matter where all are 0
        values[0] = flagged(values[0], zero=True)
    if name == "div" and values[1].fields:
        notes.nonzero += [f.ids for f in values[1].fields if values[1].kind == ACTIVATIONS]
    out = functools.reduce(functools.partial(meet, notes, name), values)
    if name in SUMS:
        kept = neutral(name, values)
    else:
        kept = name in KEEP_ZERO and (name != "integer_pow" or eqn.params["y"] > 0)
    if not kept:
        out = flagged(out, zero=False)
    if name == "convert_element_type":
        out = out._replace(leaf=values[0].leaf, product=values[0].product)
    return [out]


def _reduction(notes: Notes, eqn: Any, values: list[Value]) -> list[Value]:
    value, axes = values[0], eqn.params["axes"]
    name, shape = eqn.primitive.name, eqn.outvars[0].aval.shape
    out = without(notes, value, axes, name)
    if name.startswith("arg"):
        out = flagged(out, zero=False)
    places = iter(range(len(shape)))
    return [
        moved(
            out, [None if axis in axes else next(places) for axis in range(len(value.shape))], shape
        )
    ]


def _cumulative(notes: Notes, eqn: Any, values: list[Value]) -> list[Value]:
    return [without(notes, values[0], [eqn.params["axis"]], eqn.primitive.name)]


def _windows(notes: Notes, eqn: Any, values: list[Value]) -> list[Value] | None:
    if len(eqn.outvars) > 1:
        return None
    window = eqn.params["window_dimensions"]
    strides = eqn.params["window_strides"]
    padding = eqn.params["padding"]
    changed = [i for i, (w, s, p) in enumerate(zip(window, strides, padding, strict=True))
               if w != 1 or s != 1 or tuple(p) != (0, 0)]  # fmt: skip
    return [
        without(notes, values[0], changed, eqn.primitive.name)._replace(
            shape=eqn.outvars[0].aval.shape
        )
    ]


RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys(REDUCTIONS, _reduction),
    **dict.fromkeys(CUMULATIVE, _cumulative),
    **dict.fromkeys(WINDOWS, _windows),
}
