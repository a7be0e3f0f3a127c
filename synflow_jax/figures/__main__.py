"""Draws a figure of the paper from the rows that prune.py has left in a folder, as NAME.png and NAME.pdf.

    python -m synflow_jax.figures fig2 --rows=runs/fig2

NAME is one of fig2, fig3, fig4 and schedule; configs/NAME.py makes the rows. `ablations` is a table, ablations.md.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from absl import flags

from synflow_jax import cli, figures, storage
from synflow_jax.figures import ablations, fig2, fig3, fig4, rows, schedule

_ROWS = flags.DEFINE_string("rows", None, "the folder that prune.py wrote: its --workdir")
_OUT = flags.DEFINE_string("out", None, "the folder for the pictures; that of the rows by default")

_FIGURES = {"fig2": fig2.draw, "fig3": fig3.draw, "fig4": fig4.draw, "schedule": schedule.draw}


def _table(folder: pathlib.Path, out: pathlib.Path) -> None:
    lines = ablations.table(folder)
    storage.check_writable(out, "out")
    ablations.show(lines)
    storage.write_bytes(out / "ablations.md", ablations.markdown(lines).encode())
    print(out / "ablations.md")


def main(argv: Sequence[str]) -> None:
    """Reads the rows, draws, writes two files and names them."""
    names = ", ".join([*_FIGURES, "ablations"])
    if len(argv) != 2:
        raise ValueError(f"{len(argv) - 1} figures are named; name one of {names}, and the rows: --rows=DIR.")
    if argv[1] not in [*_FIGURES, "ablations"]:
        raise ValueError(f"figure {argv[1]!r} is unknown. Choose one of {names}.")
    if _ROWS.value is None:
        raise ValueError("--rows is missing: the folder that prune.py wrote, its --workdir.")
    name, folder = argv[1], pathlib.Path(_ROWS.value)
    out = folder if _OUT.value is None else pathlib.Path(_OUT.value)
    if name == "ablations":
        _table(folder, out)
        return
    figure = _FIGURES[name](rows.read(folder), folder)
    storage.check_writable(out, "out")
    for ending in ("png", "pdf"):
        figures.save(figure, out / f"{name}.{ending}")
        print(out / f"{name}.{ending}")


if __name__ == "__main__":
    cli.run(main, words=True)
