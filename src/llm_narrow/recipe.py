"""The recipe: every setting of a run, from a YAML file and the flags given, checked once.

A setting is one field here and one reader elsewhere. Fields carry their rule as their
description, so that a wrong value is told by the rule that it breaks.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from .errors import BadInput, UnknownName, problems

Kind = Literal["neurons", "heads"]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, StringConstraints(min_length=1)]
Device = Annotated[str, StringConstraints(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")]
Target = Annotated[str, StringConstraints(pattern=r"^\d+(\.\d+)?(%|[kKmMbB])?$")]
MULTIPLES = {"k": 1e3, "m": 1e6, "b": 1e9}


def by_kind(value: object) -> object:
    """`0.5`, `neurons=0.5,heads=0.2` and mappings, all as kind -> sparsity; else left as it is."""
    if isinstance(value, str):
        pairs = [part.partition("=") for part in value.split(",")]
        try:
            if len(pairs) == 1 and not pairs[0][1]:
                return float(value)
            return {kind.strip(): float(number) for kind, _, number in pairs}
        except ValueError:
            return value
    return value


def listed(value: object) -> object:
    """`neurons,heads` as a tuple of names, and a YAML list as one; else left as it is."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(","))
    return tuple(value) if isinstance(value, list) else value


def refit_mode(value: object) -> object:
    """True and False as the modes that they stand for."""
    return {True: "sequential", False: "none"}[value] if isinstance(value, bool) else value


class Section(BaseModel):
    """Frozen, strict, and without room for unknown keys."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class Model(Section):
    """Which model is narrowed."""

    name: Text = Field(description="an alias, a hub id, a folder or a .gguf file")
    revision: Text | None = Field(None, description="a branch, tag or commit of the hub")
    trust_remote_code: bool = Field(False, description="true or false")


class Domain(Section):
    """What it is narrowed to."""

    name: Text = Field(description="a known domain, a folder, a file or a hub data set")
    glob: Text | None = Field(None, description="a file pattern such as **/*.rs")
    text_column: Text | None = Field(None, description="the name of a column")
    project_column: Text | None = Field(None, description="the name of a column")
    max_documents: int | None = Field(None, ge=1, description="a whole number of at least 1")


class Blocks(Section):
    """How text is fed to the model, wherever it is: scoring, refit and measurement alike."""

    length: int = Field(512, ge=8, description="a whole number of at least 8 tokens")
    batch_size: int = Field(4, ge=1, description="a whole number of at least 1 block")


class Score(Section):
    """How units are scored."""

    criterion: Text = Field("attribution", description="the name of a criterion")
    tokens: int = Field(65536, ge=1, description="a whole number of at least 1 token")


class Prune(Section):
    """What is removed, and how the rest is refitted."""

    sparsity: Annotated[Fraction | dict[Kind, Fraction] | None, BeforeValidator(by_kind)] = Field(
        None, description="at least 0 and below 1, or such a number for each kind (neurons, heads)"
    )
    target_params: int | Target | None = Field(
        None, description="a number of parameters (90M) or a share of the model's (60%)"
    )
    kinds: Annotated[tuple[Kind, ...] | None, BeforeValidator(listed)] = Field(
        None, min_length=1, description="one or more of neurons, heads"
    )
    allocation: Literal["uniform", "global"] = "uniform"
    multiple: int = Field(8, ge=1, description="a whole number of at least 1")
    refit: Annotated[Literal["sequential", "oneshot", "none"], BeforeValidator(refit_mode)] = (
        "sequential"
    )
    damping: float = Field(0.01, gt=0, description="a number above 0")

    @model_validator(mode="after")
    def _exclusive(self) -> Self:
        if self.sparsity is not None and self.target_params is not None:
            raise ValueError("give either prune.sparsity or prune.target_params, not both")
        if isinstance(self.sparsity, dict) and self.kinds is not None:
            raise ValueError("leave prune.kinds out: prune.sparsity already names its kinds")
        share = isinstance(self.target_params, str) and self.target_params.endswith("%")
        if self.target_params is not None and not 0 < target(self.target_params, 100) <= (
            100 if share else float("inf")
        ):
            raise ValueError(
                f"prune.target_params must be above 0 and at most 100%, got {self.target_params!r}"
            )
        return self

    @property
    def chosen_kinds(self) -> tuple[Kind, ...]:
        """The kinds of unit that may go; neurons alone unless others are asked for."""
        if isinstance(self.sparsity, dict):
            return tuple(self.sparsity)
        return self.kinds or ("neurons",)

    @property
    def sparsity_by_kind(self) -> dict[Kind, float] | None:
        """The sparsity of each chosen kind; None when a number of parameters is asked for."""
        if isinstance(self.sparsity, dict):
            return dict(self.sparsity)
        if self.target_params is not None:
            return None
        return dict.fromkeys(self.chosen_kinds, 0.5 if self.sparsity is None else self.sparsity)


class Recover(Section):
    """Training after the removal."""

    tokens: Literal[0] = Field(
        0, description="0: this version removes and refits, it does not train afterwards"
    )


class Measure(Section):
    """What is measured before and after."""

    held_out_tokens: int = Field(32768, ge=1, description="a whole number of at least 1 token")
    speed: bool = Field(True, description="true or false")
    samples: int = Field(1, ge=0, description="a whole number of at least 0")


class Recipe(Section):
    """Every setting of one run."""

    model: Model
    domain: Domain
    blocks: Blocks = Blocks()
    score: Score = Score()
    prune: Prune = Prune()
    recover: Recover = Recover()
    measure: Measure = Measure()
    seed: int = Field(0, ge=0, description="a whole number of at least 0")
    device: Device = Field("auto", description="auto, cpu, mps, cuda or cuda:N")
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    @model_validator(mode="after")
    def _enough_tokens(self) -> Self:
        length = self.blocks.length
        for name, tokens, blocks in (
            ("score.tokens", self.score.tokens, 2),
            ("measure.held_out_tokens", self.measure.held_out_tokens, 1),
        ):
            if tokens < blocks * length:
                raise ValueError(
                    f"{name} must be at least {blocks * length} ({blocks} x blocks.length), "
                    f"got {tokens}"
                )
        return self

    def resolved(self) -> dict[str, Any]:
        """As plain data, with what was left open settled; loading it gives the same run."""
        p = self.prune
        by_kind = p.sparsity_by_kind
        settled = p.model_copy(
            update={
                "sparsity": by_kind,
                "kinds": p.chosen_kinds if by_kind is None else None,
            }
        )
        data: dict[str, Any] = self.model_copy(update={"prune": settled}).model_dump(
            mode="json", exclude_none=True
        )
        return data

    def to_yaml(self) -> str:
        """The resolved recipe as the text of a recipe file."""
        return yaml.safe_dump(self.resolved(), sort_keys=False)


# Flag of the command line (and keyword of the Python API) -> where its value goes.
FLAGS: dict[str, str] = {
    "model": "model.name",
    "revision": "model.revision",
    "trust_remote_code": "model.trust_remote_code",
    "domain": "domain.name",
    "glob": "domain.glob",
    "text_column": "domain.text_column",
    "project_column": "domain.project_column",
    "max_documents": "domain.max_documents",
    "length": "blocks.length",
    "batch_size": "blocks.batch_size",
    "criterion": "score.criterion",
    "calibration_tokens": "score.tokens",
    "sparsity": "prune.sparsity",
    "target_params": "prune.target_params",
    "kinds": "prune.kinds",
    "allocation": "prune.allocation",
    "multiple": "prune.multiple",
    "refit": "prune.refit",
    "damping": "prune.damping",
    "recover_tokens": "recover.tokens",
    "held_out_tokens": "measure.held_out_tokens",
    "speed": "measure.speed",
    "samples": "measure.samples",
    "seed": "seed",
    "device": "device",
    "dtype": "dtype",
}


def target(value: int | str, total: int) -> int:
    """The number of parameters that `60%` of `total`, `90M` or `90000000` stand for."""
    if isinstance(value, int):
        return value
    if value.endswith("%"):
        return round(total * float(value[:-1]) / 100)
    return round(float(value.rstrip("kKmMbB")) * MULTIPLES.get(value[-1].lower(), 1))


def load(
    file: Path | str | None = None,
    given: Mapping[str, object] | None = None,
    *,
    criteria: Iterable[str] = (),
    spell: Callable[[str], str] = str,
) -> Recipe:
    """The recipe of `file` with the flags `given` (name in FLAGS -> value) laid over it.

    `criteria` are the names that score.criterion may have (any, if empty); `spell` writes a
    flag's name as the user did. Raises BadInput, with all problems of the input at once.
    """
    given = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in (given or {}).items()
        if value is not None
    }
    for name in given.keys() - FLAGS.keys():
        raise UnknownName("setting", name, FLAGS)
    read = _read(Path(file)) if file is not None else {}
    data = {name: value for name, value in read.items() if value is not None}
    if isinstance(prune := data.get("prune"), dict):  # a flag replaces what it stands against
        if "sparsity" in given:
            prune.pop("target_params", None)
            if isinstance(by_kind(given["sparsity"]), dict):
                prune.pop("kinds", None)
        elif "target_params" in given:
            prune.pop("sparsity", None)
    spelled = {FLAGS[name]: spell(name) for name in given}
    found: list[str] = []
    for name, value in given.items():
        section, _, key = FLAGS[name].rpartition(".")
        place = data.setdefault(section, {}) if section else data
        if isinstance(place, dict):
            place[key] = value
    criterion: object = _at(data, ("score", "criterion"))
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        found += dict.fromkeys(_line(dict(e), data, spelled, spell) for e in error.errors())
    if (known := list(criteria)) and isinstance(criterion, str) and criterion not in known:
        where = spelled.get("score.criterion", "score.criterion")
        found.append(str(UnknownName(where, criterion, known)))
    if not found:
        return recipe
    if file is None and len(found) == 1:
        raise BadInput(found[0])
    raise problems("the settings given" if file is None else str(file), found)


class _Loader(yaml.SafeLoader):
    """YAML whose numbers may be written 1e-3, and whose keys may not be repeated."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands there twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _read(file: Path) -> dict[str, Any]:
    try:
        data = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise BadInput(f"No recipe at {file}. Recipes are YAML files, as in recipes/.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{file} cannot be read as a recipe: {error}") from None
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise BadInput(f"{file} is not YAML: {reason}") from None
    if not isinstance(data, dict):
        raise BadInput(f"{file} must hold the sections of a recipe, got {type(data).__name__}.")
    return data


def _at(data: object, path: Iterable[str | int]) -> object:
    for key in path:
        data = data.get(key) if isinstance(data, dict) else None
    return data


def _line(
    error: dict[str, Any],
    data: Mapping[str, Any],
    spelled: Mapping[str, str],
    spell: Callable[[str], str],
) -> str:
    """One problem in our words: the place, its rule and the value."""
    if error["type"] == "value_error":  # our own words, from a check across fields
        text = str(error["ctx"]["error"])
        for dotted, flag in spelled.items():
            text = text.replace(dotted, flag)
        return text
    path, field, section = _resolve(error["loc"])
    dotted = ".".join(path)
    place = spelled.get(dotted, dotted)
    if error["type"] == "missing":
        flag = next(name for name, at in FLAGS.items() if f"{at}.".startswith(f"{dotted}."))
        return f"{dotted} is missing: name it in a recipe or with {spell(flag)}"
    if error["type"] == "extra_forbidden":
        inside = f" of {'.'.join(path[:-1])}" if path[:-1] else ""
        return str(UnknownName(f"key{inside}", path[-1], section.model_fields))
    value = _at(data, path)
    if field is None or section is None:
        return f"{place} must be a mapping of settings, got {value!r}"
    if choices := _choices(field.annotation):
        return str(UnknownName(place, str(value), choices))
    return f"{place} must be {field.description}, got {value!r}"


def _resolve(loc: tuple[str | int, ...]) -> tuple[list[str], Any, Any]:
    """The path of pydantic's `loc` as far as it names fields, the field and its section."""
    section: Any = Recipe
    path: list[str] = []
    field = None
    for part in loc:
        path.append(str(part))
        field = section.model_fields.get(part)
        if field is None:
            return path, None, section
        if not (isinstance(field.annotation, type) and issubclass(field.annotation, Section)):
            return path, field, section
        section = field.annotation
    return path, None, section


def _choices(annotation: Any) -> tuple[str, ...]:
    """The names that a field of names may have; none for other fields."""
    if get_origin(annotation) in (Union, UnionType):
        return ()
    values = get_args(annotation) if get_origin(annotation) is Literal else ()
    return tuple(v for v in values if isinstance(v, str))
