"""Tests Figs. 1, 5a, 5b, 6 and 7 on made-up rows.

- The curves, bands and arrows show the numbers of the rows.
- Missing runs are named, and so are runs whose collapse is unknown.
- Rows that do not fit a figure are refused.
"""

from __future__ import annotations

import importlib.util
import json
import pathlib
import subprocess
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from paper.figures import accuracy, curves, fig1, fig5a, fig5b, fig6, fig7, published, rows

ROOT = pathlib.Path(__file__).parents[2]
MAXIMUM = 1000.0
# Accuracy of seeds 0 and 1 in per cent, and whether the networks have collapsed.
CURVES = {
    "magnitude": {
        1.0: (97, 99, False),
        10.0: (90, 94, False),
        100.0: (10, 12, False),
        MAXIMUM: (10, 10, True),
    },
    "snip": {
        1.0: (97, 99, False),
        10.0: (93, 95, False),
        100.0: (10, 10, True),
        MAXIMUM: (10, 10, True),
    },
    "grasp": {
        1.0: (97, 99, False),
        10.0: (91, 92, False),
        100.0: (9, 10, True),
        MAXIMUM: (10, 10, True),
    },
    "synflow": {
        1.0: (97, 99, False),
        10.0: (92, 96, False),
        100.0: (70, 80, False),
        MAXIMUM: (20, 20, False),
    },
}


def _pair(
    pruner: str, compression: float, seed: int, top1: float, collapsed: bool, **values: Any
) -> list[rows.Row]:
    """Returns the pruning row and the training row of a run, with the keys that figures read."""
    given = {
        "model": "conv",
        "dataset": "digits",
        "width_multiplier": 1.0,
        "num_iterations": 1,
        **values,
    }
    network = f"{given['model']}-{given['dataset']}"
    run_id = f"{network}-{pruner}-n{given['num_iterations']}-c{compression:g}-s{seed}"
    shared = {
        "model": given["model"],
        "dataset": given["dataset"],
        "width_multiplier": given["width_multiplier"],
        "pruner": pruner,
        "compression": compression,
        "seed": seed,
        "config": {
            "width_multiplier": given["width_multiplier"],
            "prune": {"num_iterations": given["num_iterations"]},
        },
    }
    pruned = {
        **shared,
        "run_id": run_id,
        "layers": [],
        "collapsed": collapsed,
        "max_compression": MAXIMUM,
    }
    at = {"best": {"test_top1": top1 / 100}, "last": {"test_top1": (top1 - 5) / 100}}
    return [
        pruned,
        {**shared, "run_id": f"train-{run_id}", "prune_run_id": run_id, "num_epochs": 3, **at},
    ]


def _write(
    folder: pathlib.Path, pairs: Iterable[Sequence[rows.Row]], name: str = "rows.jsonl"
) -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for pair in pairs for row in pair))
    return folder


def _grid(**values: Any) -> list[list[rows.Row]]:
    return [
        _pair(pruner, compression, seed, top1[seed], bool(top1[2]), **values)
        for pruner, curve in CURVES.items()
        for compression, top1 in curve.items()
        for seed in (0, 1)
    ]


@pytest.fixture
def grid(tmp_path: pathlib.Path) -> list[rows.Row]:
    pairs = _grid()
    _write(tmp_path / "grid", pairs[:10])
    # The other rows are those of a second process.
    return rows.read_trained([_write(tmp_path / "grid", pairs[10:], "rows-1.jsonl")])


def _lines(figure: Figure, panel: int = 0) -> dict[str, Any]:
    return {str(line.get_label()): line for line in figure.axes[panel].lines}


def _arrows(figure: Figure, panel: int = 0) -> list[tuple[float, Any]]:
    return [(text.xy[0], text.arrow_patch.get_edgecolor()) for text in figure.axes[panel].texts]  # type: ignore[attr-defined]


def test_fig1_draws_means_bands_arrows_and_the_maximum(grid: list[rows.Row]) -> None:
    figure = fig1.draw(fig1.panels(grid, "best"), "best")
    (ax,) = figure.axes
    lines = _lines(figure)
    assert ax.get_xscale() == "log"
    bands = {to_rgba(band.get_facecolor()[0], 1): band for band in ax.collections}
    for rule, curve in CURVES.items():
        x, y = lines[rule].get_data()
        np.testing.assert_array_equal(x, list(curve))
        np.testing.assert_allclose(y, [(first + second) / 2 for first, second, _ in curve.values()])
        corners = bands[to_rgba(accuracy.STYLES[rule].color)].get_paths()[0].vertices
        for compression, (first, second, _) in curve.items():
            here = corners[corners[:, 0] == compression, 1]
            assert here.min() == pytest.approx(min(first, second)) and here.max() == pytest.approx(
                max(first, second)
            )
    critical = {"magnitude": MAXIMUM, "snip": 100.0, "grasp": 100.0}
    assert sorted(_arrows(figure)) == sorted(
        (at, to_rgba(accuracy.STYLES[rule].color)) for rule, at in critical.items()
    )
    dashed = [line for line in ax.lines if line.get_linestyle() == "--"]
    assert [line.get_xdata()[0] for line in dashed] == [MAXIMUM]
    # Two arrows at one compression stand side by side.
    figure.draw_without_rendering()  # type: ignore[attr-defined]
    places = [text.get_window_extent().x0 for text in ax.texts if text.xy[0] == 100]  # type: ignore[attr-defined]
    assert len(places) == 2 and abs(places[0] - places[1]) > 5
    last = fig1.draw(fig1.panels(grid, "last"), "last")
    np.testing.assert_allclose(_lines(last)["synflow"].get_ydata()[0], 93)


def test_the_summary_says_what_a_figure_shows(grid: list[rows.Row]) -> None:
    (panel,) = fig1.panels(grid, "best")
    assert curves.summary(panel) == [
        "conv on digits, maximal compression 1,000",
        "  magnitude: 98.0 % at 1, at chance (10 %) from 100 on; collapsed from 1,000 on",
        "  snip: 98.0 % at 1, at chance (10 %) from 100 on; collapsed from 100 on",
        "  grasp: 98.0 % at 1, at chance (10 %) from 100 on; collapsed from 100 on",
        "  synflow: 98.0 % at 1, 20.0 % at 1,000; never collapsed",
    ]


def test_an_incomplete_grid_is_drawn_and_reported(grid: list[rows.Row]) -> None:
    gone = {("synflow", 100.0, 1), ("snip", 10.0, 0), ("snip", 10.0, 1)}
    part = [row for row in grid if (row["pruner"], row["compression"], row["seed"]) not in gone]
    found = fig1.panels(part, "best")
    lines = _lines(fig1.draw(found, "best"))
    np.testing.assert_allclose(lines["synflow"].get_ydata()[2], 70)
    np.testing.assert_array_equal(lines["snip"].get_xdata(), [1, 100, MAXIMUM])
    assert found[0].curves["snip"].missing == [(10, 0), (10, 1)]
    assert found[0].curves["synflow"].missing == [(100, 1)] and not found[0].curves["grasp"].missing
    title = fig1.draw(found, "best").axes[0].get_title()
    assert "seeds 0 to 1; 3 runs missing" in title
    assert "    missing: seed 1 at 100" in curves.summary(found[0])
    # Only the pruning row says whether a network has collapsed.
    unknown = [{**row, "pruning": None} if row["pruner"] == "snip" else row for row in grid]
    (panel,) = fig1.panels(unknown, "best")
    assert panel.curves["snip"].critical is None and panel.curves["snip"].unknown == 8
    assert "8 runs have no pruning row" in curves.summary(panel)[2]


def test_beyond_the_maximum_nothing_counts_as_critical(tmp_path: pathlib.Path) -> None:
    pairs = [*_grid(), *(_pair("synflow", 2000.0, seed, 10, True) for seed in (0, 1))]
    (panel,) = fig1.panels(rows.read_trained([_write(tmp_path, pairs)]), "best")
    assert panel.curves["synflow"].critical is None and panel.curves["synflow"].chance == 2000


def test_fig5a_has_a_curve_per_number_of_levels(
    tmp_path: pathlib.Path, grid: list[rows.Row]
) -> None:
    levels = {1: (100.0, 10), 2: (100.0, 60), 8: (100.0, 90)}
    pairs = [
        _pair("imp", compression, 0, top1, top1 == 10, num_iterations=number)
        for number, (compression, top1) in levels.items()
    ]
    imp = rows.read_trained([_write(tmp_path / "imp", pairs)])
    found = fig5a.panels([*imp, *grid], "best")  # the unpruned runs of any rule serve
    figure = fig5a.draw(found, "best")
    lines = _lines(figure)
    for number, (compression, top1) in levels.items():
        x, y = lines[f"{number} level{'s' if number > 1 else ''}"].get_data()
        np.testing.assert_array_equal(x, [1, compression])
        np.testing.assert_allclose(y, [98, top1])
    assert "magnitude" not in lines and [at for at, _ in _arrows(figure)] == [100]
    assert not any(
        curve.missing for curve in found[0].curves.values()
    )  # the other folder is another grid
    with pytest.raises(ValueError, match=r"'imp'.*paper/configs/fig5a.py"):
        fig5a.panels(grid, "best")


def test_fig5b_draws_the_mean_squares(grid: list[rows.Row]) -> None:
    sizes = np.array([100, 1000, 5000])
    dense = [row for row in grid if row["compression"] == 1]
    with pytest.raises(ValueError, match=r"lacks mean_squares.*Train it again"):
        fig5b.draw(dense)
    for row in grid:
        factor = 1 + row["seed"]
        row["mean_squares"] = [
            {
                "name": str(size),
                "size": int(size),
                "initial": 0.01 * factor,
                "final": 3.0 * factor / size,
            }
            for size in sizes
        ]
    figure = fig5b.draw(grid)
    (ax,) = figure.axes
    before, after = ax.containers
    assert (before.get_label(), after.get_label()) == (
        "before training: slope 0.00",
        "after training: slope 1.00",
    )
    for container, mean in ((before, np.full(3, 0.015)), (after, 4.5 / sizes)):
        np.testing.assert_allclose(container[0].get_xdata(), 1 / sizes)
        np.testing.assert_allclose(container[0].get_ydata(), mean)
        ends = np.array(container[2][0].get_segments())[
            :, :, 1
        ]  # from the least to the largest of the seeds
        np.testing.assert_allclose(ends, np.outer(mean, [2 / 3, 4 / 3]))
    assert "seeds 0, 1" in ax.get_title()
    with pytest.raises(ValueError, match=r"no row is at compression 1"):
        fig5b.draw([row for row in grid if row["compression"] > 1])


def test_fig6_has_a_panel_per_network_and_published_curves_behind(tmp_path: pathlib.Path) -> None:
    names = [("cifar_vgg11_bn", "cifar10"), ("tiny_wide_resnet18", "cifar10"), ("fc", "digits")]
    folders = [
        _write(tmp_path / model, _grid(model=model, dataset=dataset, width_multiplier=0.5))
        for model, dataset in names
    ]
    behind = published.read(ROOT / "paper" / "published" / "fig6.json")
    figure = fig6.draw(fig6.panels(rows.read_trained(folders), "best"), "best", behind)
    panels = {
        ax.get_title().split()[0]: number for number, ax in enumerate(figure.axes) if ax.get_title()
    }
    assert list(panels) == ["cifar_vgg11_bn", "tiny_wide_resnet18", "fc"]
    assert "was not widened" in figure.axes[panels["tiny_wide_resnet18"]].get_title()
    source = json.loads((ROOT / "paper" / "published" / "fig6.json").read_text())
    wanted = source["panels"][0]["top1"]["synflow"]
    assert (source["panels"][0]["model"], source["panels"][0]["dataset"]) == names[0]
    pale = [line for line in figure.axes[0].lines if line.get_alpha() == 0.3]
    assert len(pale) == len(CURVES)  # random is published, and not ours
    (line,) = [line for line in pale if line.get_color() == accuracy.STYLES["synflow"].color]
    np.testing.assert_allclose(line.get_xdata(), 10 ** np.arange(0, 3.1, 0.25))
    np.testing.assert_allclose(line.get_ydata(), np.mean(wanted, axis=0))
    assert not [line for line in figure.axes[panels["fc"]].lines if line.get_alpha() == 0.3]
    assert "published" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_fig6_config_names_the_published_panels() -> None:
    spec = importlib.util.spec_from_file_location(
        "configs.fig6", ROOT / "paper" / "configs" / "fig6.py"
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    networks, datasets = ("vgg11", "vgg16", "resnet18", "wide_resnet18"), ("c10", "c100", "tiny")
    found = [
        module.get_config(f"{network}_{dataset}") for network in networks for dataset in datasets
    ]
    behind = published.read(ROOT / "paper" / "published" / "fig6.json")
    assert {(settings.model, settings.dataset) for settings in found} == set(behind) and len(
        behind
    ) == 12
    for settings in found:
        np.testing.assert_allclose(
            settings.grid.compression, behind[settings.model, settings.dataset].compression
        )
        assert set(settings.grid.pruner) == set(behind[settings.model, settings.dataset].top1)
    with pytest.raises(ValueError, match=r"fig6.py:vgg11_mnist is unknown"):
        module.get_config("vgg11_mnist")


def test_fig7_draws_many_iterations_and_a_single_one(
    tmp_path: pathlib.Path, grid: list[rows.Row]
) -> None:
    pairs = [
        *(
            _pair("snip", at, seed, 60, False, num_iterations=100)
            for at in (10.0, 100.0)
            for seed in (0, 1)
        ),
        *(_pair("imp", 100.0, 0, 40 + number, False, num_iterations=number) for number in (1, 4)),
    ]
    found = fig7.panels([*grid, *rows.read_trained([_write(tmp_path / "more", pairs)])], "best")
    lines = _lines(fig7.draw(found, "best"))
    curves = {
        label: line.get_linestyle() for label, line in lines.items() if not label.startswith("_")
    }
    assert curves == {
        "snip, 1 iteration": "--", "snip, 100 iterations": "-", "grasp, 1 iteration": "--",
        "synflow, 1 iteration": "--", "imp, 4 levels": "-",
    }  # fmt: skip
    np.testing.assert_allclose(lines["imp, 4 levels"].get_data(), [[1, 100], [98, 44]])
    np.testing.assert_allclose(
        lines["snip, 100 iterations"].get_data(), [[1, 10, 100], [98, 60, 60]]
    )
    with pytest.raises(ValueError, match=r"no row above compression 1"):
        fig7.panels([row for row in grid if row["pruner"] == "magnitude"], "best")


def test_rows_that_do_not_fit(tmp_path: pathlib.Path, grid: list[rows.Row]) -> None:
    with pytest.raises(
        ValueError, match=r"2 networks \(conv on digits, conv at width 2 on digits\)"
    ):
        fig1.panels(
            [*grid, {**grid[0], "width_multiplier": 2.0, "config": {"width_multiplier": 2.0}}],
            "best",
        )
    twin = next(
        row for row in grid if (row["pruner"], row["compression"], row["seed"]) == ("snip", 100, 1)
    )
    with pytest.raises(
        ValueError,
        match=r"two rows are of snip at compression 100, seed 1: .* and other\. They differ",
    ):
        fig1.panels([*grid, {**twin, "run_id": "other"}], "best")
    with pytest.raises(ValueError, match=r"--accuracy=mean is unknown. Choose one of best, last"):
        fig1.panels(grid, "mean")
    with pytest.raises(
        ValueError, match=r"rows.jsonl does not exist. Make rows by python train.py --config=paper"
    ):
        rows.read_trained([tmp_path / "none"])
    with pytest.raises(ValueError, match=r"--config=paper/configs/fig6_digits.py"):
        rows.read_trained([tmp_path / "none"], "fig6")
    with pytest.raises(ValueError, match=r"--config=paper/configs/fig3.py"):
        rows.read(tmp_path / "none", "fig3")
    with pytest.raises(ValueError, match=r"holds no training row"):
        rows.read_trained([_write(tmp_path / "pruned", [_pair("snip", 10.0, 0, 90, False)[:1]])])
    bad = tmp_path / "bad.json"
    for text in ("{", "[]", '{"log10_compression": [0, 1], "panels": [{"model": "fc"}]}'):
        bad.write_text(text)
        with pytest.raises(
            ValueError, match=r"bad.json' cannot be used.*paper/published/fig6.json"
        ):
            published.read(bad)
    ragged = {"model": "fc", "dataset": "digits", "top1": {"snip": [[1.0]]}}
    bad.write_text(json.dumps({"log10_compression": [0, 1], "panels": [ragged]}))
    with pytest.raises(ValueError, match=r"cannot be used"):
        published.read(bad)


def test_the_command_draws_from_several_folders(tmp_path: pathlib.Path) -> None:
    pairs = _grid()
    first, second = _write(tmp_path / "a", pairs[::2]), _write(tmp_path / "b", pairs[1::2])
    command = [
        sys.executable,
        "-m",
        "paper",
        "fig1",
        f"--rows={first},{second}",
        f"--out={tmp_path}",
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and result.stderr == ""
    assert "  synflow: 98.0 % at 1, 20.0 % at 1,000; never collapsed" in result.stdout.splitlines()
    assert (tmp_path / "fig1.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "fig1.pdf").read_bytes().startswith(b"%PDF")
