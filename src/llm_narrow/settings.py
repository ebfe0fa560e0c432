"""How a model is trained: the numbers that `train` takes, and the learning rate of a step."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from .errors import UnknownName, problems

Schedule = Literal["constant", "cosine"]
Choice = Literal["best", "last"]
TIMING = ("save_every_minutes",)  # settings that a resumed run may change


@dataclass(frozen=True)
class Settings:
    """How to train. One step sees batch_size x accumulation x processes blocks.

    tokens:     to train on, in all; rounded up to whole steps. More than there are: the blocks
                come again, in another order.
    warmup:     share of the steps, 0 to 1, over which the learning rate rises.
    schedule:   what follows: a cosine down to 0, or the same rate to the end.
    clip:       the greatest norm of the gradient; None leaves it as it is.
    evaluate_every: steps between two validations; the last step is always validated.
    choose:     which weights are left in the model: the best validated, or the last.
    """

    tokens: int
    lr: float = 2e-4
    schedule: Schedule = "cosine"
    warmup: float = 0.05
    batch_size: int = 4
    accumulation: int = 1
    clip: float | None = 1.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    bf16: bool = False
    checkpointing: bool = False
    evaluate_every: int = 50
    save_every_minutes: float = 10.0
    choose: Choice = "best"
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise BadInput with all that is wrong."""
        for name, kind in (("schedule", Schedule), ("choose", Choice)):
            if getattr(self, name) not in get_args(kind):
                raise UnknownName(name, getattr(self, name), get_args(kind))
        counts = ("tokens", "batch_size", "accumulation", "evaluate_every")
        found = [
            f"{name} must be at least 1, got {value}"
            for name in counts
            if not (value := getattr(self, name)) >= 1
        ]
        for name in ("lr", "save_every_minutes"):
            if not 0 < (value := getattr(self, name)) < math.inf:
                found.append(f"{name} must be above 0, got {value}")
        if not 0 <= self.warmup < 1:
            found.append(f"warmup is a share, at least 0 and below 1, got {self.warmup}")
        if self.clip is not None and not self.clip > 0:
            found.append(f"clip must be above 0 (or left out), got {self.clip}")
        if not 0 <= self.weight_decay < math.inf:
            found.append(f"weight_decay must be at least 0, got {self.weight_decay}")
        if not all(0 <= beta < 1 for beta in self.betas):
            found.append(f"betas must be at least 0 and below 1, got {self.betas}")
        if found:
            raise problems("training", found)

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step, 1 to `steps`."""
        rising = round(self.warmup * steps)
        if step <= rising:
            return self.lr * step / (rising + 1)
        if self.schedule == "constant":
            return self.lr
        return self.lr * (1 + math.cos(math.pi * (step - 1 - rising) / (steps - rising))) / 2
