"""The command `explain`: what the units that a run removed, and those it kept, are used for.

The model that the run began with reads text of the run's domain, and the places that use a unit
most are told with the text around them.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, RenderableType
from torch import Tensor

from . import explain_text, explain_use, inputs
from . import recipe as recipes
from .blocks import Blocks
from .cache import no_space
from .compare_shapes import METHODS
from .domains import Domain
from .errors import BadInput, NarrowError, UnknownName, first_line
from .explain_form import FILE, Explained, Explanation, Layer, Lot
from .explain_units import KINDS, Decided, Unit, chosen, decided, named
from .explain_use import Uses
from .models import Loaded
from .precision import copied
from .progress import Track
from .recipe import Recipe
from .relearn_subjects import manifests
from .report import at
from .scores import CRITERIA
from .sections import counted
from .units import Kind

TOKENS = 16384  # that are read unless asked otherwise


@dataclass(frozen=True)
class Told:
    """What was explained, and the file that has it."""

    file: Path
    explanation: Explanation

    def facts(self) -> dict[str, Any]:
        """What `--json` prints, which is what the file holds."""
        return self.explanation.model_dump(mode="json")

    def shown(self) -> RenderableType:
        """What the command line prints."""
        return explain_text.shown(self.explanation, self.file)


@dataclass(frozen=True)
class _Run:
    """The run in which units went: its folder and its manifest."""

    folder: Path
    told: Mapping[str, Any]
    notes: tuple[str, ...]


def explain(
    run: Path | str,
    *,
    tokens: str | int | None = None,
    kinds: str | None = None,
    units: str | None = None,
    each: int = 6,
    snippets: int = 5,
    context: int = 24,
    scores: Path | str | None = None,
    whole: str | None = None,
    console: Console | None = None,
    spell: Callable[[str], str] = str,
    **given: object,
) -> Told:
    """Find the text that uses the units of a run most, and write it to explain.json there.

    Of each of `kinds` (those of which units went) `each` kept and `each` removed units are told,
    or the `units` named, with commas between. `tokens` of the calibration part of the run's domain
    are read, TOKENS or as many as there are unless given; `snippets` are told of each unit, with
    `context` tokens on either side. `scores` is a file to choose by where the run has none, `whole`
    the model that the run began with where its name has moved.

    Raises BadInput for a folder that is no run or removed nothing, names of units or kinds that are
    not there, too few tokens, and where the model that the run began with is not found.
    """
    place = Path(run)
    wanted = _checked(tokens, each, snippets, context)
    if kinds is not None and units is not None:
        raise BadInput("--units names the units themselves: leave --kinds out.")
    source = _source(place)
    recipe = recipes.load(source.folder / "recipe.yaml", given, criteria=CRITERIA, spell=spell)
    recipe, console, track = inputs.begin(recipe, {}, console)
    if wanted is not None and wanted < recipe.blocks.length:
        raise BadInput(
            f"--tokens must be at least {recipe.blocks.length}, one block of the run, got {wanted}."
        )
    domain = inputs.domain_of(recipe, track=track)
    loaded = _whole(source, recipe, whole, track)
    gone = [n for n in at(source.told, "layers_gone") or () if isinstance(n, int)]
    known = decided(source.folder, loaded.model, gone, None if scores is None else Path(scores))
    picked = named(known, units) if units is not None else _picked(known, kinds, each, place)
    packed = inputs.blocks_of(loaded, domain, "calibration", recipe, track=track)
    if wanted is None:
        wanted = min(TOKENS, packed.tokens.numel())
    blocks = packed.take(wanted, seed=recipe.seed)  # the beginning of what was scored on
    counts = _counts(blocks, loaded.tokenizer.eos_token_id)
    asked = {unit.group.kind for unit in picked}
    narrow = inputs.bf16(recipe)
    model = copied(loaded.model, torch.bfloat16) if narrow else loaded.model
    uses = explain_use.measured(
        model, [g for g in known.groups if g.kind in asked],
        [(unit.group, unit.index) for unit in picked], blocks, counts,
        batch_size=recipe.blocks.batch_size, track=track,
    )  # fmt: skip
    told = tuple(
        _explained(known, unit, uses, n, loaded, blocks, domain, snippets, context)
        for n, unit in enumerate(picked)
    )
    explanation = Explanation(
        model=loaded.name, sha256=loaded.sha256, domain=domain.name, part="calibration",
        blocks_sha256=blocks.sha256, tokens=uses.positions,
        documents=len(blocks.documents.flatten()[counts.flatten()].unique()),
        chosen=_how(units, each), notes=_notes(source, loaded, domain, known, told, gone, narrow),
        kinds=tuple(_lot(known, kind, uses) for kind in KINDS if kind in asked), units=told,
    )  # fmt: skip
    file = place / FILE
    _write(file, explanation)
    console.print(f"`llm-narrow report {place}` shows it on a page.", highlight=False)
    return Told(file, explanation)


def _checked(tokens: str | int | None, each: int, snippets: int, context: int) -> int | None:
    """The number of tokens, if given. Raises BadInput for it and for the other numbers."""
    found = counted(tokens)
    if tokens is not None and (not isinstance(found, int) or found < 1):
        raise BadInput(f"--tokens must be a number of tokens such as 16k, got {tokens!r}.")
    numbers = {"each": (each, 1), "snippets": (snippets, 1), "context": (context, 0)}
    for name, (value, least) in numbers.items():
        if value < least:
            raise BadInput(f"--{name} must be at least {least}, got {value}.")
    return found if isinstance(found, int) else None


def _source(place: Path) -> _Run:
    """The run in which units went: a run that only trained another's model is told by that."""
    notes: list[str] = []
    folder = place
    while True:
        ((_, _, told),) = manifests([folder])
        method = at(told, "compare", "method")
        if METHODS.get(str(method), False):
            raise BadInput(
                f"{folder} has fresh weights ({method}): none of its units are of the whole model. "
                "Explain a run that removed some."
            )
        if at(told, "made_from") is None:
            return _Run(folder, told, tuple(notes))
        name = Path(str(at(told, "model", "name")))
        before = name.parent if name.name == "model" else name
        if not (before / "manifest.json").is_file():
            raise BadInput(
                f"{folder} only trained what {before} had narrowed, and that run is not there any "
                "more: it tells which units went. Put it back."
            )
        notes.append(f"{folder} only trained: this is told of the run it was made from, {before}.")
        folder = before


def _whole(source: _Run, recipe: Recipe, whole: str | None, track: Track) -> Loaded:
    """The model that the run began with. Raises BadInput where it is not found, or another."""
    name = whole or recipe.model.name
    wanted = str(at(source.told, "model", "sha256"))
    try:
        loaded = inputs.model_of(recipe, name, track=track)
    except NarrowError as error:
        raise BadInput(
            f"The model that {source.folder} began with, {name}, is not to be had: "
            f"{first_line(error)} Say where it is with --whole."
        ) from error
    if loaded.sha256 != wanted:
        raise BadInput(
            f"{name} is not the model that {source.folder} began with: its weights have SHA-256 "
            f"{loaded.sha256[:16]}…, and the run began with {wanted[:16]}…. Name the right one "
            "with --whole."
        )
    return loaded


def _picked(known: Decided, kinds: str | None, each: int, place: Path) -> list[Unit]:
    """Units of the kinds asked for. Raises BadInput for kinds of which none went."""
    if not known.removed:
        raise BadInput(
            f"{place} removed no {' or '.join(KINDS)}: there is no choice to explain. Name units "
            "with --units to see what they are used for."
        )
    if kinds is None:
        return chosen(known, known.removed, each)
    asked: list[Kind] = []
    for name in dict.fromkeys(part.strip() for part in kinds.split(",")):
        kind = next((kind for kind in KINDS if kind == name), None)
        if kind is None:
            raise UnknownName("Kind of unit", name, KINDS)
        if kind not in known.removed:
            raise BadInput(
                f"{place} removed no {kind}, only {' and '.join(known.removed)}. Leave them out of "
                "--kinds, or name units with --units."
            )
        asked.append(kind)
    return chosen(known, asked, each)


def _counts(blocks: Blocks, separator: int) -> Tensor:
    """The positions that count, (n, length) bool: not the first of a block, nor separators.

    Before the first there is no text, and models rest attention there that they have no use for.
    """
    counts = (blocks.tokens != separator) | (blocks.sizes > 0)
    counts[:, 0] = False
    if not counts.any():
        raise BadInput("The text holds nothing but separators: give the domain some.")
    return counts


def _explained(
    known: Decided, unit: Unit, uses: Uses, n: int, loaded: Loaded, blocks: Blocks, domain: Domain,
    snippets: int, context: int,
) -> Explained:  # fmt: skip
    top, totals = uses.tops[n], uses.totals[unit.group.name]
    own = float(totals[unit.index])
    return Explained(
        name=unit.name, group=unit.group.name, layer=known.layer(unit.group),
        kind="heads" if unit.group.kind == "heads" else "neurons", index=unit.index,
        kept=unit.kept, why=unit.why, score=unit.score, rank=unit.rank, size=unit.group.size,
        use=own / uses.positions, share=_share(own, float(totals.sum())),
        concentration=_share(float(top.uses.double().sum()), own), strongest=len(top.uses),
        often=explain_text.often(top, blocks, loaded.tokenizer),
        snippets=explain_text.snippets(
            top, blocks, loaded.tokenizer, domain.documents["calibration"],
            number=snippets, context=context,
        ),
    )  # fmt: skip


def _lot(known: Decided, kind: Kind, uses: Uses) -> Lot:
    """How much of the use of a kind the removed units had, by group and in the mean."""
    layers = []
    for g in known.groups:
        if g.kind == kind:
            totals, went = uses.totals[g.name], ~known.keep[g.name]
            share = _share(float(totals[went].sum()), float(totals.sum()))
            layers.append(
                Layer(group=g.name, layer=known.layer(g), units=g.size, removed=int(went.sum()),
                      share=share)
            )  # fmt: skip
    shares = [layer.share for layer in layers if layer.removed]
    return Lot(
        kind="heads" if kind == "heads" else "neurons", units=sum(x.units for x in layers),
        removed=sum(x.removed for x in layers), share=_share(sum(shares), len(shares)),
        layers=tuple(layers),
    )  # fmt: skip


def _share(part: float, of: float) -> float:
    return min(part / of, 1.0) if of > 0 else 0.0


def _how(units: str | None, each: int) -> str:
    if units is not None:
        return "These units were asked for."
    return (
        f"Of each kind, up to {each} kept and {each} removed units: in either lot half are its "
        "highest-scored and half its lowest-scored, no two of one layer while there are others."
    )


def _notes(
    source: _Run, loaded: Loaded, domain: Domain, known: Decided, told: Sequence[Explained],
    gone: Sequence[int], narrow: bool,
) -> tuple[str, ...]:  # fmt: skip
    """What the reader has to know."""
    in_bf16 = " Passes were in bfloat16." if narrow else ""
    notes = [
        *source.notes,
        f"{loaded.name} as it was before the removal read the text, in its own tokens. The first "
        f"token of each block is left out, and so are separators of documents.{in_bf16}",
    ]
    if (cut := at(source.told, "vocabulary")) is not None:
        rows = f"{at(cut, 'rows_before'):,} to {at(cut, 'rows'):,}"
        notes.append(
            f"The run trimmed the vocabulary from {rows} rows before it scored. Here the model "
            "has all of them and its own tokenizer, which is exact for the whole model; the "
            "narrowed one reads text with tokens that went in other tokens."
        )
    if (thin := at(source.told, "query_heads")) is not None:
        notes.append(
            f"The run left {at(thin, 'after')} of {at(thin, 'before')} query heads of each "
            "key/value head before it scored. Here the model has all of them."
        )
    if gone:
        layers = ", ".join(map(str, gone))
        notes.append(f"Layers {layers} went as a whole: all of their units count as removed.")
    then = at(source.told, "domain", "sha256", "calibration")
    if then != domain.sha256["calibration"]:
        notes.append("The text of the domain is not what it was when the run was made.")
    if any(not g.added for g in known.groups if g.name in {unit.group for unit in told}):
        notes.append("The layers norm or scale what their halves give; use is that before it.")
    heads = [s for unit in told if unit.kind == "heads" for s in unit.snippets]
    if heads and all(s.attended is None for s in heads):
        notes.append("What heads look at is not told: blocks are long, or the model does not say.")
    return tuple(notes)


def _write(file: Path, explanation: Explanation) -> None:
    """Write the file whole or not at all."""
    text = json.dumps(explanation.model_dump(mode="json"), indent=1, ensure_ascii=False)
    fresh = file.with_name(f".{file.name}.partial")
    try:
        try:
            fresh.write_text(text + "\n", encoding="utf-8")
            fresh.replace(file)
        finally:
            fresh.unlink(missing_ok=True)
    except OSError as error:
        raise no_space(error, file) or BadInput(
            f"{file} cannot be written: {error.strerror or error}. Copy the run to where it can."
        ) from error
