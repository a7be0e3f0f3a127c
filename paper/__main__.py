"""Draws a figure of the paper from the rows that prune.py or train.py left in a folder.

    python -m paper fig2 --rows=runs/fig2
    python -m paper fig6 --rows=runs/vgg,runs/resnet --published=paper/published/fig6.json

The first word names the figure: fig1, fig2, fig3, fig4, fig5a, fig5b, fig6, fig7 or schedule. Its
rows are made by the config of the same name in paper/configs. It is written as a PNG and a PDF of
that name. `ablations` is a table, written as ablations.md.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import flags

from paper.figures import (
    ablations,
    curves,
    fig1,
    fig2,
    fig3,
    fig4,
    fig5a,
    fig5b,
    fig6,
    fig7,
    published,
    rows,
    schedule,
)
from synflow_jax import storage
from synflow_jax.experiments import cli, pictures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ROWS = flags.DEFINE_list(
    "rows", None, "the folder that prune.py or train.py wrote, its --workdir; or several: A,B"
)
_OUT = flags.DEFINE_string("out", None, "the folder to write to; by default that of the rows")
_ACCURACY = flags.DEFINE_string(
    "accuracy", "best", "the epoch whose test accuracy is drawn: best, as in the paper, or last"
)
_PUBLISHED = flags.DEFINE_string(
    "published",
    None,
    "a file of published accuracies to draw behind fig1 or fig6, such as paper/published/fig6.json",
)

# Figures of pruning rows, of one folder.
_OF_PRUNING = {"fig2": fig2, "fig3": fig3, "fig4": fig4, "schedule": schedule}
# Figures of accuracy against compression, of training rows. Those in `_OF_RULES` have one curve per
# rule, as the published accuracies do.
_OF_ACCURACY = {"fig1": fig1, "fig5a": fig5a, "fig6": fig6, "fig7": fig7}
_OF_RULES = {"fig1": fig1, "fig6": fig6}
_NAMES = [*sorted([*_OF_PRUNING, *_OF_ACCURACY, "fig5b"]), "ablations"]


def main(argv: Sequence[str]) -> None:
    """Reads the rows, draws the figure, writes its files and prints their names."""
    name = _name(argv[1:])
    if not _ROWS.value:
        raise ValueError(
            "--rows is missing: name the folder that prune.py or train.py wrote, its --workdir."
        )
    if _PUBLISHED.value is not None and name not in _OF_RULES:
        raise ValueError(
            f"--published={_PUBLISHED.value!r} has no effect on {name}: there are published "
            f"accuracies for {' and '.join(_OF_RULES)} only. Leave it out."
        )
    folders = [cli.check_path(folder, "rows") for folder in _ROWS.value]
    out = folders[0] if _OUT.value is None else cli.check_path(_OUT.value, "out")
    if name == "ablations":
        _write_table(folders[0], out)
    else:
        _write_figure(name, _draw(name, folders), out)


def _name(words: Sequence[str]) -> str:
    if len(words) != 1:
        raise ValueError(
            f"name one figure: {', '.join(_NAMES)}. Name the folder of its rows as --rows=DIR."
        )
    if words[0] not in _NAMES:
        raise ValueError(f"figure {words[0]!r} is unknown. Choose one of {', '.join(_NAMES)}.")
    return words[0]


def _draw(name: str, folders: Sequence[pathlib.Path]) -> Figure:
    if name in _OF_PRUNING:
        if len(folders) != 1:
            raise ValueError(
                f"--rows names {len(folders)} folders, and {name} shows one: choose one of them."
            )
        return _OF_PRUNING[name].draw(rows.read(folders[0], name))
    if name == "fig5b":
        return fig5b.draw(rows.read_trained(folders, name))
    return _draw_accuracy(name, folders)


def _draw_accuracy(name: str, folders: Sequence[pathlib.Path]) -> Figure:
    epoch = _ACCURACY.value
    behind = (
        None
        if _PUBLISHED.value is None
        else published.read(cli.check_path(_PUBLISHED.value, "published"))
    )
    panels = _OF_ACCURACY[name].panels(rows.read_trained(folders, name), epoch)
    for panel in panels:
        print("\n".join(curves.summary(panel)))
    if name in _OF_RULES:
        return _OF_RULES[name].draw(panels, epoch, behind)
    return _OF_ACCURACY[name].draw(panels, epoch)


def _write_figure(name: str, figure: Figure, out: pathlib.Path) -> None:
    storage.check_writable(out, "out")
    for suffix in ("png", "pdf"):
        path = out / f"{name}.{suffix}"
        pictures.save(figure, path)
        print(path)


def _write_table(folder: pathlib.Path, out: pathlib.Path) -> None:
    lines = ablations.table(folder)
    storage.check_writable(out, "out")
    ablations.show(lines)
    path = out / "ablations.md"
    storage.write_bytes(path, ablations.markdown(lines).encode())
    print(path)


if __name__ == "__main__":
    cli.run(main, words=True)
