"""What is run: `paper` is the exact setting of the paper, `quick` the smallest that shows the same.

Both have, beside the paper's arms, those that a fair comparison needs: see docs/parity.md.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from task import Code, Task
from train import Settings


@dataclass(frozen=True)
class Arm:
    """One way to train on codes: all seeds of it are one batch of networks."""

    name: str
    task: Task
    codes: tuple[Code, ...]  # the composite last
    per_code: int  # samples of a step
    training: Settings
    depth: int = 3  # linear layers
    width: int = 128

    @property
    def parameters(self) -> int:
        """Of one network."""
        sizes = [self.task.inputs, *[self.width] * (self.depth - 1), 2]
        return sum((wide + 1) * out for wide, out in itertools.pairwise(sizes))

    @property
    def samples(self) -> int:
        """That one network sees."""
        return self.per_code * len(self.codes) * self.training.steps


@dataclass(frozen=True)
class Curriculum:
    """Arms over the same seeds. The first learns its atomics too; all are compared with it."""

    seeds: int
    arms: tuple[Arm, ...]


@dataclass(frozen=True)
class Recovery:
    """Training on one code after units went."""

    training: Settings
    samples: int  # of a step


@dataclass(frozen=True)
class Pruning:
    """Networks that know two composites, cut for the first and recovered on either.

    `training` is that of the whole networks, by width. Sparsities are shares of all hidden units.
    """

    task: Task
    kept: Code
    other: Code
    seeds: int
    depth: int
    per_code: int
    training: Mapping[int, Settings]
    sparsities: tuple[float, ...]
    recovery: Recovery
    score_samples: int
    measured_samples: int

    @property
    def codes(self) -> tuple[Code, ...]:
        """Those of the whole networks."""
        return (*self.task.atomic, self.kept, self.other)


@dataclass(frozen=True)
class Lasso:
    """Whole networks of one width, trained on the kept code alone, with and without a penalty.

    `arms` are settings by name, "none" without a penalty. At `longer_at` the other code is trained
    for `longer` steps too, beside fresh networks of the same shapes.
    """

    width: int
    samples: int
    arms: Mapping[str, Settings]
    sparsities: tuple[float, ...]
    longer: Recovery
    longer_at: tuple[float, ...]


@dataclass(frozen=True)
class Timing:
    """How often and how long the batched and the single way are timed, in turns."""

    turns: int
    steps: int


@dataclass(frozen=True)
class Preset:
    """All experiments of a run."""

    curriculum: Curriculum
    pruning: Pruning
    scores_width: int
    lasso: Lasso
    timing: Timing
    entries: int  # numbers of one activation of all networks trained at once


def curriculum_arms(
    *, subtasks: int, bits: int, size: int, width: int, wider: int, per_code: int,
    training: Settings, rates: tuple[float, ...],
) -> tuple[Arm, ...]:  # fmt: skip
    """The arms of figures 2 and 7, and the controls."""
    task, whole = Task(subtasks, bits, size), tuple(range(subtasks))
    broad = (*task.atomic, whole)
    codes = len(broad)
    strange = Task(2 * subtasks, bits, size)

    def changed(steps: int = training.steps, lr: float = training.lr) -> Settings:
        return Settings(steps, lr=lr, eps=training.eps, window=training.window)

    return (
        Arm("broad", task, broad, per_code, training, width=width),
        # The paper's: as many samples in all, in more steps of smaller batches.
        Arm("composite only", task, (whole,), per_code, changed(codes * training.steps),
            width=width),
        *(
            Arm(f"composite only, same steps, lr {rate:g}", task, (whole,), codes * per_code,
                changed(lr=rate), width=width)
            for rate in rates
        ),
        # As much variety as the broad arm has, but subtasks that the composite is not made of.
        Arm("other atomics", strange, (*strange.atomic[subtasks:], whole), per_code, training,
            width=width),
        Arm("broad, shallow", task, broad, per_code, training, depth=2, width=width),
        Arm("broad, shallow and wide", task, broad, per_code, training, depth=2, width=wider),
    )  # fmt: skip


def quick() -> Preset:
    """About 23 minutes of one core."""
    training = Settings(8000, lr=3e-3, eps=1e-5, window=100)
    return Preset(
        curriculum=Curriculum(
            40,
            curriculum_arms(subtasks=3, bits=30, size=3, width=48, wider=113, per_code=32,
                            training=training, rates=(1e-3, 3e-3)),
        ),
        pruning=Pruning(
            Task(6, 18, 3), kept=(0, 1, 2), other=(3, 4, 5), seeds=6, depth=3, per_code=128,
            training={w: Settings(steps, lr=3e-3, eps=1e-5)
                      for w, steps in ((64, 5000), (128, 3500), (256, 3500))},
            sparsities=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.84, 0.87, 0.9, 0.92, 0.94,
                        0.96),
            recovery=Recovery(Settings(500, lr=3e-3), 256),
            score_samples=500, measured_samples=2000,
        ),
        scores_width=64,
        lasso=Lasso(
            width=128, samples=256,
            arms={
                "gradient": Settings(2000, lr=3e-3, strength=1e-3),
                "proximal": Settings(2000, lr=3e-3, strength=1.0, way="proximal"),
                "none": Settings(2000, lr=3e-3),
            },
            sparsities=(0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.84, 0.87, 0.9, 0.92),
            longer=Recovery(Settings(2500, lr=3e-3), 256), longer_at=(0.5,),
        ),
        timing=Timing(turns=5, steps=20),
        entries=1 << 21,
    )  # fmt: skip


def paper() -> Preset:
    """The exact setting, for a GPU: 13 to 160 hours for the curriculum, 2 to 50 for the pruning."""
    training = Settings(200_000, lr=1e-3, eps=1e-5, window=100)
    pretraining = Settings(20_000, lr=1e-3, eps=1e-5)
    return Preset(
        curriculum=Curriculum(
            40,
            curriculum_arms(subtasks=4, bits=64, size=4, width=128, wider=361, per_code=2000,
                            training=training, rates=(3e-4, 1e-3, 3e-3)),
        ),
        pruning=Pruning(
            Task(6, 18, 3), kept=(0, 1, 2), other=(3, 4, 5), seeds=5, depth=3, per_code=2000,
            training={w: pretraining for w in (32, 64, 128, 256, 512, 1024, 2048)},
            sparsities=tuple(n / 100 for n in range(1, 99)),
            recovery=Recovery(Settings(1000, lr=1e-3), 5000),
            score_samples=2000, measured_samples=5000,
        ),
        scores_width=64,
        lasso=Lasso(
            width=256, samples=2000,
            arms={
                "gradient": Settings(10_000, lr=1e-3, strength=1e-3),
                "proximal": Settings(10_000, lr=1e-3, strength=1.0, way="proximal"),
                "none": Settings(10_000, lr=1e-3),
            },
            sparsities=tuple(n / 100 for n in range(1, 99)),
            longer=Recovery(Settings(20_000, lr=1e-3), 5000), longer_at=(0.5, 0.7, 0.8, 0.9),
        ),
        timing=Timing(turns=5, steps=50),
        entries=1 << 27,
    )  # fmt: skip


PRESETS = {"paper": paper, "quick": quick}
