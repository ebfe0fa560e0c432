"""The text of an explanation: snippets cut out of blocks, and what is printed of them."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .explain_form import Attended, Explained, Explanation, Lot, Often, Snippet
from .report import percent, thousands

if TYPE_CHECKING:
    from .blocks import Blocks
    from .cleaning import Document
    from .explain_use import Top

SHOWN = 3  # snippets of a unit on a terminal
ASIDE = 24  # characters on either side of the token there
SAME = 8  # tokens before a place that make it the same text as another
OFTEN = 5  # tokens that are told
UNSEEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def snippets(
    top: "Top", blocks: "Blocks", tokenizer: Any, documents: "Sequence[Document]",
    *, number: int, context: int,
) -> tuple[Snippet, ...]:  # fmt: skip
    """The strongest uses in their text, at most `number`.

    `context` tokens of the same document stand on either side. Of uses nearer to each other than
    that, and of those after the same SAME tokens, the strongest is taken, as long as there are
    others.
    """
    length = blocks.tokens.shape[1]
    found = []
    for n in sorted(_apart(top.places.tolist(), blocks, context)[:number]):
        block, position = divmod(int(top.places[n]), length)
        owner = blocks.documents[block]
        own = (owner == owner[position]).nonzero().flatten().tolist()
        begin, end = max(own[0], position - context), min(own[-1], position + context) + 1
        ids = blocks.tokens[block, begin:end].tolist()
        before, token, after = cut(tokenizer, ids, position - begin)
        document = documents[int(owner[position])]
        found.append(
            Snippet(
                before=before, token=token, after=after, use=float(top.uses[n]),
                project=_whole(document.project), path=_whole(document.path), block=block,
                position=position,
                attended=_attended(top, n, blocks.tokens[block].tolist(), position, tokenizer),
            )
        )  # fmt: skip
    return tuple(found)


def often(top: "Top", blocks: "Blocks", tokenizer: Any) -> tuple[Often, ...]:
    """The tokens that are most often among the strongest uses."""
    ids = blocks.tokens.flatten()[top.places].tolist()
    return tuple(
        Often(token=_decoded(tokenizer, [index]), count=count)
        for index, count in Counter(ids).most_common(OFTEN)
    )


def cut(tokenizer: Any, ids: Sequence[int], at: int) -> tuple[str, str, str]:
    """The text of the tokens in three: before the one at `at`, that one, and after it.

    Together they are the text of all. Where a token is a part of a character, the whole character
    stands for it.
    """
    whole = _decoded(tokenizer, ids)
    first = _shared(whole, _decoded(tokenizer, ids[:at]))
    last = first
    while last == first and at < len(ids):
        at += 1
        last = _shared(whole, _decoded(tokenizer, ids[:at]))
    return whole[:first], whole[first:last], whole[last:]


def shown(found: Explanation, file: object) -> RenderableType:
    """What the command line prints: a table for each kind, and what its reader has to know."""
    parts: list[RenderableType] = [Text(found.chosen), *(Text(note) for note in found.notes)]
    kinds = dict.fromkeys(unit.kind for unit in found.units)
    lots = {lot.kind: lot for lot in found.kinds}
    for kind in kinds:
        units = [unit for unit in found.units if unit.kind == kind]
        parts.append(_table(kind if kind not in lots else lot_line(lots[kind]), units))
    return Group(*parts, Text(f"Written: {file}"))


def lot_line(lot: Lot) -> str:
    """What went of a kind, and how much of the use that was."""
    line = f"{thousands(lot.removed)} of {thousands(lot.units)} {lot.kind} were removed"
    if not lot.removed:
        return f"{line}."
    return f"{line}; in the layers that lost some, they had {percent(lot.share)} of the use."


def about(unit: Explained) -> str:
    """A unit in one line: what became of it, its score's place, its part in its layer's use."""
    rank = "" if unit.rank is None else f"rank {thousands(unit.rank)} of {thousands(unit.size)}; "
    return (
        f"{_went(unit)}; {rank}{part(unit.share)} of its layer's use, of its own "
        f"{percent(unit.concentration)} at {unit.strongest} tokens"
    )


def part(share: float) -> str:
    """`12.3 %`, and of small shares two figures: `0.042 %`."""
    return percent(share) if share >= 0.01 or not share else f"{100 * share:.2g} %"


def visible(text: str) -> str:
    """Text that changes nothing on a terminal: breaks and controls by pictures, on one line."""
    return UNSEEN.sub(lambda m: _picture(m[0]), text)


def ends(snippet: Snippet, aside: int = ASIDE) -> tuple[str, str, str]:
    """A snippet on one line, `aside` characters on either side of its token."""
    before, after = visible(snippet.before), visible(snippet.after)
    left = f"…{before[-aside:]}" if len(before) > aside else before
    right = f"{after[:aside]}…" if len(after) > aside else after
    return left, visible(snippet.token), right


def attended(found: Attended) -> str:
    """What a head looked at, in words."""
    return (
        f"looks at {visible(repr(found.token))}, {found.back} tokens back "
        f"({percent(found.share)} of its attention)"
    )


def _table(title: str, units: Sequence[Explained]) -> Table:
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("unit", no_wrap=True)
    table.add_column("most often", overflow="fold")
    table.add_column("used most", overflow="fold", ratio=1)
    for unit in units:
        rank = f"{thousands(unit.rank)} of {thousands(unit.size)} by score" if unit.rank else ""
        lines = [unit.name, _went(unit), rank, f"{part(unit.share)} of layer's use"]
        often = "\n".join(f"{o.count} x {visible(repr(o.token))}" for o in unit.often[:SHOWN])
        found = [_line(snippet) for snippet in unit.snippets[:SHOWN]] or [Text("never")]
        name = Text("\n".join(line for line in lines if line))
        table.add_row(name, Text(often), Text("\n").join(found), end_section=True)
    return table


def _went(unit: Explained) -> str:
    went = "kept" if unit.kept else "removed"
    return unit.why if unit.why.endswith(went) else f"{went} ({unit.why})"


def _line(snippet: Snippet) -> Text:
    before, token, after = ends(snippet)
    return Text.assemble(before, (f"»{token}«", "bold"), after)


def _apart(places: Sequence[int], blocks: "Blocks", context: int) -> list[int]:
    """The places' numbers: first those with no stronger one near or after the same text, then the
    others."""
    length = blocks.tokens.shape[1]
    taken: list[int] = []
    seen: set[tuple[int, ...]] = set()
    for n, place in enumerate(places):
        block, position = divmod(place, length)
        text = tuple(blocks.tokens[block, max(0, position - SAME) : position + 1].tolist())
        same = (m for m in taken if places[m] // length == block)
        if not any(abs(place - places[m]) <= context for m in same) and text not in seen:
            taken.append(n)
            seen.add(text)
    first = set(taken)
    return [*taken, *(n for n in range(len(places)) if n not in first)]


def _attended(
    top: "Top", n: int, tokens: Sequence[int], position: int, tokenizer: Any
) -> Attended | None:
    place = int(top.attended[n])
    if place < 0:
        return None
    token = _decoded(tokenizer, [tokens[place]])
    return Attended(token=token, back=position - place, share=float(top.attention[n]))


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    text = tokenizer.decode(
        list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return str(text)


def _shared(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    pairs = zip(one, other, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _whole(text: str) -> str:
    """Without the halves of characters that names of files may hold, which JSON cannot."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _picture(letter: str) -> str:
    code = ord(letter)
    if letter == "\n":
        return "↵"
    return chr(0x2400 + code) if code < 0x20 else "\ufffd"
