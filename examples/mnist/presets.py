"""What is run: `paper` is the exact setting of the paper, `quick` the same figure with fewer runs.

Both have the paper's way and the fair one: see docs/mnist.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from train import Settings

METHODS = ("scratch", "distillation", "attribution", "lasso")


@dataclass(frozen=True)
class Teacher:
    """The network of all ten digits. `slowing` is how its learning rate falls.

    "plateau" halves it when accuracy has not risen for more than two epochs (the paper's);
    "linear" takes it to 0 over the epochs.
    """

    hidden: int
    epochs: int
    enough: float  # accuracy at which training stops
    batch: int = 128
    lr: float = 1e-3
    weight_decay: float = 1e-4
    dropout: float = 0.2
    slowing: Literal["plateau", "linear"] = "plateau"


@dataclass(frozen=True)
class Config:
    """One choice of hyper-parameters. `strength` is that of the group lasso."""

    lr: float
    strength: float = 0.0


@dataclass(frozen=True)
class Arm:
    """One method: what it may choose from, and the sizes it is run at, in hidden units."""

    training: Settings
    configs: tuple[Config, ...]
    sizes: tuple[int, ...]
    runs: int
    choosing: int = 0  # runs of each configuration for choosing one; 0 chooses on the runs told


@dataclass(frozen=True)
class Way:
    """All methods under one set of rules.

    `held_out` training digits are kept for stopping and choosing; with 0 the test digits are used.
    `rule` is how a configuration is chosen and a size told: by the mean with failed runs at the
    cap, or by the median with failed runs as later than all others.
    """

    held_out: int
    rule: Literal["mean", "median"]
    arms: Mapping[str, Arm]
    scored: int  # examples that attribution looks at
    scored_count: bool  # whether these are counted among the examples
    counted_output: bool  # whether the ten outputs count as units, as the paper's script has it


@dataclass(frozen=True)
class Preset:
    """All of a run."""

    teacher: Teacher
    ways: Mapping[str, Way]
    goal: float  # accuracy on even digits
    buckets: tuple[int, ...]  # sizes that claims are judged at
    entries: int  # parameters, or numbers of one activation, of networks trained at once


def papers_configs(rates: tuple[float, ...], strengths: tuple[float, ...]) -> tuple[Config, ...]:
    """Every learning rate with every strength."""
    return tuple(Config(lr, strength) for lr in rates for strength in strengths)


def papers_way(
    *, sizes: tuple[int, ...], pruned: tuple[int, ...], lasso: tuple[Config, ...],
    targets: tuple[int, ...], runs: int, scratch_runs: int, cap: int,
) -> Way:  # fmt: skip
    """Everything as the paper's scripts have it. `pruned` and `targets` are sizes asked for."""
    rates = (4e-4, 1e-3, 3e-3, 6e-3)
    once = {"check_first": False, "overshoot": True}
    pruning = Settings(16, 1840, 50_000, clip=1.0, ghosts=True, **once)
    return Way(
        held_out=0, rule="mean", scored=480, scored_count=False, counted_output=True,
        arms={
            "scratch": Arm(Settings(64, 1792, cap, **once), (Config(5e-3),), sizes, scratch_runs),
            "distillation": Arm(
                Settings(64, 3686, cap, optimizer="sgd", temperature=20.0, **once),
                (Config(1e-2),), sizes, runs,
            ),
            "attribution": Arm(pruning, tuple(map(Config, rates)), pruned, runs),
            "lasso": Arm(pruning, lasso, targets, runs),
        },
    )  # fmt: skip


def fair_way(
    *, sizes: tuple[int, ...], rates: tuple[float, ...], lasso: tuple[Config, ...], runs: int,
    choosing: int, cap: int, every: int, held_out: int,
) -> Way:  # fmt: skip
    """The same batch, optimizer, checks, cap and number of configurations for every method."""
    plain = Settings(16, every, cap)
    taught = Settings(16, every, cap, temperature=20.0)
    each = tuple(map(Config, rates))
    return Way(
        held_out=held_out, rule="median", scored=480, scored_count=True, counted_output=False,
        arms={
            "scratch": Arm(plain, each, sizes, runs, choosing),
            "distillation": Arm(taught, each, sizes, runs, choosing),
            "attribution": Arm(plain, each, sizes, runs, choosing),
            "lasso": Arm(plain, lasso, sizes, runs, choosing),
        },
    )  # fmt: skip


# Learning rate and strength together, from gentle to strong: what the paper chose for its sizes.
LASSO = (Config(1e-3, 1e-3), Config(1e-3, 5e-3), Config(5e-3, 5e-3), Config(8e-3, 5e-3))


def quick() -> Preset:
    """About ten minutes on two cores."""
    sizes = (30, 100, 400, 1190)
    return Preset(
        teacher=Teacher(1200, 6, enough=0.99, slowing="linear"),
        ways={
            "paper": papers_way(
                sizes=sizes, pruned=(30, 100, 400, 1200), targets=(30, 100, 400, 2400),
                lasso=LASSO, runs=6, scratch_runs=6, cap=120_000,
            ),
            "fair": fair_way(
                sizes=sizes, rates=(4e-4, 1e-3, 3e-3, 6e-3), lasso=LASSO, runs=9, choosing=3,
                cap=60_000, every=800, held_out=5000,
            ),
        },
        goal=0.97, buckets=(1190, 400, 30), entries=8_000_000,
    )  # fmt: skip


def paper() -> Preset:
    """The exact setting of the paper, and the fair one at the same sizes; for a GPU."""
    sizes = (30, 50, 70, 100, 160, 280, 400, 600, 800, 1190, 1600, 2000, 2400)
    pruned = (24, 30, 50, 100, 190, 242, 400, 600, 800, 1200)
    return Preset(
        teacher=Teacher(1200, 20, enough=0.99),
        ways={
            "paper": papers_way(
                sizes=sizes, pruned=pruned,
                targets=(2400, 1000, 600, 500, 400, 240, 100, 70, 40, 30, 24),
                lasso=papers_configs((4e-4, 8e-4, 1e-3, 2e-3, 3e-3, 5e-3, 8e-3),
                                     (1e-3, 3e-3, 4e-3, 5e-3, 6.5e-3, 8e-3)),
                runs=10, scratch_runs=50, cap=589_840,
            ),
            "fair": fair_way(
                sizes=(24, 30, 50, 70, 100, 160, 240, 400, 600, 800, 1190),
                rates=(4e-4, 8e-4, 1e-3, 2e-3, 3e-3, 4e-3, 6e-3, 8e-3),
                lasso=(*LASSO, Config(2e-3, 1e-3), Config(2e-3, 5e-3), Config(3e-3, 8e-3),
                       Config(8e-3, 8e-3)),
                runs=30, choosing=10, cap=100_000, every=400, held_out=5000,
            ),
        },
        goal=0.97, buckets=(1190, 400, 30), entries=60_000_000,
    )  # fmt: skip


PRESETS = {"paper": paper, "quick": quick}
