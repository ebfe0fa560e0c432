"""The recipe: every setting of a run, from a YAML file and the flags given, checked once.

The settings themselves, with their rules, are in sections.py.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Self, Union, get_args, get_origin

import yaml
from pydantic import Field, ValidationError, model_validator

from .errors import BadInput, UnknownName, problems
from .sections import (
    TARGETS,
    Blocks,
    Device,
    Domain,
    Kind,
    Lasso,
    Measure,
    Model,
    Prune,
    Recover,
    Score,
    Section,
    Train,
    by_kind,
    target,
)

# Of those tried in docs/bench/forgetting.md the greatest that costs the domain less than 2 %.
FORGETTING = 0.03

__all__ = ["FLAGS", "Kind", "Recipe", "Section", "load", "target"]


class Recipe(Section):
    """Every setting of one run."""

    model: Model
    domain: Domain
    blocks: Blocks = Blocks()
    score: Score = Score()
    prune: Prune = Prune()
    lasso: Lasso = Lasso()
    recover: Recover = Recover()
    train: Train = Train()
    measure: Measure = Measure()
    seed: int = Field(0, ge=0, description="a whole number of at least 0")
    device: Device = Field("auto", description="auto, cpu, mps, cuda or cuda:N")
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.prune.method == "lasso" and not self.prune.chosen_kinds:
            raise ValueError(
                "prune.method lasso has no units to draw: prune.kinds names the vocabulary alone. "
                "Add neurons or heads, or give prune.method oneshot"
            )
        if self.prune.method == "lasso" and "experts" in self.prune.chosen_kinds:
            raise ValueError(
                "prune.method lasso cannot draw experts to zero: the router would still choose "
                "them. Leave experts out of prune.kinds, or give prune.method oneshot"
            )
        if self.prune.forget_refit and not self.score.forget:
            raise ValueError(
                "prune.forget_refit has the refit unlearn the domains of score.forget: name some "
                "there, or give 0"
            )
        if self.forgetting and self.prune.refit != "sequential":
            raise ValueError(
                f"prune.forget_refit needs prune.refit sequential, got {self.prune.refit}"
            )
        length = self.blocks.length
        needed = [
            ("score.tokens", self.score.tokens, 2),
            ("prune.refit_tokens", self.tokens_to_refit, 1),
            ("measure.held_out_tokens", self.measure.held_out_tokens, 1),
        ]
        if self.trains:
            needed.append(("train.validation_tokens", self.train.validation_tokens, 1))
            if self.dtype != "float32":
                raise ValueError(
                    f"dtype must be float32 for training, got {self.dtype}: weights and optimizer "
                    "are float32, passes run in bfloat16 where that is fast"
                )
        for name, tokens, blocks in needed:
            if tokens < blocks * length:
                raise ValueError(
                    f"{name} must be at least {blocks * length} ({blocks} x blocks.length), "
                    f"got {tokens}"
                )
        return self

    def with_threshold(self, threshold: int) -> "Recipe":
        """The same with a threshold of the vocabulary that is settled."""
        prune = self.prune.model_copy(update={"vocabulary_threshold": threshold})
        return self.model_copy(update={"prune": prune})

    @property
    def trains(self) -> bool:
        """Whether weights are trained, before the removal or after."""
        return self.prune.method == "lasso" or self.recover.tokens > 0

    @property
    def tokens_to_refit(self) -> int:
        """On how many tokens the readers are refitted."""
        return self.prune.refit_tokens or self.score.tokens

    @property
    def forgetting(self) -> float:
        """How much a token of the domains to forget counts in the refit."""
        if self.prune.forget_refit is not None:
            return self.prune.forget_refit
        return FORGETTING if self.score.forget and self.prune.refit == "sequential" else 0.0

    def resolved(self) -> dict[str, Any]:
        """As plain data, with what was left open settled; loading it gives the same run."""
        p = self.prune
        by_kind = p.sparsity_by_kind
        settled = p.model_copy(
            update={
                "sparsity": by_kind,
                "forget_refit": self.forgetting if self.score.forget else None,
                "kinds": (*p.chosen_kinds, *p.parts) if by_kind is None else None,
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
    "forget": "score.forget",
    "forget_weight": "score.forget_weight",
    "sparsity": "prune.sparsity",
    "target_params": "prune.target_params",
    "target_size": "prune.target_size",
    "target_flops": "prune.target_flops",
    "target_kv_cache": "prune.target_kv_cache",
    "query_heads": "prune.query_heads",
    "channels": "prune.channels",
    "keep_layers": "prune.keep_layers",
    "kinds": "prune.kinds",
    "vocabulary": "prune.vocabulary",
    "vocabulary_threshold": "prune.vocabulary_threshold",
    "allocation": "prune.allocation",
    "layout": "prune.layout",
    "multiple": "prune.multiple",
    "refit": "prune.refit",
    "refit_tokens": "prune.refit_tokens",
    "damping": "prune.damping",
    "forget_refit": "prune.forget_refit",
    "method": "prune.method",
    "lasso_tokens": "lasso.tokens",
    "lasso_lr": "lasso.lr",
    "penalty": "lasso.penalty",
    "step": "lasso.step",
    "control": "lasso.control",
    "strength": "lasso.strength",
    "weights": "lasso.weights",
    "fill": "lasso.fill",
    "recover_tokens": "recover.tokens",
    "recover_method": "recover.method",
    "lora_rank": "recover.lora_rank",
    "lr": "recover.lr",
    "distill": "train.distill",
    "teacher": "train.teacher",
    "temperature": "train.temperature",
    "mix": "train.mix",
    "top_k": "train.top_k",
    "schedule": "train.schedule",
    "warmup": "train.warmup",
    "accumulation": "train.accumulation",
    "clip": "train.clip",
    "weight_decay": "train.weight_decay",
    "checkpointing": "train.checkpointing",
    "sharded": "train.sharded",
    "validation_tokens": "train.validation_tokens",
    "evaluate_every": "train.evaluate_every",
    "save_every_minutes": "train.save_every_minutes",
    "trackers": "train.trackers",
    "held_out_tokens": "measure.held_out_tokens",
    "speed": "measure.speed",
    "samples": "measure.samples",
    "report": "measure.report",
    "seed": "seed",
    "device": "device",
    "dtype": "dtype",
}


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
            for name in TARGETS:
                prune.pop(name, None)
            if isinstance(by_kind(given["sparsity"]), dict):
                prune.pop("kinds", None)
        elif given.keys() & {*TARGETS}:
            prune.pop("sparsity", None)
    spelled = {FLAGS[name]: spell(name) for name in given}
    for name, value in given.items():
        section, _, key = FLAGS[name].rpartition(".")
        place = data.setdefault(section, {}) if section else data
        if isinstance(place, dict):
            place[key] = value
    source = None if file is None else str(file)
    return _checked(data, source, spelled, spell, list(criteria))


def _checked(
    data: dict[str, Any],
    source: str | None,
    spelled: Mapping[str, str],
    spell: Callable[[str], str],
    criteria: Sequence[str],
) -> Recipe:
    """The recipe of the data. Raises BadInput with all problems at once."""
    found: list[str] = []
    criterion: object = _at(data, ("score", "criterion"))
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        found += dict.fromkeys(_line(dict(e), data, spelled, spell) for e in error.errors())
    if criteria and isinstance(criterion, str) and criterion not in criteria:
        where = spelled.get("score.criterion", "score.criterion")
        found.append(str(UnknownName(where, criterion, criteria)))
    if not found:
        return recipe
    if source is None and len(found) == 1:
        raise BadInput(found[0])
    raise problems(source or "the settings given", found)


def of(data: Mapping[str, Any], *, criteria: Iterable[str] = ()) -> Recipe:
    """The recipe that `Recipe.resolved` gave as plain data."""
    return _checked(dict(data), "the recipe", {}, str, list(criteria))


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
        empty = " (it is empty; `llm-narrow init` writes one)" if data is None else ""
        kind = type(data).__name__
        raise BadInput(f"{file} must hold the sections of a recipe, got {kind}{empty}.")
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
    told = f"{place} must be {field.description}, got {value!r}"
    percent = re.fullmatch(r"(\d+(?:\.\d+)?) *(%?)", str(value))
    if path[-1] == "sparsity" and percent and (0 if percent[2] else 2) <= float(percent[1]) < 100:
        told += f"; {percent[1]} % is {float(percent[1]) / 100:g}"
    return told


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
