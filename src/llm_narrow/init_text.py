"""A recipe as commented text: written from settings, or a shipped one with some of them changed.

Settings are those of flags: name in `recipe.FLAGS` -> value.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml

from .init_recipes import EDITOR, SCHEMA, Shipped, folder
from .recipe import FLAGS, Recipe
from .sections import TARGETS, Section, by_kind, listed

PLAIN = {"sparsity": by_kind, "forget": listed, "kinds": listed}  # what a file has as YAML


def written(given: Mapping[str, object], offered: Mapping[str, object], head: str) -> str:
    """A recipe with these settings, each with its rule, and with those offered as comments."""
    text = head
    for section in Recipe.model_fields:
        own = [name for name, place in FLAGS.items() if place.startswith(f"{section}.")]
        lines = [f"  {_entry(name, given[name])} # {rule(name)}" for name in own if name in given]
        more = [f"#   {_entry(name, offered[name])} # {rule(name)}" for name in own
                if name in offered]  # fmt: skip
        if lines or more:
            text += "\n".join([f"{section}:" if lines else f"# {section}:", *lines, *more]) + "\n"
    return text


def edited(text: str, given: Mapping[str, object]) -> str:
    """A recipe's text with these settings instead of its own; other lines stay as they are."""
    lines = text.splitlines()
    if given.keys() & {"sparsity", *TARGETS}:
        for name in ("sparsity", *TARGETS):
            _cut(lines, "prune", name)
        if isinstance(by_kind(given.get("sparsity")), dict):
            _cut(lines, "prune", "kinds")
    for name, value in given.items():
        section, key = FLAGS[name].split(".")
        place = _cut(lines, section, key)
        if value is None:
            continue
        if place is None:
            lines.append(f"{section}:")
            place = len(lines)
        lines.insert(place, f"  {_entry(name, value)}")
    return "\n".join(lines) + "\n"


def from_template(template: Shipped, given: Mapping[str, object], file: Path) -> str:
    """The text of a shipped recipe for `file`: its commands name that, settings are laid over."""
    lines = (edited(template.text, given) if given else template.text).splitlines()
    named = (line.replace(f"recipes/{template.file.name}", file.as_posix()) for line in lines)
    body = [line for line in named if not line.startswith(EDITOR)]
    return "\n".join([schema_line(), *body]) + "\n"


def schema_line() -> str:
    """The line by which editors find the schema of the installed package, wherever a recipe is."""
    return f"{EDITOR}{(folder() / SCHEMA).as_uri()}"


def rule(name: str) -> str:
    """What a setting may be, in words."""
    section: Any = Recipe
    *above, key = FLAGS[name].split(".")
    for part in above:
        section = section.model_fields[part].annotation
    assert issubclass(section, Section)
    field = section.model_fields[key]
    if get_origin(field.annotation) is Literal:
        return ", ".join(map(str, get_args(field.annotation)))
    return str(field.description)


def _entry(name: str, value: object) -> str:
    value = PLAIN.get(name, lambda same: same)(value)
    if isinstance(value, tuple):
        value = list(value)
    elif isinstance(value, str) and value.isdigit():
        value = int(value)
    dumped: str = yaml.safe_dump(value, default_flow_style=True, width=1000, sort_keys=False)
    plain = dumped.removesuffix("...\n").strip()
    return f"{FLAGS[name].split('.')[-1]}: {plain}"


def _cut(lines: list[str], section: str, key: str) -> int | None:
    """Take a setting out of the lines. Where it stood or can go; None without its section."""
    head = next((n for n, line in enumerate(lines) if re.match(rf"{section}:", line)), None)
    if head is None:
        return None
    end = head + 1
    while end < len(lines) and (lines[end].startswith("  ") or not lines[end].strip()):
        end += 1
    first = next((n for n in range(head + 1, end) if lines[n].startswith(f"  {key}:")), None)
    if first is None:
        while not lines[end - 1].strip():
            end -= 1
        return end
    after = first + 1
    while after < end and lines[after].startswith("    "):
        after += 1
    del lines[first:after]
    return first
