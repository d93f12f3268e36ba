"""Tables for people, as wide as their text: on a narrower terminal it is folded, never cut."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

# Where the output is no terminal nothing limits its width.
WIDE = 400


def make_console() -> "Console":
    """Standard output, with text as it is and lines as long as they are."""
    from rich.console import Console

    console = Console(highlight=False, markup=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = WIDE
    return console


def make_table(*titles: str, right: int = 0) -> "Table":
    """An empty table with these columns, of which the last `right` are set to the right."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for title in titles:
        table.add_column(title, overflow="fold")
    for column in table.columns[len(titles) - right :]:
        column.justify = "right"
    return table
