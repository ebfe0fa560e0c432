"""The words and tables of a certificate: certificate.md, and its section of a model card."""

from collections.abc import Callable, Sequence
from pathlib import Path

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .certificate_form import FILE, Certificate, Interval, Relearning, Selectivity
from .compare_text import short
from .relearn_text import ratio_text
from .report import fenced, percent, plain, signed, size, table, thousands, times

Cells = list[list[str]]  # of a table, the header first


def markdown(c: Certificate) -> str:
    """The text of certificate.md."""
    parts = [
        f"# Certificate: {Path(c.model.name).name}", c.purpose, fenced(c.command, "sh"),
        *_body(c, "##"),
        "## Where the figures come from", table(sources(c)),
        "## Models", table(_models(c)),
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


def card_section(c: Certificate) -> str:
    """The section of a model card."""
    told = f"`{FILE}` has every figure with its command and the hash of its data."
    return "\n\n".join(["## Certificate", c.purpose, *_body(c, "###"), told])


def shown(c: Certificate, files: Sequence[Path]) -> RenderableType:
    """What the command line prints."""
    found: list[RenderableType] = [Text(c.purpose), _drawn(summary(c))]
    if c.off_domain:
        found.append(_drawn(off_domain(c)))
    found += [Text(f"Not measured: {n}. {command}") for n, command in c.not_measured.items()]
    found += [Text(f"Written: {', '.join(map(str, files))}")] if files else []
    return Group(*found)


def selectivity_text(s: Selectivity) -> str:
    """`6.2 [5.1, 7.9]`; `unbounded` where nothing was lost on the domain."""
    if s.value is None:
        return "unbounded: no loss on the domain" if s.unbounded else "not defined: no loss at all"
    if s.low is None and s.high is None:
        return f"{s.value:.3g}"
    ends = ["open" if end is None else f"{end:.3g}" for end in (s.low, s.high)]
    return f"{s.value:.3g} [{', '.join(ends)}]"


def relearning_text(r: Relearning) -> str:
    """`0.31 [0.28, 0.35]`, `below 0.02`, `above 4`, `unknown`."""
    return ratio_text(r.ratio, (r.at_least, r.at_most), (r.low, r.high))


def interval_text(i: Interval, text: Callable[[float], str] = plain) -> str:
    """`2.404 [2.35, 2.46]`; the value alone where there is no interval."""
    if i.low is None or i.high is None or i.low == i.high:
        return text(i.value)
    return f"{text(i.value)} [{text(i.low)}, {text(i.high)}]"


def _body(c: Certificate, level: str) -> list[str]:
    lacking = [f"- {name}: `{command}`" for name, command in c.not_measured.items()]
    parts = [table(summary(c))]
    if c.off_domain:
        parts += [f"{level} What it is not for", table(off_domain(c))]
    if lacking:
        parts += [f"{level} Not measured", "\n".join(lacking)]
    return parts


def summary(c: Certificate) -> Cells:
    """The figures of the whole model and of this one; the header first."""
    d, away = c.on_domain, c.selectivity
    cells = [
        ["figure", "whole model", "this model"],
        ["parameters", thousands(c.original.parameters), thousands(c.model.parameters)],
        ["bytes of weights", _bytes(c.original.bytes), _bytes(c.model.bytes)],
        [f"loss on {d.domain}, nats/token", *(interval_text(i) for i in d.loss)],
        ["  bits per byte", *(interval_text(i) for i in d.bits_per_byte)],
        ["  increase of bits per byte", "-", interval_text(d.increase, _signed_percent)],
        ["  top-1 accuracy", *(interval_text(i, percent) for i in d.accuracy)],
        ["trained after the removal, tokens", "-", thousands(c.recovered_tokens)],
    ]
    for name in ("prefill", "decode"):
        told = "not measured" if c.speed is None else interval_text(getattr(c.speed, name), times)
        cells.append([f"{name} speed-up", "1", told])
    told = "not measured" if away is None else f"{selectivity_text(away)} ({away.over})"
    cells.append(["selectivity", "-", told])
    for r in c.relearning:
        reached = f"never within {short(r.budget)}" if r.tokens is None else short(r.tokens)
        told = f"{relearning_text(r)} ({reached} tokens to {plain(r.target)} nats)"
        cells.append([f"relearning of {r.domain} ÷ fresh weights", "-", told])
    if not c.relearning:
        cells.append(["relearning ÷ fresh weights", "-", "not measured"])
    for kind, share in c.stability.items():
        cells.append([f"score stability, {kind}", "-", percent(share)])
    return cells


def off_domain(c: Certificate) -> Cells:
    """Losses and accuracies off the domain; the header first."""
    cells = [["off the domain", "measure", "whole model", "this model",
              "increase, nats/byte or accuracy"]]  # fmt: skip
    for o in c.off_domain:
        text = plain if o.measure == "bits_per_byte" else percent
        rise = signed if o.measure == "bits_per_byte" else _signed_percent
        cells.append([
            o.name, o.measure.replace("_", " "), interval_text(o.before, text),
            interval_text(o.after, text),
            "-" if o.increase is None else interval_text(o.increase, rise),
        ])  # fmt: skip
    return cells


def sources(c: Certificate) -> Cells:
    """Each command once, with what it measured and the data."""
    found: dict[str, list[str]] = {}
    for command, what in _measured(c):
        found.setdefault(command, []).append(what)
    return [["command", "what, and SHA-256 of the data"]] + [
        [f"`{command}`", "; ".join(dict.fromkeys(what))] for command, what in found.items()
    ]


def _measured(c: Certificate) -> list[tuple[str, str]]:
    found = [(c.made_by, "the model"), (c.on_domain.command, f"{c.on_domain.domain} "
                                        f"{c.on_domain.sha256 or 'not known'}")]  # fmt: skip
    found += [(c.speed.command, "speed")] if c.speed else []
    found += [(o.command, f"{o.name} {o.sha256 or 'not known'}") for o in c.off_domain]
    found += [(c.selectivity.command, "selectivity")] if c.selectivity else []
    return found + [(r.command, f"relearning of {r.domain}") for r in c.relearning]


def _models(c: Certificate) -> Cells:
    pair = {"whole": c.original, "this": c.model}
    return [["", "name", "SHA-256"]] + [[n, f"`{w.name}`", w.sha256] for n, w in pair.items()]


def _bytes(value: int | None) -> str:
    return "-" if value is None else size(value)


def _signed_percent(value: float) -> str:
    return f"{100 * value:+.1f} %"


def _drawn(cells: Cells) -> Table:
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, name in enumerate(cells[0]):
        drawn.add_column(name, justify="left" if number == 0 else "right", overflow="fold")
    for line in cells[1:]:
        drawn.add_row(*map(Text, line))
    return drawn
