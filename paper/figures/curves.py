"""Computes test accuracy against compression from rows: the curves of Figs. 1, 5a, 6 and 7.

A curve is the mean over the seeds, with the lowest and the highest of them. The critical
compression of a curve is the lowest one, up to the maximum, at which the network of some seed has
no path left from the input to the output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from paper.figures import titles
from paper.figures.rows import Row
from synflow_jax import data

EPOCHS = ("best", "last")
# At chance: at most this many times 1 / classes. The classes of a test split differ in size.
_NEAR_CHANCE = 1.25
_ROUNDING = 1 + 1e-9  # a compression that is the maximum itself is not beyond it

Place = tuple[float, int]  # a compression and a seed


class Curve(NamedTuple):
    """Test accuracy against compression, in per cent.

    Attributes:
      label: the name in the legend.
      compression, mean, low, high: over the seeds, [num_compressions].
      critical: the lowest compression, up to the maximum, at which a network has collapsed; None if
        there is none.
      chance: the compression from which on the mean is no better than guessing; None if there is
        none.
      unknown: the number of runs without a pruning row, which would say whether they collapsed.
      missing: the compressions and seeds that other curves of the same folder have and this one
        does not.
    """

    label: str
    compression: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    critical: float | None
    chance: float | None
    unknown: int
    missing: list[Place]


class Panel(NamedTuple):
    """The curves of one network on one data set.

    Attributes:
      model, dataset: their names in the config.
      title: of the network and the data set.
      seeds: of all rows, in rising order.
      curves: by their key: the rule, for instance.
      max_compression: of the network; None where no pruning row says it.
      chance: the accuracy of guessing, in per cent.
    """

    model: str
    dataset: str
    title: str
    seeds: list[int]
    curves: dict[Any, Curve]
    max_compression: float | None
    chance: float


def panels(
    rows: Sequence[Row],
    key: Callable[[Row], Any],
    label: Callable[[Any], str],
    epoch: str = "best",
) -> list[Panel]:
    """Returns one panel per network and data set, in the order of their first rows.

    At compression 1 nothing is pruned, so a curve without such a run shows that of another curve.

    Args:
      rows: training rows, from `rows.read_trained`.
      key: returns the key of a row's curve. Rows of the same key, compression and seed must be one
        run.
      label: returns the name of a key in the legend.
      epoch: "best", as in the paper, or "last".

    Raises:
      ValueError: the epoch is unknown, or two rows differ in something that the figure does not
        show.
    """
    if epoch not in EPOCHS:
        raise ValueError(f"--accuracy={epoch} is unknown. Choose one of {', '.join(EPOCHS)}.")
    by_network: dict[Any, list[Row]] = {}
    for row in rows:
        network = row["model"], row["dataset"], row["width_multiplier"]
        by_network.setdefault(network, []).append(row)
    return [_panel(group, key, label, epoch) for group in by_network.values()]


def one_panel(found: Sequence[Panel]) -> Panel:
    """Returns the only panel.

    Raises:
      ValueError: there are several.
    """
    if len(found) > 1:
        names = ", ".join(panel.title for panel in found)
        raise ValueError(
            f"the rows are of {len(found)} networks ({names}); a figure shows one: use a folder "
            "for each."
        )
    return found[0]


def unpruned_by_seed(rows: Iterable[Row]) -> dict[int, Row]:
    """Returns one run at compression 1 per seed: such runs are the same for every rule."""
    found = {}
    # Of several runs the one with the first name stays, as the last one written.
    for row in sorted(rows, key=lambda row: row["run_id"], reverse=True):
        if row["compression"] == 1:
            found[row["seed"]] = row
    return found


def _panel(
    rows: Sequence[Row], key: Callable[[Row], Any], label: Callable[[Any], str], epoch: str
) -> Panel:
    runs = _runs_by_key(rows, key, label)
    max_compression = _max_compression(rows)
    chance = 100 / data.spec(rows[0]["dataset"]).num_classes
    unpruned = {(1.0, seed): row for seed, row in unpruned_by_seed(rows).items()}
    curves = {}
    for name, own in runs.items():
        # A curve without an unpruned run shows that of another curve, so it is not missing.
        shown = own | {place: row for place, row in unpruned.items() if place not in own}
        missing = [place for place in _missing(own, rows) if place not in shown]
        compression, mean, low, high = _over_seeds(shown, epoch)
        curves[name] = Curve(
            label=label(name),
            compression=compression,
            mean=mean,
            low=low,
            high=high,
            critical=_critical_compression(shown, max_compression),
            chance=_at_chance_from(compression, mean, _NEAR_CHANCE * chance),
            unknown=sum(row["pruning"] is None for row in shown.values()),
            missing=missing,
        )
    return Panel(
        model=rows[0]["model"],
        dataset=rows[0]["dataset"],
        title=f"{titles.of_network(rows[0])} on {rows[0]['dataset']}",
        seeds=sorted({row["seed"] for row in rows}),
        curves=curves,
        max_compression=max_compression,
        chance=chance,
    )


def _max_compression(rows: Sequence[Row]) -> float | None:
    """Returns the lowest maximal compression that a pruning row has, or None without such rows."""
    prunings = [row["pruning"] for row in rows if row["pruning"] is not None]
    return min((pruning["max_compression"] for pruning in prunings), default=None)


def _runs_by_key(
    rows: Sequence[Row], key: Callable[[Row], Any], label: Callable[[Any], str]
) -> dict[Any, dict[Place, Row]]:
    found: dict[Any, dict[Place, Row]] = {}
    for row in rows:
        own = found.setdefault(key(row), {})
        other = own.setdefault(_place(row), row)
        if other is not row:
            raise ValueError(
                f"two rows are of {label(key(row))} at compression {row['compression']:g}, seed "
                f"{row['seed']}: {other['run_id']} and {row['run_id']}. They differ in another "
                "value of the config; the figure shows one: use a folder for each."
            )
    return found


def _place(row: Row) -> Place:
    return row["compression"], row["seed"]


def _missing(own: Mapping[Place, Row], rows: Sequence[Row]) -> list[Place]:
    """Returns where a curve has no run, but another curve of one of its folders has.

    A folder holds one grid, so its curves are meant to have the same compressions and seeds.
    """
    folders = {row["folder"] for row in own.values()}
    wanted = {_place(row) for row in rows if row["folder"] in folders}
    return sorted(wanted - own.keys())


def _over_seeds(
    runs: Mapping[Place, Row], epoch: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns the compressions, and the mean, lowest and highest accuracy at each."""
    accuracies: dict[float, list[float]] = {}
    for (compression, _), row in runs.items():
        top1 = 100 * row[epoch]["test_top1"]
        accuracies.setdefault(compression, []).append(top1)
    compressions = sorted(accuracies)
    in_order = [accuracies[compression] for compression in compressions]
    return (
        np.array(compressions),
        np.array([np.mean(values) for values in in_order]),
        np.array([min(values) for values in in_order]),
        np.array([max(values) for values in in_order]),
    )


def _critical_compression(runs: Mapping[Place, Row], max_compression: float | None) -> float | None:
    limit = np.inf if max_compression is None else max_compression * _ROUNDING
    collapsed = [
        compression
        for (compression, _), row in runs.items()
        if row["pruning"] is not None and row["pruning"]["collapsed"] and compression <= limit
    ]
    return min(collapsed, default=None)


def _at_chance_from(compression: np.ndarray, mean: np.ndarray, near_chance: float) -> float | None:
    """Returns the compression from which on no mean is above chance."""
    above = np.flatnonzero(mean > near_chance)
    first = int(above[-1]) + 1 if len(above) else 0
    return float(compression[first]) if first < len(compression) else None


def summary(panel: Panel) -> list[str]:
    """Returns the curves in words: one line per curve, and one for what is missing."""
    title = panel.title
    if panel.max_compression is not None:
        title += f", maximal compression {titles.of_compression(panel.max_compression)}"
    lines = [title]
    for curve in panel.curves.values():
        first = f"{curve.mean[0]:.1f} % at {titles.of_compression(curve.compression[0])}"
        lines.append(f"  {curve.label}: {first}, {_end(curve, panel.chance)}; {_fate(curve)}")
        if curve.missing:
            lines.append(f"    missing: {_places_in_words(curve.missing)}")
    return lines


def _end(curve: Curve, chance: float) -> str:
    """Returns how good a curve is at its end."""
    if curve.chance is not None:
        return f"at chance ({chance:.3g} %) from {titles.of_compression(curve.chance)} on"
    return f"{curve.mean[-1]:.1f} % at {titles.of_compression(curve.compression[-1])}"


def _fate(curve: Curve) -> str:
    """Returns where the networks of a curve collapse."""
    if curve.critical is None:
        fate = "never collapsed"
    else:
        fate = f"collapsed from {titles.of_compression(curve.critical)} on"
    if curve.unknown:
        fate += f" ({curve.unknown} runs have no pruning row, which would say it)"
    return fate


def _places_in_words(places: Sequence[Place]) -> str:
    """Returns the compressions of each seed.

    >>> _places_in_words([(1.0, 2), (3.2, 2), (10.0, 0), (10.0, 2), (20.0, 2)])
    'seed 0 at 10; seed 2 at 1 to 20, 4 compressions'
    """
    by_seed: dict[int, list[str]] = {}
    for compression, seed in sorted(places):
        by_seed.setdefault(seed, []).append(titles.of_compression(compression))
    parts = []
    for seed, at in sorted(by_seed.items()):
        few = len(at) < 4
        where = ", ".join(at) if few else f"{at[0]} to {at[-1]}, {len(at)} compressions"
        parts.append(f"seed {seed} at {where}")
    return "; ".join(parts)


def seeds_in_words(panel: Panel) -> str:
    """Returns the seeds of a panel and the number of missing runs."""
    seeds = panel.seeds
    words = f"seeds {seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"seed {seeds[0]}"
    num_missing = sum(len(curve.missing) for curve in panel.curves.values())
    return f"{words}; {titles.plural(num_missing, 'run')} missing" if num_missing else words
