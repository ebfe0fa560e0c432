"""The thirteen claims of "On the creation of narrow AI" (arXiv 2505.15811), declared as rows.

A row says what is claimed, what the paper's number is, which commands run it here, where the
result is and who judges it. The paper's numbers are from its abstract, from what its authors
printed, or read off their figures (marked ≈).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from . import paper_cut, paper_language, paper_mnist, paper_parity, paper_trained, paper_unlearned
from .errors import UnknownName
from .paper_judge import Judgement
from .paper_read import comparison, held

Preset = Literal["quick", "paper"]
PRESETS: tuple[Preset, ...] = ("quick", "paper")
AT = "{at}"  # in a command: the folder of the results


@dataclass(frozen=True)
class Step:
    """A command, and the file that is there (with something under the keys) once it is done.

    `minutes` is about what it takes on one core with bfloat16 units, where that is known.
    """

    words: str
    makes: str
    holds: tuple[str, ...] = ()
    minutes: int | None = None

    def line(self, place: Path) -> list[str]:
        """The words of the command, for results in a folder."""
        return [word.replace(AT, str(place)) for word in self.words.split()]

    def done(self, place: Path) -> bool:
        """Whether it has been run to its end."""
        if not self.holds:
            return (place / self.makes).is_file()
        return held(place / self.makes, *self.holds) is not None

    @property
    def folder(self) -> str:
        """The folder of its own, below that of the results."""
        return self.makes.partition("/")[0]


@dataclass(frozen=True)
class Claim:
    """A row: a claim of the paper, how it is run, and how it is judged."""

    number: int
    name: str
    says: str
    paper: str
    source: str
    steps: Mapping[Preset, tuple[Step, ...]]
    read: Callable[[Path], Mapping[str, Any] | None]
    judge: Callable[[Any], Judgement]
    figures: tuple[str, ...] = ()  # without an ending, below the folder of the results


def parity(name: str, minutes: int) -> dict[Preset, tuple[Step, ...]]:
    """The step of an experiment of examples/parity, in a folder of its own."""
    return {
        preset: (
            Step(
                f"python examples/parity/run.py --preset {preset} --only {name} "
                f"--out {AT}/parity-{name}",
                f"parity-{name}/results.json", ("experiments", name),
                minutes if preset == "quick" else None,
            ),
        )
        for preset in PRESETS
    }  # fmt: skip


def mnist() -> dict[Preset, tuple[Step, ...]]:
    """The step of examples/mnist: both ways, compared."""
    return {
        preset: (
            Step(
                f"python examples/mnist/run.py --preset {preset} --out {AT}/mnist",
                "mnist/results.json", ("experiments", "compared"),
                12 if preset == "quick" else None,
            ),
        )
        for preset in PRESETS
    }  # fmt: skip


def drawn(folder: str, *names: str) -> tuple[str, ...]:
    """The figures of a folder."""
    return tuple(f"{folder}/figures/{name}" for name in names)


def experiment(folder: str, name: str) -> Callable[[Path], Mapping[str, Any] | None]:
    """Reads the result of an experiment of a toy example."""
    return lambda place: held(place / folder / "results.json", "experiments", name)


MODEL = {"quick": "smollm2-135m", "paper": "NousResearch/Llama-3.2-1B"}
TEXT = {"quick": "python", "paper": "python-github"}


SMALL = f"{AT}/small/trained/model"


def small() -> tuple[Step, ...]:
    """The model of claims that need training to its end, many times, on one core.

    Of 689 k parameters, trained on 8 MB of English and as much of Python's standard library.
    """
    return (
        Step(f"python examples/paper/small.py --out {AT}/small", "small/small.json", minutes=1),
        Step(f"llm-narrow recover {AT}/small/fresh --domain {AT}/small/texts.jsonl "
             "--project-column project --tokens 4M --lr 3e-3 --distill none --length 256 "
             "--batch-size 8 --validation-tokens 8k --evaluate-every 200 --held-out-tokens 16k "
             f"--samples 0 --no-speed --no-report --out {AT}/small/trained",
             "small/trained/manifest.json", minutes=9),
    )  # fmt: skip


def recovered(preset: Preset) -> tuple[Step, ...]:
    """One comparison for claims 10 and 12, of the paper's preset for 11 too.

    Its sizes are the paper's half and four fifths of the neurons, and beside them, for units at
    random alone, those that drawing as many with replacement leaves: 1 - exp(-0.5), 1 - exp(-0.8).
    """
    budget = {  # quick: 0.56 tokens of a parameter of the smallest, see paper_trained.SOON
        "quick": f"--model {SMALL} --tokens 189440 --seeds 5 --lrs 1e-3,3e-3 --sweep-share 0.2 "
                 "--distill none --length 256 --batch-size 4 --calibration-tokens 16k "
                 "--validation-tokens 8k --evaluate-every 50 --held-out-tokens 32k --samples 0",
        "paper": f"--model {MODEL['paper']} --tokens 1300M --seeds 3 --lrs 5e-5,2e-4,5e-4 "
                 "--sweep-share 0.05 --distill none --length 1024 --batch-size 8 --accumulation 8 "
                 "--lasso-tokens 300M --samples 0",
    }[preset]  # fmt: skip
    # Of the parameters of a model: neurons are 64 % of the small one, and 65 % of Llama-3.2-1B.
    exact, replaced = {"quick": ("467808,338784", "513888,449376"),
                       "paper": ("67.4%,47.9%", "74.4%,64.1%")}[preset]  # fmt: skip
    methods = {"quick": "oneshot,random", "paper": "oneshot,lasso,random,distilled,scratch"}
    about = f"llm-narrow compare --domain {TEXT[preset]} {budget}"
    folders = f"{AT}/recovery"
    timed = {"quick": (12, 7, 1), "paper": (None, None, None)}[preset]
    return (
        *(small() if preset == "quick" else ()),
        Step(f"{about} --sizes {exact} --methods {methods[preset]} --out {folders}",
             "recovery/compare.json", minutes=timed[0]),
        Step(f"{about} --sizes {replaced} --methods random --out {folders}-replaced",
             "recovery-replaced/compare.json", minutes=timed[1]),
        Step(f"llm-narrow report {folders}", "recovery/report.md", minutes=timed[2]),
    )  # fmt: skip


def shortest(preset: Preset) -> tuple[Step, ...]:
    """The comparison of claim 11: so short that fresh weights are far from the target still."""
    if preset == "paper":
        return recovered(preset)
    return (
        Step(f"llm-narrow compare --model {MODEL[preset]} --domain {TEXT[preset]} --tokens 40k "
             "--seeds 3 --lrs 2e-4,1e-3 --sweep-share 0.25 --distill none --batch-size 2 "
             "--calibration-tokens 16k --validation-tokens 4k --evaluate-every 20 "
             "--held-out-tokens 16k --samples 0 --sizes 70.4% "
             f"--methods oneshot,distilled,scratch --out {AT}/frontier",
             "frontier/compare.json", minutes=28),
        Step(f"llm-narrow report {AT}/frontier", "frontier/report.md", minutes=1),
    )  # fmt: skip


def runs_compared(place: Path) -> Mapping[str, Any] | None:
    """Reads the comparison of claims 10 and 12."""
    return comparison(place / "recovery", place / "recovery-replaced")


def frontier_compared(place: Path) -> Mapping[str, Any] | None:
    """Reads that of claim 11, which is the same one in the paper's preset."""
    return comparison(place / "frontier") or runs_compared(place)


def unlearned(preset: Preset) -> tuple[Step, ...]:
    """Three ways to lose 30 % of the neurons, then the audit of what they lost."""
    model, lasso, audit = {
        "quick": (f"{SMALL} --length 256 --batch-size 4 --calibration-tokens 16k",
                  "--lasso-tokens 200k --lasso-lr 1e-3",
                  "--tokens 200k --seeds 5 --lrs 1e-3,3e-3 --domain english --length 256 "
                  "--batch-size 4 --validation-tokens 8k"),
        "paper": (MODEL["paper"],
                  "--lasso-tokens 1000M --step gradient --control fixed --strength 3e-4 "
                  "--weights one --lasso-lr 2e-6",
                  "--tokens 50M --seeds 3 --lrs 1e-5,5e-5,2e-4 --domain english"),
    }[preset]  # fmt: skip
    cut = (f"llm-narrow prune --model {model} --domain {TEXT[preset]} --sparsity 0.3 "
           "--allocation global --no-refit --samples 0 --no-speed")  # fmt: skip
    at = f"{AT}/unlearning"
    ways = {"oneshot": "", "random": " --criterion random", "lasso": f" --method lasso {lasso}"}
    runs = " ".join(f"{at}/{name}" for name in ways)
    quick = preset == "quick"
    return (
        *(small() if quick else ()),
        *(Step(f"{cut}{more} --out {at}/{name}", f"unlearning/{name}/manifest.json",
               minutes=1 if quick else None) for name, more in ways.items()),
        Step(f"llm-narrow relearn {runs} {audit} --out {at}/audit",
             "unlearning/audit/relearn.json", minutes=20 if quick else None),
    )  # fmt: skip


ATTRIBUTION = {
    "quick": "--neurons 300 --channels 192 --tokens 1024 --batches 3",
    "paper": "--neurons 500 --tokens 8192 --batches 8 --length 1024",
}
CURVES = {
    "quick": "--shares 0.4 --lasso-tokens 150k --lasso-lr 2e-4 --calibration-tokens 16384 "
             "--held-out-tokens 8k --sparsities 0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8",
    "paper": "--strengths 3e-4,5e-4,1e-3 --lasso-tokens 3870M --lasso-lr 2e-6 --batch-size 18 "
             "--accumulation 6 --held-out-tokens 1M",
}  # fmt: skip


def script(
    name: str, options: Mapping[str, str], minutes: int
) -> dict[Preset, tuple[Step, ...]]:
    """The steps of a script of examples/paper."""
    folder = name.replace("_", "-")
    return {
        preset: (
            Step(
                f"python examples/paper/{name}.py --model {MODEL[preset]} --domain {TEXT[preset]} "
                f"{options[preset]} --out {AT}/{folder}",
                f"{folder}/{folder}.json",
                minutes=minutes if preset == "quick" else None,
            ),
        )
        for preset in PRESETS
    }  # fmt: skip


RECOVERED = {preset: recovered(preset) for preset in PRESETS}
CLAIMS: tuple[Claim, ...] = (
    Claim(
        1, "curriculum", "A skill made of others is learned only beside these.",
        "27 of 40 seeds with its atomics, 0 of 40 without, 2e9 samples each",
        "figure 2; printed by the authors", parity("curriculum", 6),
        experiment("parity-curriculum", "curriculum"), paper_parity.curriculum,
        drawn("parity-curriculum", "parity-curriculum"),
    ),
    Claim(
        2, "order", "It is learned after them.",
        "atomics at ≈ 1 to 2.3e7 samples, the composite at ≈ 4.5 to 7e7 (one seed)", "figure 2",
        parity("curriculum", 6), experiment("parity-curriculum", "curriculum"), paper_parity.order,
        drawn("parity-curriculum", "parity-order"),
    ),
    Claim(
        3, "depth", "A deeper network learns it more often.",
        "27 of 40 seeds with two hidden layers, 19 with one, 16 with one as large",
        "figure 7; printed by the authors", parity("curriculum", 6),
        experiment("parity-curriculum", "curriculum"), paper_parity.depth,
        drawn("parity-curriculum", "parity-curriculum"),
    ),
    Claim(
        4, "nonlocality", "A skill is spread over units: pruning for it needs recovery, and wider "
        "networks can lose a larger share.",
        "98 % accuracy up to ≈ .47, .73, .88, .94, .97 of the units at widths of 64 to 1,024",
        "figure 10", parity("pruning", 13), experiment("parity-pruning", "pruning"),
        paper_cut.nonlocality, drawn("parity-pruning", "parity-pruning", "parity-widths"),
    ),
    Claim(
        5, "entanglement", "Units kept for one skill still carry the other.",
        "the other is at ≈ 97 % up to .74, 92 % at .80, 74 % at .90 after 1,000 steps (one seed)",
        "figure 3, left", parity("pruning", 13), experiment("parity-pruning", "pruning"),
        paper_cut.entanglement, drawn("parity-pruning", "parity-pruning"),
    ),
    Claim(
        6, "lasso", "The group lasso puts a skill into units of its own and unlearns the rest.",
        "the skill at 100 % without recovery to ≈ .95; the other at 50 % at every sparsity",
        "figure 3, right (one seed)", parity("lasso", 4), experiment("parity-lasso", "lasso"),
        paper_cut.lasso, drawn("parity-lasso", "parity-lasso"),
    ),
    Claim(
        7, "mnist", "Pruned networks need fewer examples than distilled or fresh ones.",
        "≈ 1,190 units: 1.6 to 1.8 k examples against 11.2 k and 13.9 k; 400: 4.9 to 6.1 k against "
        "12.2 k and 16 k; 30: 30 to 37 k against 42 k and 53 k", "figure 4", mnist(),
        experiment("mnist", "compared"), paper_mnist.mnist, drawn("mnist", "mnist-examples"),
    ),
    Claim(
        8, "attribution", "Attribution tells what ablation would for neurons, and poorly for "
        "channels of the residual stream.",
        "Pearson r .44 (.80 of logarithms) for neurons, .39 (.05) for channels",
        "figure 11; printed by the authors", script("attribution", ATTRIBUTION, 36),
        lambda place: held(place / "attribution" / "attribution.json"),
        paper_language.attribution, drawn("attribution", "attribution"),
    ),
    Claim(
        9, "lasso-curves", "After the group lasso many neurons can go for free.",
        "loss flat to ≈ .40, .63, .80 at 1.36, 1.48, 1.67 nats; the model before, of 1.33, comes "
        "to 2.1, 3.0, 4.4", "figure 5, left", script("lasso_curves", CURVES, 25),
        lambda place: held(place / "lasso-curves" / "lasso-curves.json"),
        paper_language.lasso_curves, drawn("lasso-curves", "lasso-curves"),
    ),
    Claim(
        10, "recovery", "Recovery is fast: without 80 % of its neurons the model comes below the "
        "unpruned one.",
        "1.33 nats after ≈ 3,000 steps of 108 x 1,024 tokens, 1.04 after 36,000",
        "figure 5, right", RECOVERED, runs_compared, paper_trained.recovery,
        drawn("recovery", "loss-by-tokens"),
    ),
    Claim(
        11, "frontier", "Pruning comes to a loss with fewer tokens and parameters than "
        "distillation and training from scratch.",
        "1.7 nats in 76 to 596 M tokens with 667 to 118 M parameters, against ≥ 690 M tokens "
        "(distilled) and ≥ 940 M (scratch) with ≥ 339 M",
        "figures 6 and 12; pruned ones printed by the authors",
        {preset: shortest(preset) for preset in PRESETS}, frontier_compared,
        paper_trained.frontier,
        tuple(figure for folder in ("frontier", "recovery")
              for figure in drawn(folder, "tokens-to-target", "frontier")),
    ),
    Claim(
        12, "random", "After recovery, units at random are as good as chosen ones.",
        "1.3013 against 1.2995 nats at step 5,365, ≈ equal at 20,000; drawn with replacement, so "
        "that 39 to 59 % went where 50 to 90 % were meant to",
        "figure 13; the pair printed by the authors", RECOVERED, runs_compared,
        paper_trained.random, drawn("recovery", "loss-by-tokens"),
    ),
    Claim(
        13, "unlearning", "Pruning by lasso or at random unlearns other skills, by attribution at "
        "30 % it does not.",
        "after fine-tuning, ARC .67 whole, .25 lasso and random, .69 attribution; Bio .62, .31, "
        ".27, .56; Cyber .59, .27, .27, .55", "table 1; printed by the authors",
        {preset: unlearned(preset) for preset in PRESETS},
        lambda place: held(place / "unlearning" / "audit" / "relearn.json"),
        paper_unlearned.unlearning, ("unlearning/audit/relearn",),
    ),
)  # fmt: skip


def named(name: str) -> Claim:
    """The claim of a name or number. Raises UnknownName."""
    for claim in CLAIMS:
        if name in (claim.name, str(claim.number)):
            return claim
    raise UnknownName("claim", name, [c.name for c in CLAIMS], "Or a number from 1 to 13.")
