"""Models side by side on what they were and were not narrowed to: `bench --matrix`.

Bits per byte of the domain, of 17 programming languages and of English prose, accuracy on
questions of general knowledge, and selectivity: how much more is lost off the domain than on it.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.console import Group as Lines
from rich.text import Text

from . import inputs, manifest, matrix_sets, matrix_show
from .cache import cache_dir, check_own, made
from .errors import BadInput, problems
from .matrix_rows import ON, ChoiceRow, LossRow, Selectivity, choice_row, loss_row
from .matrix_rows import selectivities as found_selectivities
from .matrix_scores import Score, scores
from .matrix_sets import Set
from .models import Loaded
from .recipe import Recipe

LIMIT = 200  # items of each set, unless another number is given
SCORES, SUMMARY = ".scores.jsonl", "matrix.json"  # the files of a benchmark's folder
FORM = 1  # of matrix.json; raised where a reader of the one before would go wrong
VERSIONS = ("python", "torch", "transformers", "tokenizers")  # that likelihoods depend on


@dataclass(frozen=True)
class Matrix:
    """What `bench --matrix` found; `sets` tells of each set its group, items and hash."""

    models: dict[str, str]
    losses: tuple[LossRow, ...]
    choices: tuple[ChoiceRow, ...]
    selectivities: tuple[Selectivity, ...]
    sets: dict[str, dict[str, Any]]
    folder: Path
    notes: tuple[str, ...] = ()

    def facts(self) -> dict[str, Any]:
        """What `--json` prints and matrix.json holds; docs/matrix.md says what each part is."""
        return {
            "form": FORM,
            "models": [{"name": name, "sha256": found} for name, found in self.models.items()],
            "sets": self.sets,
            "losses": [row.to_dict() for row in self.losses],
            "choices": [row.to_dict() for row in self.choices],
            "selectivities": [row.to_dict() for row in self.selectivities],
            "folder": str(self.folder),
            "notes": list(self.notes),
        }

    def shown(self) -> RenderableType:
        """Tables of losses, of what was lost where, and of accuracies."""
        tables: list[RenderableType] = []
        if self.losses:
            tables.append(matrix_show.losses(self.losses, self.selectivities))
        if self.selectivities:
            tables.append(matrix_show.summaries(self.selectivities, self.sets))
        if self.choices:
            tables.append(matrix_show.choices(self.choices))
        lines = [*self.notes]
        if self.selectivities:
            lines.append(
                "Selectivity: the increase of loss off the domain ÷ that on it, in nats per byte "
                f"above {next(iter(self.models))}; not defined where that on it is not above 0. "
                "Sets with * are of the domain."
            )
        lines.append(f"95 % intervals are over items. Scores of each item: {self.folder}")
        return Lines(*tables, *map(Text, lines))


@dataclass(frozen=True)
class _Wanted:
    """What was asked for, by the words of the command line, checked."""

    names: Sequence[str]
    sets: Sequence[str]
    on: Sequence[str]
    limit: int

    def __post_init__(self) -> None:
        """Raise BadInput with all that breaks a rule."""
        wrong = []
        for what, given in (("model", self.names), ("set of --matrix", self.sets)):
            if not given or not all(given):
                wrong.append(f"no {what} is given; give at least one")
        wrong += [
            f"the model {name} is named twice; name each once"
            for name, times in Counter(self.names).items()
            if times > 1
        ]
        wrong += [
            f"--on {name} is none of the sets of --matrix; add it there too"
            for name in self.on
            if name not in self.sets
        ]
        if self.limit < 1:
            wrong.append(f"--limit must be at least 1, got {self.limit}")
        if wrong:
            raise problems("bench --matrix", wrong)


def bench(
    recipe: Recipe | Path | str | None = None,
    names: Sequence[str] = (),
    *,
    sets: str | Sequence[str] = "all",
    on: str | Sequence[str] | None = None,
    limit: int = LIMIT,
    out: Path | None = None,
    console: Console | None = None,
    **given: object,
) -> Matrix:
    """Measure models on texts and questions, all compared with the first model.

    `sets` are names of matrix_sets.SETS and GROUPS, `domain` (the recipe's), files, folders and
    hub data sets; `on` are those that belong to the domain beside its held-out part (mbpp-python
    where the domain is one of Python). Of each set the first `limit` items count; of the recipe
    the domain, seed, device, dtype and the size of a batch. Every score is kept in `out` (else the
    cache) as it comes, and not made again. Raises BadInput, and what `matrix_sets.load`,
    `domains.load` and `models.load` raise, before a model is measured.
    """
    asked = matrix_sets.named(_words(sets))
    own = None if on is None else matrix_sets.named(_words(on))
    _Wanted(names, asked, own or (), limit)
    if not isinstance(recipe, Recipe):
        given = {"domain": "python", **given, "model": names[0]}
    recipe, console, track = inputs.begin(recipe, given, console)
    check_own(out, SCORES, "scores of a benchmark")
    found: dict[str, Set] = {}
    for name in asked:
        if name == ON:
            whole = matrix_sets.of_domain(inputs.domain_of(recipe, track=track))
        else:
            whole = matrix_sets.load(name, track=track)
        found[name] = whole.first(limit)
    if own is None:
        python = recipe.domain.name.startswith("python")
        own = [name for name in found if python and name == "mbpp-python"]
    if questions := [name for name in own if found[name].questions]:
        raise BadInput(f"--on must name texts, and {', '.join(questions)} are questions.")
    own = [name for name in (ON, *own) if name in found]
    loaded = {name: inputs.model_of(recipe, name, track=track) for name in names}
    folder = made(out or cache_dir() / "matrix")
    every: dict[str, dict[str, list[Score]]] = {name: {} for name in names}
    files: dict[tuple[str, str], str] = {}
    for number, (key, some) in enumerate(found.items(), 1):
        for name, one in loaded.items():
            console.print(Text(f"{key}: {name} (set {number} of {len(found)})"))
            settings = _settings(some, one, recipe)
            file = folder / _file_name(key, settings)
            every[name][key] = scores(
                one.model, one.tokenizer, some.items,
                tokens=recipe.blocks.batch_size * recipe.blocks.length,
                file=file, settings=settings, what=key, track=track,
            )  # fmt: skip
            files[name, key] = file.name
    result = _matrix(found, own, loaded, every, files, folder)
    if out is not None:
        fresh = folder / f".{SUMMARY}.{os.getpid()}"
        fresh.write_text(json.dumps(result.facts(), indent=2), encoding="utf-8")
        fresh.replace(folder / SUMMARY)
    return result


def _matrix(
    found: dict[str, Set],
    own: Sequence[str],
    loaded: dict[str, Loaded],
    every: dict[str, dict[str, list[Score]]],
    files: dict[tuple[str, str], str],
    folder: Path,
) -> Matrix:
    """What the scores of all models on all sets come to."""
    begun = every[next(iter(loaded))]  # what the others are compared with
    losses, choices, ratios, notes = [], [], [], []
    texts = {key: some.group for key, some in found.items() if not some.questions}
    for key, some in found.items():
        for name, one in loaded.items():
            scored, file = every[name][key], files[name, key]
            first = None if every[name] is begun else begun[key]
            about = (name, one.sha256, scored, first, file)
            if some.questions:
                choices.append(choice_row(key, some.items, some.normed, *about))
            else:
                losses.append(loss_row(key, some.group, key in own, *about))
            if cut := sum(score.cut > 0 for score in scored):
                notes.append(
                    f"{key}: {cut} of {len(scored)} items are longer than {name} can read: cut "
                    "from the left."
                )
    for name in loaded:
        if every[name] is not begun and own:
            ratios += found_selectivities(
                name, texts, own, {k: begun[k] for k in texts}, {k: every[name][k] for k in texts}
            )
    about_sets = {
        key: {
            "group": some.group, "own": key in own, "items": len(some.items),
            "sha256": some.sha256, "source": some.source or key,
        }
        for key, some in found.items()
    }  # fmt: skip
    models = {name: one.sha256 for name, one in loaded.items()}
    return Matrix(
        models, tuple(losses), tuple(choices), tuple(ratios), about_sets, folder, tuple(notes)
    )


def _words(given: str | Sequence[str]) -> list[str]:
    return [word.strip() for word in given.split(",")] if isinstance(given, str) else list(given)


def _settings(some: Set, one: Loaded, recipe: Recipe) -> dict[str, Any]:
    """All that scores depend on, as plain data."""
    tokenizer = one.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    spelled = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab())
    told = f"{spelled} {tokenizer.bos_token_id} {tokenizer.eos_token_id}"
    return {
        "items": some.sha256,
        "weights": one.sha256,
        "tokenizer": hashlib.sha256(told.encode()).hexdigest(),
        "tokens": recipe.blocks.batch_size * recipe.blocks.length,
        "dtype": recipe.dtype,
        "device": inputs.device_of(recipe.device).type,
        "versions": {name: manifest.versions()[name] for name in VERSIONS},
    }


def _file_name(key: str, settings: dict[str, Any]) -> str:
    """A name that no other items, weights or settings have."""
    told = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    return f"{re.sub(r'[^a-z0-9]+', '-', Path(key).name.lower())[:40]}-{told}{SCORES}"
