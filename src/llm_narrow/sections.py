"""The sections of a recipe.

A setting is one field here and one reader elsewhere. Fields carry their rule as their
description, so that a wrong value is told by the rule that it breaks.
"""

import re
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)

Kind = Literal["neurons", "heads", "experts"]
Part = Literal["attention", "mlp", "layers"]  # halves of layers, and layers
Removable = Literal["neurons", "heads", "experts", "attention", "mlp", "layers"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Fraction = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, StringConstraints(min_length=1)]
Device = Annotated[str, StringConstraints(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")]
Target = Annotated[str, StringConstraints(pattern=r"^\d+(\.\d+)?(%|[kKmMbB])?$")]
Bytes = Annotated[str, StringConstraints(pattern=r"^\d+(\.\d+)?(%|([kKmMgG][iI]?)?[bB])$")]
Count = Annotated[int, BeforeValidator(lambda value: counted(value))]
Times = Annotated[int, Field(ge=1), BeforeValidator(lambda value: counted(value))]
Names = Annotated[tuple[Text, ...] | None, BeforeValidator(lambda value: listed(value))]
TOKENS = "a whole number of at least 1 token; 200k and 1M are understood"
MULTIPLES = {"k": 1e3, "m": 1e6, "b": 1e9}
TARGETS = ("target_params", "target_size", "target_flops", "target_kv_cache")
BYTES = ("target_size", "target_kv_cache")  # of those


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


def counted(value: object) -> object:
    """`200k` and `1M` as the numbers that they stand for; else left as it is."""
    if isinstance(value, str) and re.fullmatch(r"\d+(\.\d+)?[kKmMbB]?", value):
        return target(value, 0)
    return value


def refit_mode(value: object) -> object:
    """True and False as the modes that they stand for."""
    return {True: "sequential", False: "none"}[value] if isinstance(value, bool) else value


def target(value: int | str, total: int) -> int:
    """The number of parameters that `60%` of `total`, `90M` or `90000000` stand for."""
    if isinstance(value, int):
        return value
    if value.endswith("%"):
        return round(total * float(value[:-1]) / 100)
    return round(float(value.rstrip("kKmMbB")) * MULTIPLES.get(value[-1].lower(), 1))


def target_bytes(value: int | str, total: float) -> float:
    """The bytes that `60%` of `total`, `200MB` (of a million), `1.5GiB` or a number stand for."""
    if isinstance(value, int):
        return value
    number, unit = re.fullmatch(r"([\d.]+)(.*)", value).groups()  # type: ignore[union-attr]
    if unit == "%":
        return total * float(number) / 100
    size = unit.upper()
    power = "_KMG".index(size[0]) if len(size) > 1 else 0
    return float(number) * (1024.0 if "I" in size else 1000.0) ** power


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
    batch_size: int = Field(2, ge=1, description="a whole number of at least 1 block")


class Score(Section):
    """How units are scored."""

    criterion: Text = Field("attribution", description="the name of a criterion")
    tokens: Count = Field(65536, ge=1, description=TOKENS)
    forget: Names = Field(None, description="names of domains, folders or files")
    forget_weight: float = Field(0.0, ge=0, description="a number of at least 0")


class Prune(Section):
    """What is removed, and how the rest is refitted."""

    method: Literal["oneshot", "lasso"] = "oneshot"
    sparsity: Annotated[Fraction | dict[Kind, Fraction] | None, BeforeValidator(by_kind)] = Field(
        None, description="at least 0 and below 1, or such a number for each kind (neurons, heads)"
    )
    target_params: int | Target | None = Field(
        None, description="a number of parameters (90M) or a share of the model's (60%)"
    )
    target_size: int | Bytes | None = Field(
        None, description="bytes of weights (200MB, 1.5GiB) or a share of the model's (60%)"
    )
    target_flops: int | Target | None = Field(
        None, description="operations of a token (180M) or a share of the model's (60%)"
    )
    target_kv_cache: int | Bytes | None = Field(
        None, description="bytes of a token in the cache (12kB) or a share of the model's (50%)"
    )
    query_heads: int | None = Field(None, ge=1, description="a whole number of at least 1")
    channels: int | None = Field(None, ge=1, description="a whole number of at least 1")
    keep_layers: int | None = Field(None, ge=1, description="a whole number of at least 1")
    kinds: Annotated[tuple[Removable, ...] | None, BeforeValidator(listed)] = Field(
        None,
        description="one or more of neurons, heads, experts, attention, mlp, layers, vocabulary",
    )
    vocabulary: Literal["whole", "domain"] = "whole"
    vocabulary_threshold: Times | Literal["auto"] = Field(
        2, description="a whole number of at least 1, or auto"
    )
    allocation: Literal["uniform", "global", "joint"] = "uniform"
    layout: Literal["auto", "padded"] = "auto"
    multiple: int = Field(8, ge=1, description="a whole number of at least 1")
    refit: Annotated[Literal["sequential", "oneshot", "none"], BeforeValidator(refit_mode)] = (
        "sequential"
    )
    refit_tokens: Count | None = Field(None, ge=1, description=TOKENS)
    damping: float = Field(0.01, gt=0, description="a number above 0")
    forget_refit: float | None = Field(
        None, ge=0, description="a number of at least 0"
    )

    @model_validator(mode="before")
    @classmethod
    def _settled(cls, data: Any) -> Any:
        """Take `vocabulary` out of the kinds, where users look for it: it is not made of units.

        What only a joint budget can do asks for one, unless the allocation is given.
        """
        if not isinstance(data, dict):
            return data
        kinds = listed(data.get("kinds"))
        if not isinstance(kinds, tuple):
            kinds = ()
        if "vocabulary" in kinds:
            data = {**data, "vocabulary": "domain"}
            data["kinds"] = kinds = tuple(kind for kind in kinds if kind != "vocabulary")
        only = ("target_flops", "target_kv_cache", "keep_layers")
        if {*kinds} & {*get_args(Part)} or any(data.get(name) is not None for name in only):
            data = {"allocation": "joint", **data}
        return data

    @model_validator(mode="after")
    def _exclusive(self) -> Self:
        if self.kinds == () and self.vocabulary == "whole":
            raise ValueError("prune.kinds must be one or more of neurons, heads, experts, "
                             "attention, mlp, layers, vocabulary, got none")  # fmt: skip
        if self.vocabulary_threshold == "auto" and not (
            self.allocation == "joint" and self.vocabulary == "domain"
            and (self.chosen_kinds or self.parts)
        ):  # fmt: skip
            raise ValueError(
                "prune.vocabulary_threshold auto weighs tokens against units: it needs "
                "prune.allocation joint, and the vocabulary and another kind in prune.kinds"
            )
        targets = self.targets
        if self.sparsity is not None and targets:
            raise ValueError(f"give either prune.sparsity or prune.{next(iter(targets))}, not both")
        if isinstance(self.sparsity, dict) and self.kinds is not None:
            raise ValueError("leave prune.kinds out: prune.sparsity already names its kinds")
        for name, value in targets.items():
            share = isinstance(value, str) and value.endswith("%")
            if isinstance(value, str) and re.fullmatch(r"[\d.]+", value) and 0 < float(value) < 100:
                percent = float(value) * (100 if float(value) <= 1 else 1)
                raise ValueError(
                    f"prune.{name} {value} is too few to be meant; as a share of the model's it is "
                    f"{percent:g}%"
                )
            least = target_bytes(value, 100) if name in BYTES else target(value, 100)
            if not 0 < least <= (100 if share else float("inf")):
                raise ValueError(f"prune.{name} must be above 0 and at most 100%, got {value!r}")
        if self.allocation == "joint":
            if not targets or self.method == "lasso":
                raise ValueError(
                    "prune.allocation joint spends a budget in one shot: give prune.target_params "
                    "(or target_size, target_flops, target_kv_cache), and prune.method oneshot"
                )
            if self.keep_layers is not None and "layers" not in self.parts:
                raise ValueError(
                    "prune.keep_layers says how many layers stay where some may go: name layers "
                    "in prune.kinds too"
                )
            return self
        for name in ("target_flops", "target_kv_cache", "keep_layers"):
            if getattr(self, name) is not None:
                raise ValueError(f"prune.{name} needs prune.allocation joint")
        if self.parts:
            raise ValueError(
                f"prune.kinds {', '.join(self.parts)} needs prune.allocation joint, got "
                f"{self.allocation}"
            )
        return self

    @property
    def targets(self) -> dict[str, int | str]:
        """The targets that are given, by the name of their setting."""
        return {name: value for name in TARGETS if (value := getattr(self, name)) is not None}

    def parameters_wanted(self, whole: int, entry: int) -> int | None:
        """How many parameters may be left of `whole`, of `entry` bytes each; None if not said."""
        found = []
        if self.target_params is not None:
            found.append(target(self.target_params, whole))
        if self.target_size is not None:
            found.append(int(target_bytes(self.target_size, whole * entry) // entry))
        return min(found, default=None)

    @property
    def by_score(self) -> Literal["uniform", "global"]:
        """How widths are set where scores alone decide."""
        return "uniform" if self.allocation == "uniform" else "global"

    @property
    def chosen_kinds(self) -> tuple[Kind, ...]:
        """The kinds of unit that may go; neurons alone unless others are asked for."""
        if isinstance(self.sparsity, dict):
            return tuple(self.sparsity)
        if self.kinds is None:
            return ("neurons",) if self.target_kv_cache is None else ("neurons", "heads")
        return tuple(kind for kind in KINDS if kind in self.kinds)

    @property
    def parts(self) -> tuple[Part, ...]:
        """What may go beside units: halves of layers, and layers."""
        return tuple(part for part in get_args(Part) if part in (self.kinds or ()))

    @property
    def sparsity_by_kind(self) -> dict[Kind, float] | None:
        """The sparsity of each chosen kind; None when a size is asked for."""
        if isinstance(self.sparsity, dict):
            return dict(self.sparsity)
        if self.targets:
            return None
        return dict.fromkeys(self.chosen_kinds, 0.5 if self.sparsity is None else self.sparsity)


class Train(Section):
    """How weights are trained, in the lasso as in the recovery, and what they learn from."""

    distill: Literal["none", "teacher", "cached"] = "teacher"
    teacher: Text | None = Field(None, description="an alias, a hub id, a folder or a .gguf file")
    temperature: float = Field(1.0, gt=0, description="a number above 0")
    mix: float = Field(0.3, ge=0, le=1, description="from 0 (text alone) to 1 (teacher alone)")
    top_k: int = Field(64, ge=1, description="a whole number of at least 1")
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: Fraction = Field(0.05, description="a share of the steps, at least 0 and below 1")
    accumulation: int = Field(1, ge=1, description="a whole number of at least 1 batch")
    clip: float = Field(1.0, gt=0, description="a norm above 0")
    weight_decay: float = Field(0.0, ge=0, description="a number of at least 0")
    checkpointing: bool = Field(False, description="true or false")
    sharded: bool = Field(False, description="true or false")
    validation_tokens: Count = Field(16384, ge=1, description=TOKENS)
    evaluate_every: int = Field(50, ge=1, description="a whole number of at least 1 step")
    save_every_minutes: float = Field(5.0, gt=0, description="a number above 0")
    trackers: Names = Field(None, description="names of trackers, such as tensorboard or wandb")


class Lasso(Section):
    """Training that draws units to zero before the removal (with prune.method lasso)."""

    tokens: Count = Field(102400, ge=1, description=TOKENS)
    lr: float = Field(2e-4, gt=0, description="a number above 0")
    penalty: Literal["group_lasso", "l_half_of_l2", "hoyer", "l1"] = "group_lasso"
    step: Literal["proximal", "gradient"] = "proximal"
    control: Literal["target", "timetable", "loss", "fixed"] = "target"
    strength: float = Field(1.0, ge=0, description="a number of at least 0")
    weights: Literal["scores", "size", "one"] = "scores"
    fill: bool = Field(True, description="true or false")

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.step == "proximal" and self.penalty != "group_lasso":
            raise ValueError(
                f"lasso.penalty {self.penalty} has no proximal step here: give lasso.step gradient"
            )
        if self.step == "gradient" and self.control in ("target", "timetable"):
            raise ValueError(
                f"lasso.control {self.control} needs exact zeros, which lasso.step gradient never "
                "gives: give lasso.control loss or fixed"
            )
        return self


class Recover(Section):
    """Training after the removal."""

    tokens: Count = Field(0, ge=0, description="a whole number of at least 0 tokens, as 200k")
    lr: float = Field(2e-4, gt=0, description="a number above 0")
    method: Literal["full", "lora"] = "full"
    lora_rank: int = Field(16, ge=1, description="a whole number of at least 1")


class Measure(Section):
    """What is measured before and after."""

    held_out_tokens: Count = Field(32768, ge=1, description=TOKENS)
    speed: bool = Field(True, description="true or false")
    samples: int = Field(1, ge=0, description="a whole number of at least 0")
    report: bool = Field(True, description="true or false")
