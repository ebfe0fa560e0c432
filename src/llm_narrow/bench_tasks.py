"""Models side by side on programming problems: `bench --tasks`, from names to tables."""

import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from . import inputs, manifest, passing, sandbox, tasks
from .cache import cache_dir, check_own, made
from .errors import BadInput, problems
from .models import Loaded
from .passing import Asking, Verdict
from .recipe import Recipe
from .report import percent, ranged, thousands
from .sandbox import Protection
from .task_rows import TaskRow, difference, row
from .tasks import Problem, Prompt

KS = (1, 5, 10)
TEMPERATURE = 0.8  # of samples, unless another is given
ANSWERS, SUMMARY = ".answers.jsonl", "tasks.json"  # the files of a benchmark's folder
VERSIONS = ("python", "torch", "transformers", "tokenizers")  # that answers depend on


@dataclass(frozen=True)
class Benched:
    """What `bench --tasks` found; `digests` are the hashes of the problems by set."""

    rows: tuple[TaskRow, ...]
    digests: dict[str, str]
    protections: tuple[Protection, ...]
    folder: Path
    notes: tuple[str, ...] = ()

    def facts(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {
            "rows": [row.to_dict() for row in self.rows],
            "problems_sha256": self.digests,
            "sandboxed": all(p.active for p in self.protections if p.essential),
            "protections": {p.name: p.active or p.why_not for p in self.protections},
            "folder": str(self.folder),
            "notes": list(self.notes),
        }

    def shown(self) -> RenderableType:
        """A table for each set of problems and way of drawing; then what has to be known of it."""
        parts: dict[tuple[str, float], list[TaskRow]] = {}
        for one in self.rows:
            parts.setdefault((one.task, one.temperature), []).append(one)
        off = [f"{p.name} ({p.why_not})" for p in self.protections if not p.active]
        lines = [
            "Sandbox: all protections are active: " + ", ".join(p.name for p in self.protections)
            if not off
            else f"Sandbox: NOT active: {', '.join(off)}"
        ]
        if any(row.difference for row in self.rows):
            lines.append(
                f"Δ: less {self.rows[0].model}, asked alike, paired by problem; won/lost: solved "
                "by one of the two only, with the p of McNemar's exact test."
            )
        lines += self.notes
        lines.append(f"95 % intervals are over problems. Answers and verdicts: {self.folder}")
        return Group(*(_table(rows) for rows in parts.values()), *map(Text, lines))


@dataclass(frozen=True)
class _Wanted:
    """What was asked for, by the words of the command line, checked."""

    names: Sequence[str]
    sets: Sequence[str]
    prompt: str
    samples: int | None
    temperature: float | None
    ks: Sequence[int] | None
    limit: int | None
    workers: int

    def __post_init__(self) -> None:
        """Raise BadInput with all that breaks a rule."""
        wrong = []
        for what, given in (("model", self.names), ("set of --tasks", self.sets)):
            if not given or not all(given):
                wrong.append(f"no {what} is given; give at least one")
            wrong += [
                f"the {what} {name} is named twice; name each once"
                for name, times in Counter(given).items()
                if times > 1
            ]
        if not self.forms:
            wrong.append(f"--prompt must be chat, raw or both, got {self.prompt!r}")
        for name, value in (
            ("--limit", self.limit), ("--samples-per-task", self.samples),
            ("workers", self.workers),
        ):  # fmt: skip
            if value is not None and value < 1:
                wrong.append(f"{name} must be at least 1, got {value}")
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            wrong.append(
                f"--temperature must be above 0, got {self.temperature:g}; greedy answers are "
                "always measured too"
            )
        if self.samples is None:
            wrong += [
                f"{flag} is about samples: give --samples-per-task too"
                for flag, value in (("--temperature", self.temperature), ("--k", self.ks))
                if value is not None
            ]
        elif self.ks is not None and not (
            self.ks and 1 <= min(self.ks) <= max(self.ks) <= self.samples
        ):
            told = ",".join(map(str, self.ks))
            wrong.append(
                f"--k must be from 1 to --samples-per-task, which is {self.samples}, got {told}"
            )
        if wrong:
            raise problems("bench --tasks", wrong)

    @property
    def forms(self) -> tuple[Prompt, ...]:
        """How every model that can is asked."""
        return tuple(f for f in get_args(Prompt) if self.prompt in (f, "both"))

    def askings(self, **shared: Any) -> list[tuple[Asking, tuple[int, ...]]]:
        """Each way of drawing answers, with the k of its pass@k."""
        found: list[tuple[Asking, tuple[int, ...]]] = [(Asking(**shared), (1,))]
        if (n := self.samples) is not None:
            at = TEMPERATURE if self.temperature is None else self.temperature
            ks = [k for k in KS if k <= n] if self.ks is None else self.ks
            found.append((Asking(samples=n, temperature=at, **shared), tuple(dict.fromkeys(ks))))
        return found


def bench(
    recipe: Recipe | Path | str | None = None,
    names: Sequence[str] = (),
    *,
    sets: str | Sequence[str],
    prompt: str = "both",
    samples_per_task: int | None = None,
    temperature: float | None = None,
    k: str | Sequence[int] | None = None,
    limit: int | None = None,
    max_new_tokens: int = 512,
    batch_size: int = 16,
    workers: int = 2,
    allow_unsandboxed: bool = False,
    out: Path | None = None,
    console: Console | None = None,
    **given: object,
) -> Benched:
    """Have models answer sets of programming problems, and run what they write.

    Always greedily; with `samples_per_task` also so many samples at a temperature. Of the recipe
    only seed, device, dtype and how models are opened count. Every answer and verdict is kept in
    `out` (else the cache) as it comes, and not made again. Models are compared with the first.
    Raises BadInput, and what `tasks.load` and `models.load` raise, before a model is asked.
    """
    named = [s.strip() for s in sets.split(",")] if isinstance(sets, str) else list(sets)
    wanted = _Wanted(
        names, named, prompt, samples_per_task, temperature, _numbers(k), limit, workers
    )
    if not isinstance(recipe, Recipe):
        given = {"domain": "python", **given, "model": names[0]}  # no domain is read
    recipe, console, track = inputs.begin(recipe, given, console)
    about: dict[str, Any] = {
        "dtype": recipe.dtype,
        "device": inputs.device_of(recipe.device).type,
        "versions": {name: manifest.versions()[name] for name in VERSIONS},
    }
    shared = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "seed": recipe.seed}
    askings = wanted.askings(**shared)
    check_own(out, ANSWERS, "answers of a benchmark")
    sandbox.run("", allow_unsandboxed=allow_unsandboxed)
    protections = tuple(sandbox.protections())
    bare = [p.name for p in protections if p.essential and not p.active]
    if bare and not allow_unsandboxed:  # it has just been there
        raise BadInput(
            f"The sandbox did not start ({', '.join(bare)} lack). Free memory or processes of this "
            "machine, and try again."
        )
    if bare:
        console.print(Text(f"NOT PROTECTED by {', '.join(bare)}", style="red"))
    found = {name: tasks.load(name, track=track)[:limit] for name in named}
    loaded = {name: inputs.model_of(recipe, name, track=track) for name in names}
    forms, notes = _forms(loaded, wanted.forms, found)
    folder = made(out or cache_dir() / "answers")
    total = len(found) * len(askings) * sum(map(len, forms.values()))
    rows: list[TaskRow] = []
    for task, asked in found.items():
        for plain, ks in askings:
            first: dict[Prompt, Sequence[Verdict]] = {}
            for name, form in [(own, form) for own in loaded for form in forms[own]]:
                one = loaded[name]
                own = {**about, "unprotected": bare, "weights": one.sha256}
                how = replace(plain, prompt=form, about=own)
                file = folder / _file_name(task, how, asked)
                words = f"{task}: {name}, {form}, {_drawn(how)} ({len(rows) + 1} of {total})"
                console.print(Text(words))
                verdicts = passing.evaluate(
                    one.model, one.tokenizer, asked, how, workers=workers,
                    allow_unsandboxed=allow_unsandboxed, rows=file, track=track,
                )  # fmt: skip
                compared = difference(first[form], verdicts, ks) if form in first else None
                rows.append(row(task, one, how, verdicts, ks, file.name, compared))
                if one is next(iter(loaded.values())):
                    first[form] = verdicts
    digests = {name: tasks.digest(asked) for name, asked in found.items()}
    result = Benched(tuple(rows), digests, protections, folder, (*notes, *_too_long(rows)))
    if out is not None:
        fresh = folder / f".{SUMMARY}.{os.getpid()}"
        fresh.write_text(json.dumps(result.facts(), indent=2), encoding="utf-8")
        fresh.replace(folder / SUMMARY)
    return result


def _numbers(k: str | Sequence[int] | None) -> Sequence[int] | None:
    try:
        return [int(part) for part in k.split(",")] if isinstance(k, str) else k
    except ValueError:
        raise BadInput(f"--k must be whole numbers with commas, as 1,5,10, got {k!r}.") from None


def _forms(
    loaded: Mapping[str, Loaded], forms: Sequence[Prompt], found: Mapping[str, Sequence[Problem]]
) -> tuple[dict[str, list[Prompt]], list[str]]:
    """How each model is asked, and what is to be told of it. Refuses now, not after hours."""
    by_name, notes = {}, []
    for name, one in loaded.items():
        by_name[name] = list(forms)
        if len(forms) > 1 and not getattr(one.tokenizer, "chat_template", None):
            by_name[name].remove("chat")
            notes.append(f"{name} has no chat template: asked in raw form only.")
        for form in by_name[name]:
            for asked in found.values():
                passing.encoded(one.model, one.tokenizer, asked, form, name)
    return by_name, notes


def _too_long(rows: Sequence[TaskRow]) -> list[str]:
    return [
        f"{r.task}: {len(r.too_long)} prompts ({r.prompt}) fill the context of {r.model} and count "
        f"as failed: {', '.join(r.too_long[:8])}{' …' * (len(r.too_long) > 8)}"
        for r in rows
        if r.too_long and not r.temperature
    ]


def _file_name(task: str, how: Asking, asked: Sequence[Problem]) -> str:
    """A name that no other problems, weights or settings have."""
    settings = json.dumps(how.settings(asked), sort_keys=True)
    key = hashlib.sha256(settings.encode()).hexdigest()[:16]
    label = re.sub(r"\W+", "-", Path(task).name.partition(".")[0])[:40]
    drawn = f"t{how.temperature:g}" if how.temperature else "greedy"
    return f"{label}-{how.prompt}-{drawn}-{key}{ANSWERS}"


def _drawn(how: Asking | TaskRow) -> str:
    if not how.temperature:
        return "greedy"
    return f"{how.samples} samples at temperature {how.temperature:g}"


def _table(rows: Sequence[TaskRow]) -> Table:
    """A line for each model and form of prompt; shares in percent."""
    first, compared = rows[0], any(row.difference for row in rows)
    greedy = not first.temperature
    title = f"{first.task}: {thousands(first.problems)} problems, {_drawn(first)}"
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    columns = ["model", "prompt", *(f"pass@{k}, %" for k in first.pass_at)]
    columns += ["Δ pass@1, %"] * (compared and 1 in first.pass_at)
    columns += ["won/lost, p"] * (compared and greedy)
    for number, column in enumerate([*columns, "parse", "ended", "tokens/s"]):
        table.add_column(column, justify="left" if number < 2 else "right", overflow="fold")
    for r in rows:
        cells = [r.model, r.prompt, *(ranged(e, _hundredths) for e in r.pass_at.values())]
        d = r.difference
        if compared and 1 in r.pass_at:
            cells.append("-" if d is None else ranged(d.pass_at[1], lambda v: f"{100 * v:+.1f}"))
        if compared and greedy:
            cells.append("-" if d is None else f"{d.won}/{d.lost}, {d.p:.2g}")
        speed = "-" if r.tokens_per_second is None else f"{r.tokens_per_second:,.1f}"
        cells += [percent(r.parsed.value), percent(r.whole.value), speed]
        table.add_row(*map(Text, cells))
    return table


def _hundredths(value: float) -> str:
    return f"{100 * value:.1f}"
