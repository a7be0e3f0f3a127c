"""Prints a row of `rows.jsonl`: the layers of a pruning, or the sizes and epochs of a training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from synflow_jax import certified
from synflow_jax.experiments import rules
from synflow_jax.experiments.report.style import percent, table

# The keys of "size" in a training row, and their words.
_FORMS = {"full": "full", "kept": "full, without what is pruned", "compact": "smaller, dense"}


# A pruning row


def row(output: Console, found: Mapping[str, Any]) -> None:
    """Prints a pruning row: its layers as a table, and what is left of the whole network."""
    _layers(output, found)
    multiply_adds = found["multiply_adds_kept"] / found["multiply_adds"]
    reached, asked = found["reached_compression"], found["compression"]
    maximum = found["max_compression"]
    kept, total = found["kept"], found["total"]
    output.print(
        f"compression {reached:,.2f} (asked {_number(asked)}, maximal {_number(maximum)}): "
        f"{kept:,} of {total:,} weights, {100 * multiply_adds:.3g} % of the multiply-adds"
    )
    if found["collapsed"]:
        output.print(
            "[bold red]collapsed: no path of kept weights leads from the input to the "
            "output[/bold red]"
        )
    else:
        # A row has null where the number was not finite.
        objective = found["log10_objective"]
        shown = "not finite" if objective is None else f"{objective:.4f}"
        output.print(f"not collapsed: log10 of the path norm is {shown}")
    _largest_cut(output, found)
    _shortfall(output, found)


def _number(value: float) -> str:
    """Returns a compression with at most two decimals.

    >>> _number(100.0), _number(86_794.66667)
    ('100', '86,794.67')
    """
    return f"{value:,.2f}".rstrip("0").rstrip(".")


def _layers(output: Console, found: Mapping[str, Any]) -> None:
    shown = table(["layer", "shape"], ["size", "kept", "fraction", "score"])
    # Scores of the last iteration are in units of 2^log2_unit.
    log2_unit = found["iterations"]["log2_unit"][-1]
    for layer in found["layers"]:
        size, kept = layer["size"], layer["kept"]
        shape = "x".join(map(str, layer["shape"]))
        shown.add_row(
            layer["name"],
            shape,
            f"{size:,}",
            f"{kept:,}",
            f"{kept / size:.5f}",
            score_in_words(layer["score"], log2_unit),
            style="red" if kept == 0 else "",
        )
    output.print(shown)


def score_in_words(score: float | None, log2_unit: int) -> str:
    """Returns score * 2^log2_unit, which may be larger than every float. None: not finite.

    >>> score_in_words(3.0, 2), score_in_words(1.0, 10_000)
    ('12', '1.995e+3010')
    """
    if score is None:
        return "-"
    if score <= 0 or abs(log2_unit) < 900:
        return f"{score * 2.0**log2_unit:.4g}"
    log10 = math.log10(score) + log2_unit * math.log10(2)
    exponent = math.floor(log10)
    return f"{10 ** (log10 - exponent):.3f}e+{exponent}"


def _largest_cut(output: Console, found: Mapping[str, Any]) -> None:
    """Prints the largest fraction of a cut that an iteration pruned, if cuts are known."""
    fraction = found["largest_cut_fraction"]
    if fraction is None:
        return
    if fraction < 1:
        num_iterations = len(found["iterations"]["kept"])
        output.print(
            f"no iteration of {num_iterations} pruned more than {fraction:.3f} of what the "
            "smallest cut held, so none can have disconnected the network (Theorem 3)"
        )
        return
    end = "no path is left" if found["collapsed"] else "a path is left by luck"
    output.print(f"an iteration pruned {fraction:.3g} times what the smallest cut held: {end}")


def _shortfall(output: Console, found: Mapping[str, Any]) -> None:
    """Prints how far a certified run stayed from its compression, if it did."""
    asked = certified.num_kept(found["total"], found["compression"])
    kept = found["kept"]
    if rules.is_certified(found["schedule"]) and kept > asked:
        output.print(
            f"[bold red]{kept:,} weights are left, not {asked:,}:[/bold red] each of them "
            "carries all of the flow, or prune.num_iterations was too small"
        )


# A training row


def trained(
    output: Console, found: Mapping[str, Any], timing: Mapping[str, Any] | None = None
) -> None:
    """Prints a training row: which network was trained, and its last and its best epoch.

    Args:
      output: to print to.
      found: the row.
      timing: the row of times of the same run, if there is one.
    """
    # Rows of versions without compact networks have no sizes.
    if "size" in found:
        _sizes(output, found)
        _speed(output, found, timing)
    _epochs(output, found)


def _sizes(output: Console, found: Mapping[str, Any]) -> None:
    sizes, full = found["size"], found["size"]["full"]
    shown = table(["network"], ["weights", "", "multiply-adds", ""])
    for form, words in _FORMS.items():
        size = sizes[form]
        if size is None:  # no smaller network was made
            continue
        is_trained = form == ("compact" if found["compact"] else "full")
        cells = [f"{words} (trained, masked)" if is_trained else words]
        for count in ("weights", "multiply_adds"):
            share = size[count] / full[count]
            cells += [f"{size[count]:,}", f"{100 * share:.3g} %"]
        shown.add_row(*cells)
    output.print(shown)


def _speed(output: Console, found: Mapping[str, Any], timing: Mapping[str, Any] | None) -> None:
    if timing is None or not timing.get("step_seconds"):
        return
    seconds = timing["step_seconds"]
    batch_size = found["config"]["train"]["batch_size"]
    milliseconds, speed = 1000 * seconds, batch_size / seconds
    output.print(f"{milliseconds:.4g} ms per step of {batch_size} images, {speed:,.0f} images/s")


def _epochs(output: Console, found: Mapping[str, Any]) -> None:
    titles = ["train loss", "train top-1", "test loss", "test top-1", "test top-5"]
    shown = table([], ["", "epoch", *titles])
    for which in ("last", "best"):
        epoch = found[which]
        shown.add_row(
            which,
            str(epoch["epoch"]),
            f"{epoch['train_loss']:.4f}",
            percent(epoch["train_top1"]),
            f"{epoch['test_loss']:.4f}",
            percent(epoch["test_top1"]),
            percent(epoch["test_top5"]),
        )
    output.print(shown)
    output.print(
        "The best epoch is selected by its test accuracy, as in the paper; the last epoch involves "
        "no selection."
    )
