"""Draws a figure of the paper from the rows that prune.py or train.py has left in a folder, as NAME.png and NAME.pdf.

    python -m paper fig2 --rows=runs/fig2
    python -m paper fig6 --rows=runs/vgg,runs/resnet --published=paper/published/fig6.json

NAME is one of fig1, fig2, fig3, fig4, fig5a, fig5b, fig6, fig7 and schedule; paper/configs/NAME.py makes the rows.
`ablations` is a table, ablations.md, of the rows of paper/configs/ablations.py.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import flags

from paper.figures import (
    ablations,
    accuracy,
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
_OUT = flags.DEFINE_string("out", None, "the folder for the pictures; that of the rows by default")
_ACCURACY = flags.DEFINE_string(
    "accuracy", "best", "best: of the best epoch, as in the paper; or last"
)
_PUBLISHED = flags.DEFINE_string(
    "published", None, "published accuracies, drawn behind: paper/published/fig6.json"
)

_PRUNING = {"fig2": fig2.draw, "fig3": fig3.draw, "fig4": fig4.draw, "schedule": schedule.draw}
_ACCURACIES = {
    "fig1": (fig1.panels, fig1.draw), "fig5a": (fig5a.panels, fig5a.draw), "fig6": (fig6.panels, fig6.draw),
    "fig7": (fig7.panels, fig7.draw),
}  # fmt: skip
_NAMES = sorted([*_PRUNING, *_ACCURACIES, "fig5b"])


def _draw(name: str, folders: Sequence[pathlib.Path]) -> Figure:
    if name == "fig5b":
        return fig5b.draw(rows.read_trained(folders))
    if name in _PRUNING:
        if len(folders) != 1:
            raise ValueError(
                f"--rows names {len(folders)} folders, and {name} is of one: choose one of them."
            )
        return _PRUNING[name](rows.read(folders[0]), folders[0])
    panels, draw = _ACCURACIES[name]
    behind = None if _PUBLISHED.value is None else published.read(pathlib.Path(_PUBLISHED.value))
    found = panels(rows.read_trained(folders), _ACCURACY.value)
    for panel in found:
        print("\n".join(accuracy.summary(panel)))
    return draw(found, _ACCURACY.value, behind)


def _table(folder: pathlib.Path, out: pathlib.Path) -> None:
    lines = ablations.table(folder)
    storage.check_writable(out, "out")
    ablations.show(lines)
    storage.write_bytes(out / "ablations.md", ablations.markdown(lines).encode())
    print(out / "ablations.md")


def main(argv: Sequence[str]) -> None:
    """Reads the rows, draws, writes two files and names them."""
    names = ", ".join([*_NAMES, "ablations"])
    if len(argv) != 2:
        raise ValueError(
            f"{len(argv) - 1} figures are named; name one of {names}, and the rows: --rows=DIR."
        )
    if argv[1] not in [*_NAMES, "ablations"]:
        raise ValueError(f"figure {argv[1]!r} is unknown. Choose one of {names}.")
    if not _ROWS.value:
        raise ValueError(
            "--rows is missing: the folder that prune.py or train.py wrote, its --workdir."
        )
    name, folders = argv[1], [pathlib.Path(folder) for folder in _ROWS.value]
    out = folders[0] if _OUT.value is None else pathlib.Path(_OUT.value)
    if name == "ablations":
        _table(folders[0], out)
        return
    figure = _draw(name, folders)
    storage.check_writable(out, "out")
    for ending in ("png", "pdf"):
        pictures.save(figure, out / f"{name}.{ending}")
        print(out / f"{name}.{ending}")


if __name__ == "__main__":
    cli.run(main, words=True)
