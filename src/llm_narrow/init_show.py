"""What `llm-narrow init` prints."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table

if TYPE_CHECKING:
    from .init import Written
    from .init_recipes import Shipped


def listed(found: Iterable["Shipped"]) -> RenderableType:
    """The shipped recipes, and how to take one."""
    table = Table(title="Recipes", title_justify="left", box=box.SIMPLE, show_lines=True)
    for column in ("name", "for", "needs"):
        table.add_column(column, no_wrap=column == "name")
    for one in found:
        table.add_row(one.name, one.what, one.needs)
    return Group(table, "llm-narrow init mine.yaml --template NAME writes one to be changed.")


def written(done: "Written") -> RenderableType:
    """Where the recipe is, and what comes next."""
    look, go = done.following
    return Group(f"Written to {done.file}. See what would go:", f"  {look}", "Then:", f"  {go}")
