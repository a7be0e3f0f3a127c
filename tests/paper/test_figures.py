"""Tests Figs. 2, 3, 4 and the schedules, whose lines and dots are read back from the axes.

- The figures show the numbers of the rows.
- The laws of the scores hold in them: conservation by unit and by layer, and slope 1.
- Rows that do not fit a figure are refused.
"""

from __future__ import annotations

import json
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

from paper.figures import fig2, fig3, fig4, rows, schedule
from synflow_jax import pruning, scores, storage
from synflow_jax.experiments import masks
from synflow_jax.experiments.config import Config, Grid, PruneConfig
from synflow_jax.experiments.events import Finished
from synflow_jax.experiments.run import resolve
from synflow_jax.storage import Workdir

ROOT = pathlib.Path(__file__).parents[2]
DRAW: dict[str, Callable[..., Figure]] = {
    "fig2": fig2.draw,
    "fig3": fig3.draw,
    "fig4": fig4.draw,
    "schedule": schedule.draw,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Returns rows of every rule at three compressions with units, and SynFlow by all schedules."""
    work = tmp_path_factory.mktemp("rows")
    base = {"model": "fc", "dataset": "digits", "width_multiplier": 0.2}
    rules = Config(
        **base,
        prune=PruneConfig(num_iterations=1, record_units=True, examples_per_class=1),
        grid=Grid(pruner=rows.RULES, compression=(1, 10, 500)),
    )
    schedules = Config(
        **base,
        prune=PruneConfig(compression=10, examples_per_class=1),
        grid=Grid(num_iterations=(1, 8), schedule=("exponential", "linear")),
    )
    certified = Config(
        **base, prune=PruneConfig(compression=10, examples_per_class=1, schedule="certified")
    )
    for name, settings in (("rules", rules), ("schedules", schedules), ("schedules", certified)):
        for outcome in masks.prune_all(resolve(settings), Workdir(work / name)):
            assert isinstance(outcome, Finished), outcome
    return work


def _axes(figure: Figure) -> dict[str, Any]:
    """Returns the panels by the first word of their titles."""
    return {ax.get_title().split()[0]: ax for ax in figure.axes if ax.get_title()}


@pytest.mark.slow
def test_fig2_draws_the_fractions(folder: pathlib.Path) -> None:
    found = rows.read(folder / "rules")
    panels = _axes(fig2.draw(found))
    assert list(panels) == list(rows.RULES)
    for rule, ax in panels.items():
        lines = [line for line in ax.lines if len(line.get_xdata()) == 6]
        wanted = [row for row in found if row["pruner"] == rule and row["compression"] > 1]
        assert len(lines) == len(wanted) == 2
        empty = set()
        for line, row in zip(lines, wanted, strict=True):
            fractions = np.array([layer["kept"] / layer["size"] for layer in row["layers"]])
            drawn = np.array(line.get_ydata())
            np.testing.assert_allclose(drawn[fractions > 0], fractions[fractions > 0])
            assert (drawn[fractions == 0] == ax.get_ylim()[0]).all()
            assert line.get_linestyle() == ("--" if (fractions == 0).any() else "-")
            empty |= set(np.flatnonzero(fractions == 0))
        crosses = {int(line.get_xdata()[0]) for line in ax.lines if line.get_marker() == "x"}
        assert crosses == empty
        collapsed = [row["compression"] for row in wanted if row["collapsed"]]
        assert ("never collapsed" in ax.get_title()) == (not collapsed)
        assert not collapsed or f"collapsed from {collapsed[0]:.0f} on" in ax.get_title()
    assert "collapsed from 500" in panels["magnitude"].get_title()  # the grid has both kinds
    assert "digits, enlarged, 1 a class" in panels["snip"].get_title()


@pytest.mark.slow
def test_fig3_draws_every_unit_and_synflow_conserves(folder: pathlib.Path) -> None:
    figure = fig3.draw(rows.read(folder / "rules"))
    panels = _axes(figure)
    for rule, ax in panels.items():
        dots = np.concatenate([np.asarray(c.get_offsets()) for c in ax.collections])
        left_out = re.search(r"(\d+) at 0 left out", ax.get_title())
        assert len(dots) + (int(left_out[1]) if left_out else 0) == 5 * 20, rule
        assert (dots > 0).all()
    synflow = np.concatenate([np.asarray(c.get_offsets()) for c in panels["synflow"].collections])
    other = np.concatenate([np.asarray(c.get_offsets()) for c in panels["magnitude"].collections])
    np.testing.assert_allclose(
        synflow[:, 1] / synflow[:, 0], 1, rtol=0.01
    )  # but for the biases, which are not scored
    assert np.abs(np.log(other[:, 1] / other[:, 0])).max() > 0.1
    assert "absolute values" in panels["snip"].get_title()
    assert "negative" in panels["grasp"].get_title()


@pytest.mark.slow
def test_fig4_has_the_slopes_of_the_paper(folder: pathlib.Path) -> None:
    panels = _axes(fig4.draw(rows.read(folder / "rules")))
    slopes = {rule: float(ax.get_title().split()[-1]) for rule, ax in panels.items()}
    assert abs(slopes["random"]) < 0.05 and abs(slopes["synflow"] - 1) < 0.05
    assert slopes["random"] < slopes["magnitude"] < slopes["synflow"]
    # A standard normal's mean magnitude is sqrt(2 / pi) in every layer.
    dots = np.asarray(panels["random"].collections[0].get_offsets())
    np.testing.assert_allclose(dots[:, 1], np.sqrt(2 / np.pi), rtol=0.15)


@pytest.mark.slow
def test_schedule_draws_the_largest_ratios(folder: pathlib.Path) -> None:
    found = rows.read(folder / "schedules")
    (ax,) = schedule.draw(found).axes
    lines = {line.get_label(): np.array(line.get_data()) for line in ax.lines}
    assert lines["certified"][0, 0] > 1 and lines["certified"][1, 0] < 0.5  # its bound
    by_run = {(row["schedule"], row["num_iterations"]): row["iterations"] for row in found}
    for name in ("exponential", "linear"):
        np.testing.assert_array_equal(lines[name][0], [1, 8])
        for number, value in lines[name].T:
            steps = by_run[name, int(number)]
            # In a chain every layer is a cut; but for the biases, all hold the same.
            ratios = [
                p / c for p, c in zip(steps["pruned_score"], steps["min_layer_score"], strict=True)
            ]
            assert len(ratios) == number and value == pytest.approx(max(ratios), rel=0.2)
    # In one iteration the schedules are one; in eight, the exponential one prunes less at a time.
    assert lines["exponential"][1, 0] == lines["linear"][1, 0]
    assert lines["exponential"][1, 1] < lines["linear"][1, 1] < lines["linear"][1, 0]


def test_the_ratio_of_one_iteration_by_hand() -> None:
    """Checks the ratio against the closed form of SynFlow's scores on an MLP without biases.

    The weakest weights go. Their total score over a layer's is the ratio.
    """
    rng = np.random.default_rng(0)
    w1, w2 = rng.normal(size=(5, 7)), rng.normal(size=(7, 3))
    flow1 = np.abs(w1) * np.abs(w2).sum(1)
    flow2 = np.abs(w2) * np.abs(w1).sum(0)[:, None]
    cut = flow1.sum()
    np.testing.assert_allclose(cut, flow2.sum())  # both layers are cuts
    all_scores = np.sort(np.concatenate([flow1.ravel(), flow2.ravel()]))
    num_pruned = int((1 - 1 / 4) * all_scores.size)

    params = {
        "a": {"kernel": jnp.asarray(w1, jnp.float32)},
        "b": {"kernel": jnp.asarray(w2, jnp.float32)},
    }
    apply_fn = lambda p, x: jnp.maximum(x @ p["a"]["kernel"], 0) @ p["b"]["kernel"]
    score_fn = scores.synflow(apply_fn, (5,))
    _, info = pruning.prune(score_fn, params, compression=4, num_iterations=1)
    steps = {
        "pruned_score": info.pruned_score.tolist(),
        "log10_cut": (np.log10(info.cut) + np.log10(2) * np.asarray(info.exponent)).tolist(),
        "log2_unit": info.exponent.tolist(),
    }
    row = {"run_id": "two layers", "iterations": steps}
    assert schedule.ratio(row) == pytest.approx(all_scores[:num_pruned].sum() / cut, rel=1e-5)


# The command


def _figures(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "paper", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_the_command_writes_png_and_pdf(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    result = _figures("fig4", f"--rows={folder / 'rules'}", f"--out={tmp_path / 'new'}")
    assert result.returncode == 0 and result.stderr == ""
    png, pdf = (tmp_path / "new" / f"fig4.{ending}" for ending in ("png", "pdf"))
    assert result.stdout.split() == [str(png), str(pdf)]
    assert png.read_bytes().startswith(b"\x89PNG") and pdf.read_bytes().startswith(b"%PDF")


@pytest.mark.slow
def test_bad_commands(tmp_path: pathlib.Path) -> None:
    for arguments, argument, cure in (
        (
            ["fig9", f"--rows={tmp_path}"],
            "'fig9' is unknown",
            "fig1, fig2, fig3, fig4, fig5a, fig5b, fig6, fig7, schedule",
        ),
        (["fig2", f"--rows={tmp_path / 'none'}"], "rows.jsonl does not exist", "python prune.py"),
        (
            ["fig2", f"--rows={tmp_path}", "--published=paper/published/fig6.json"],
            "has no effect on fig2",
            "fig1 and fig6 only. Leave it out",
        ),
    ):
        result = _figures(*arguments)
        assert result.returncode == 2 and result.stdout == "" and result.stderr.count("\n") == 1
        assert result.stderr.startswith("error: ")
        assert argument in result.stderr
        assert cure in result.stderr
    assert not list(tmp_path.iterdir())


def _without(*path: str) -> Callable[[dict[str, Any]], None]:
    def remove(row: dict[str, Any]) -> None:
        for part in row["layers"] if path[0] == "layers" else [row]:
            inner = part
            for key in path[:-1] if path[0] != "layers" else []:
                inner = inner[key]
            inner.pop(path[-1], None)

    return remove


def _set(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda row: row.update(values)


ONE_FOLDER_EACH = "a folder for each"
# Figure, folder, index of the row that is changed (None: all), the change, and the two texts that
# the message must contain.
BAD = {
    "fig2, two networks": (
        "fig2", "rules", 3, _set(model="conv"),
        "conv on digits", ONE_FOLDER_EACH,
    ),
    "fig2, two of a kind": (
        "fig2", "rules", 1, _set(compression=500.0),
        "same compression", ONE_FOLDER_EACH,
    ),
    "fig2, dense alone": (
        "fig2", "rules", None, _set(compression=1.0),
        "above 1", "pruning",
    ),
    "fig3, not recorded": (
        "fig3", "rules", None, _without("units"),
        "no row has", "--config.prune.record_units",
    ),
    "fig3, no file": (
        "fig3", "rules", 0, _set(units="units/gone.json"),
        "gone.json", "--overwrite",
    ),
    "fig4, old rows": (
        "fig4", "rules", None, _without("layers", "initial_magnitude"),
        "initial_magnitude", "fig4.py",
    ),
    "schedule, other rules": (
        "schedule", "schedules", None, _set(pruner="snip"),
        "no row is SynFlow's", "schedule.py",
    ),
    "schedule, compressions": (
        "schedule", "schedules", 0, _set(compression=9.0),
        "[9.0, 10]", ONE_FOLDER_EACH,
    ),
    "schedule, old rows": (
        "schedule", "schedules", None, _without("iterations", "pruned_score"),
        "pruned_score", "schedule.py",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", BAD)
def test_rows_that_do_not_fit(folder: pathlib.Path, case: str) -> None:
    figure, name, which, change, argument, cure = BAD[case]
    found = rows.read(folder / name)
    for number, row in enumerate(found):
        if which is None or number == which:
            change(row)
    with pytest.raises(ValueError, match=r"\.") as error:
        DRAW[figure](found)
    assert argument in str(error.value) and cure in str(error.value), error.value


@pytest.mark.slow
def test_no_rows_and_damaged_units(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    storage.write_row(tmp_path / "rows.jsonl", {"run_id": "train-1"})
    with pytest.raises(ValueError, match="holds no pruning row"):
        rows.read(tmp_path)
    shutil.copytree(folder / "rules", tmp_path / "copy")
    found = rows.read(tmp_path / "copy")
    for content in ("", "[]", json.dumps({"fc1": {"incoming": [1.0]}})):
        (tmp_path / "copy" / found[0]["units"]).write_text(content)
        with pytest.raises(ValueError, match="cannot be read"):
            fig3.draw(found)


@pytest.mark.slow
def test_figures_are_of_the_lowest_seed(folder: pathlib.Path) -> None:
    found: list[Mapping[str, Any]] = rows.read(folder / "rules")
    doubled = [{**row, "seed": 1} for row in found] + found
    assert rows.one_network(doubled) == found
