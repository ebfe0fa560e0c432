"""The JSON schema of a recipe: pydantic's own, and beside it the spellings that a recipe allows.

`200k` for a number of tokens, `neurons,heads` for a list and the like are turned into plain values
before pydantic looks at them, so that its schema does not know them. Here each of these turns
says what it takes; a field with another one is an error rather than a wrong schema. The schema as a
file is recipes/recipe.schema.json: `llm-narrow init --schema` prints it.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any, get_args

from pydantic import BeforeValidator

from . import sections
from .recipe import Recipe
from .sections import KINDS, Section

NUMBER = r"\d+(\.\d+)?"
SHARE = r"0?(\.\d+)?"
# What makes plain values of other spellings -> the schemas of these.
SPELLINGS: dict[Callable[..., object], list[dict[str, Any]]] = {
    sections.listed: [{"type": "string", "minLength": 1}],
    sections.refit_mode: [{"type": "boolean"}],
    sections.by_kind: [
        {"type": "string", "pattern": f"^(({'|'.join(KINDS)})={SHARE}(, *)?)+$|^{SHARE}$"}
    ],
}
COUNTED = [{"type": "string", "pattern": f"^{NUMBER}[kKmMbB]?$"}]
VOCABULARY = "vocabulary"  # may stand among the kinds, from which it is taken out


def schema() -> dict[str, Any]:
    """The schema of a recipe file."""
    made = Recipe.model_json_schema()
    made["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    made["title"] = "Recipe of llm-narrow"
    for section, name, spellings in _spelled(Recipe):
        place = made if section is Recipe else made["$defs"][section.__name__]
        _also(place["properties"][name], spellings)
    kinds = made["$defs"]["Prune"]["properties"]["kinds"]
    for choice in kinds["anyOf"]:
        if choice.get("type") == "array":
            choice["items"]["enum"].append(VOCABULARY)
    return made


def text() -> str:
    """The schema as a file has it."""
    return json.dumps(schema(), indent=2) + "\n"


def _also(field: dict[str, Any], spellings: list[dict[str, Any]]) -> None:
    """Let a field take these spellings too."""
    about = ("default", "description", "title")
    told: dict[str, Any] = {key: field.pop(key) for key in about if key in field}
    choices = field.pop("anyOf", None) or [dict(field)]
    field.clear()
    field.update({**told, "anyOf": [*choices, *spellings]})


def _spelled(section: type[Section]) -> Iterator[tuple[type[Section], str, list[dict[str, Any]]]]:
    """The fields, of the section and of those in it, that take other spellings."""
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            yield from _spelled(inner)
        for turn in (m.func for m in _metadata(field) if isinstance(m, BeforeValidator)):
            yield section, name, _of(turn)


def _metadata(field: Any) -> list[Any]:
    inside = [m for arg in get_args(field.annotation) for m in getattr(arg, "__metadata__", ())]
    return [*field.metadata, *inside]


def _of(turn: Callable[..., object]) -> list[dict[str, Any]]:
    """The spellings that a turn takes. Two of them are lambdas, told apart by what they call."""
    if turn in SPELLINGS:
        return SPELLINGS[turn]
    called: tuple[str, ...] = turn.__code__.co_names
    if called == ("counted",):
        return COUNTED
    if called == ("listed",):
        return SPELLINGS[sections.listed]
    raise LookupError(f"{turn} has no spellings here: say what it takes.")
