"""What `llm-narrow init` asks, what the answers stand for, and the recipe that it writes.

Every answer is checked as soon as it is given, by what a run would check it with.
"""

import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.prompt import Prompt
from rich.text import Text

from . import domains, init_text, models, recipe
from .errors import BadInput, NarrowError, UnknownName
from .init_recipes import named
from .recipe import Recipe
from .scores import CRITERIA
from .sections import by_kind

Settings = dict[str, object]  # name of a flag of `prune` -> value
ORDER = ("model", "domain", "glob", "target", "machine", "recover_tokens", "forget")
QUESTIONS = {
    "model": "Model: an alias (see `llm-narrow models`), a hub id, a folder or a .gguf file",
    "domain": "Domain: python, english, a folder, a file of rows or a hub data set",
    "glob": "Which of its files, such as **/*.rs; all for all",
    "target": "How small: units to remove (0.5), parameters to keep (60%, 90M) or bytes (200MB)",
    "machine": "Machine it will run on: laptop, gpu or cluster",
    "recover_tokens": "Tokens to train on afterwards, such as 200k; 0 for none",
    "forget": "Domains to forget, with commas between; none for none",
}
NOTHING = {"glob": "all", "forget": "none"}  # the answers that set nothing
DEFAULTS = {"model": "smollm2-135m", "domain": "python", "target": "0.5", "machine": "laptop",
            **NOTHING}  # fmt: skip
# Machine -> settings of runs there, those of the training, and tokens to train on by default.
MACHINES: dict[str, tuple[Settings, Settings, str]] = {
    "laptop": ({}, {}, "0"),
    "gpu": ({"length": 1024, "batch_size": 8}, {"accumulation": 4}, "20M"),
    "cluster": ({"length": 1024, "batch_size": 8}, {"checkpointing": True, "sharded": True},
                "50M"),
}  # fmt: skip
OFFERED: Settings = {"kinds": ["neurons"], "forget": ["english"], "recover_tokens": "200k"}
RULE = (
    "must be a share of the units to remove (0.5, or neurons=0.5,heads=0.2), or what to keep: "
    "parameters (60%, 90M) or bytes (200MB, 1.5GiB)"
)


@dataclass(frozen=True)
class Written:
    """The recipe that was written, and the commands that come next."""

    file: Path
    recipe: Recipe
    following: tuple[str, ...]

    def facts(self) -> dict[str, object]:
        """What `--json` prints."""
        return {"file": str(self.file), "next": list(self.following),
                "recipe": self.recipe.resolved()}  # fmt: skip


def write(
    file: Path, answers: Mapping[str, str | None], *, kinds: str | None = None,
    template: str | None = None, console: Console | None = None, force: bool = False,
    spell: Callable[[str], str] = str,
) -> Written:  # fmt: skip
    """Write a recipe from the answers; those that are missing are asked for on `console`.

    Without a console defaults stand in for them; with a template, its settings do. The file
    appears whole or not at all. Raises BadInput and UnknownName for what a run would refuse, and
    where the file exists already, unless `force` replaces it.
    """
    if file.is_dir():
        raise BadInput(f"{file} is a folder. Name the file to write, such as {file}/recipe.yaml.")
    if file.exists() and not force:
        raise BadInput(f"{file} exists already. Choose another file, or replace it with --force.")
    given = {name: value for name, value in answers.items() if value is not None}
    source = None if template is None else named(template)
    if source is not None:
        before = {"domain": recipe.load(source.file).domain.name, **given}
        given = {name: checked(name, value, before, spell) for name, value in given.items()}
    else:
        given = _all(given, console, spell)
    asked = settings(given) | ({} if kinds is None else {"kinds": kinds})
    # What sets nothing takes away what a template has.
    asked |= {name: None for name, value in given.items() if source and value == NOTHING.get(name)}
    if source and given.get("forget") == NOTHING["forget"]:
        asked |= {"forget_weight": None, "forget_refit": None}
    recipe.load(source.file if source else None, asked, criteria=CRITERIA, spell=spell)
    machine = given.get("machine", "laptop")
    text = (
        _new(file, given, asked, machine)
        if source is None
        else init_text.from_template(source, asked, file)
    )
    partial = file.with_name(f".{file.name}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        partial.write_text(text, encoding="utf-8")
        found = recipe.load(partial, criteria=CRITERIA)  # as a run will read it
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
    return Written(file, found, following(file, machine))


def settings(answers: Mapping[str, str]) -> Settings:
    """The settings that the answers stand for. Raises BadInput for a target that is none."""
    found: Settings = {}
    for name, value in answers.items():
        if name == "target":
            found |= sized(value)
        elif name != "machine" and value != NOTHING.get(name):
            found[name] = value
    if "machine" in answers:
        always, training, _ = MACHINES[answers["machine"]]
        trains = answers.get("recover_tokens", "0") != "0"
        found |= {**always, **(training if trains else {})}
    return found


def sized(target: str) -> Settings:
    """The setting that a target of any unit is one of. Raises BadInput if it is none."""
    unit = target.lstrip("0123456789.")
    bare = not unit and target.count(".") < 2 and float(target or 0) < 1000
    if "=" in target or bare:  # no model has so few parameters
        name = "sparsity"
    elif re.fullmatch(r"[kmg]i?b", unit, re.IGNORECASE):
        name = "target_size"
    else:
        name = "target_params"
    try:
        recipe.load(None, {"model": "any", "domain": "any", name: target})
    except BadInput:
        raise BadInput(f"target {RULE}, got {target!r}") from None
    return {name: target}


def checked(
    name: str, value: str, before: Mapping[str, str], spell: Callable[[str], str] = str
) -> str:
    """The answer, if a run would take it beside those `before`; raises what the run would."""
    value = value.strip()
    if name == "machine" and value not in MACHINES:
        raise UnknownName(spell("machine"), value, MACHINES)
    if name == "target":
        try:
            sized(value)
        except BadInput as error:
            raise BadInput(str(error).replace("target", spell("target"), 1)) from None
        return value
    plain = {"model": "any", "domain": "any"}
    recipe.load(None, plain | settings({name: value}), criteria=CRITERIA, spell=spell)
    if name == "model":
        models.check(value)
    elif name == "domain" and "glob" not in before:
        domains.check(value)
    elif name == "glob" and value != NOTHING["glob"]:
        domains.check(before["domain"], glob=value)
    elif name == "forget" and value != NOTHING["forget"]:
        for one in recipe.load(None, plain | {"forget": value}).score.forget or ():
            domains.check(one)
    return value


def following(file: Path, machine: str) -> tuple[str, ...]:
    """The commands that come next."""
    place = shlex.quote(str(file))
    start = "llm-narrow prune"
    if machine == "cluster":
        start = "torchrun --nproc-per-node 8 -m llm_narrow prune"
    return f"llm-narrow prune --recipe {place} --dry-run", f"{start} --recipe {place}"


def _all(
    given: Mapping[str, str], console: Console | None, spell: Callable[[str], str]
) -> dict[str, str]:
    """An answer to every question that applies: given, asked for, or by default."""
    found: dict[str, str] = {}
    for name in ORDER:
        if name == "glob" and name not in given and not Path(found["domain"]).is_dir():
            continue
        default = DEFAULTS.get(name) or MACHINES[found["machine"]][2]
        if name in given:
            found[name] = checked(name, given[name], {**given, **found}, spell)
        elif console is None:
            found[name] = checked(name, default, {**given, **found}, spell)
        else:
            found[name] = _asked(name, default, found, console)
    return found


def _asked(name: str, default: str, before: Mapping[str, str], console: Console) -> str:
    """The answer of the person at the terminal, asked for until it is one."""
    while True:
        try:
            reply = Prompt.ask(QUESTIONS[name], console=console, default=default)
            return checked(name, reply, before)
        except EOFError:
            raise BadInput(
                f"The answers ended before {name}. Give the others as flags, and --yes."
            ) from None
        except NarrowError as error:
            console.print(Text(str(error), style="red"), soft_wrap=True)


def _new(file: Path, answers: Mapping[str, str], given: Settings, machine: str) -> str:
    """The text of a recipe that no template is for."""
    given = {name: value for name, value in given.items() if value != "0"}
    offered = {name: value for name, value in OFFERED.items() if name not in given}
    if isinstance(by_kind(given.get("sparsity")), dict):  # which names its kinds
        del offered["kinds"]
    look, go = following(file, machine)
    head = (
        f"{init_text.schema_line()}\n"
        f"# {answers['model']} for {answers['domain']}, on a {machine}. What is left out has a "
        "default;\n# lines that begin with # are there to be tried. See what would go, then do "
        f"it:\n#   {look}\n#   {go}\n"
    )
    return init_text.written(given, offered, head)
