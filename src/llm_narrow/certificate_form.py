"""What a certificate says: what a model is for, what that cost, what was lost and how surely.

Every figure stands with the command that it is of and the hash of its data. `certificate.json` has
the form of `Certificate`, which docs/certificate.md tells of.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict

FILE = "certificate.json"


class Part(BaseModel):
    """Frozen, strict, and without room for unknown keys."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class Interval(Part):
    """A value with the 95 % interval that it was measured with, or the range of its repeats."""

    value: float
    low: float | None
    high: float | None


class Weights(Part):
    """A model. `bytes` are those of its weight files."""

    name: str
    sha256: str
    parameters: int
    bytes: int | None


class OnDomain(Part):
    """The model on held-out text of its domain. `increase` is that of bits per byte, relative;
    `difference` that of loss in nats per token, where the tokens are the same."""

    domain: str
    part: str
    sha256: str | None
    tokens: int
    documents: int
    loss: tuple[Interval, Interval]
    bits_per_byte: tuple[Interval, Interval]
    accuracy: tuple[Interval, Interval]
    increase: Interval
    difference: Interval | None
    command: str


class Speed(Part):
    """How many times as fast as the whole model, timed side by side."""

    prefill: Interval
    decode: Interval
    command: str


class OffDomain(Part):
    """Something that the model is not for. `before` is of the whole model.

    `measure` is bits_per_byte or accuracy. `increase` is in nats per byte, or of the accuracy.
    """

    name: str
    group: str
    measure: Literal["bits_per_byte", "accuracy"]
    before: Interval
    after: Interval
    increase: Interval | None
    sha256: str | None
    command: str


class Selectivity(Part):
    """Increase of loss off the domain ÷ that on it, both in nats per byte.

    `value` is None where the loss on the domain has not risen; `unbounded` says that it has off it.
    """

    value: float | None
    low: float | None
    high: float | None
    unbounded: bool
    on_increase: float
    off_increase: float
    over: str
    command: str


class Relearning(Part):
    """Tokens until a lost domain is back ÷ those that fresh weights of the same shape need.

    None of tokens is never within the budget; then `at_least` or `at_most` bound the ratio, as far
    as the budget tells. `low` and `high` are of seeds.
    """

    domain: str
    sha256: str | None
    goal: str
    target: float
    tokens: float | None
    scratch_tokens: float | None
    budget: int
    seeds: int
    ratio: float | None
    at_least: float | None
    at_most: float | None
    low: float | None
    high: float | None
    command: str


class Certificate(Part):
    """All of it. `stability` is, by kind of unit, the share that both halves of the calibration
    text would keep; `not_measured` has a command for each figure that is not there."""

    format: Literal["llm-narrow certificate"] = "llm-narrow certificate"
    version: Literal[1] = 1
    command: str
    versions: dict[str, str]
    purpose: str
    method: str
    model: Weights
    original: Weights
    made_by: str
    recovered_tokens: int
    on_domain: OnDomain
    speed: Speed | None
    off_domain: tuple[OffDomain, ...]
    selectivity: Selectivity | None
    relearning: tuple[Relearning, ...]
    stability: dict[str, float]
    not_measured: dict[str, str]
