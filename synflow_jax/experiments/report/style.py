"""Makes the console, the tables and the text fragments that all reports share."""

from __future__ import annotations

from collections.abc import Sequence

import rich.box
import rich.console
import rich.markup
import rich.table
from rich.console import Console

_WIDTH_OF_LOGS = 110


def console() -> Console:
    """Returns a console on standard output, wide enough in logs for whole tables."""
    output = Console(highlight=False)
    # Without a terminal rich assumes 80 columns, which would cut the tables.
    return output if output.is_terminal else Console(highlight=False, width=_WIDTH_OF_LOGS)


def table(left: Sequence[str], right: Sequence[str]) -> rich.table.Table:
    """Returns an empty table.

    Args:
      left: the titles of the first columns, which are flush left.
      right: the titles of the columns after them, which are flush right.
    """
    found = rich.table.Table(header_style="bold", box=rich.box.SIMPLE)
    for title in left:
        found.add_column(title, no_wrap=True)
    for title in right:
        found.add_column(title, justify="right", no_wrap=True)
    return found


def percent(fraction: float) -> str:
    """Returns a fraction in per cent.

    >>> percent(0.98765)
    '98.77 %'
    """
    return f"{100 * fraction:.2f} %"


def error(message: object) -> str:
    """Returns an error as rich markup, whatever brackets it holds."""
    return f"[bold red]failed:[/bold red] {rich.markup.escape(str(message))}"
