"""How a domain matrix is shown: tables of losses, selectivities and accuracies."""

from collections.abc import Collection, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from .matrix_rows import ChoiceRow, LossRow, Selectivity
from .report import ranged, signed, thousands


def losses(rows: Sequence[LossRow], ratios: Sequence[Selectivity]) -> Table:
    """A line for each set and model; selectivity is that against the first set of the domain."""
    compared = any(row.increase for row in rows)
    by = {(r.model, r.off): r for r in ratios if r.on == ratios[0].on}
    columns = ["set", "items", "model", "bits per byte"]
    columns += ["Δ nats per byte", "selectivity"] * compared
    table = _table("Texts", columns, left=(0, 2))
    for row in rows:
        cells = [_name(row.set, row.own), thousands(row.items), row.model]
        cells.append(ranged(row.bits_per_byte))
        if compared:
            ratio = by.get((row.model, row.set))
            cells += [
                "-" if row.increase is None else ranged(row.increase, signed),
                "-" if ratio is None else told(ratio),
            ]
        table.add_row(*map(Text, cells))
    return table


def summaries(ratios: Sequence[Selectivity], sets: Collection[str]) -> Table:
    """What was lost on each set of the domain, and on the groups of sets off it."""
    columns = ["model", "on", "off", "Δ nats per byte on", "off", "selectivity"]
    table = _table("Selectivity", columns, left=(0, 1, 2))
    for r in ratios:
        if r.off not in sets:
            cells = [r.model, r.on, r.off, ranged(r.on_increase, signed)]
            table.add_row(*map(Text, [*cells, ranged(r.off_increase, signed), told(r)]))
    return table


def choices(rows: Sequence[ChoiceRow]) -> Table:
    """A line for each set and model; shares in percent."""
    compared = any(row.acc_difference for row in rows)
    columns = ["set", "items", "chance, %", "model", "acc, %", "acc_norm, %"]
    columns += ["Δ acc, %", "won/lost, p"] * compared
    table = _table("Questions", columns, left=(0, 3))
    for row in rows:
        cells = [row.set, thousands(row.items), _share(row.chance), row.model]
        cells.append(ranged(row.acc, _share))
        cells.append("-" if row.acc_norm is None else ranged(row.acc_norm, _share))
        if compared:
            change = row.acc_difference
            cells.append("-" if change is None else ranged(change, lambda v: f"{100 * v:+.1f}"))
            cells.append("-" if row.p is None else f"{row.won}/{row.lost}, {row.p:.2g}")
        table.add_row(*map(Text, cells))
    return table


def told(ratio: Selectivity) -> str:
    """`5.20 [3.10, 9.80]`; a bound that is not there is told as such."""
    if ratio.value is None:
        return "not defined"
    low, high = (None if v is None else f"{v:.2f}" for v in (ratio.low, ratio.high))
    return f"{ratio.value:.2f} [{low or 'no bound'}, {high or 'no bound'}]"


def _name(name: str, own: bool) -> str:
    return f"{name} *" if own else name


def _share(value: float) -> str:
    return f"{100 * value:.1f}"


def _table(title: str, columns: Sequence[str], left: Collection[int]) -> Table:
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        justify = "left" if number in left else "right"
        table.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]
    return table
