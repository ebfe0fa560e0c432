"""What a judgement of one of the paper's claims is: questions, answers, and the verdict from them.

No verdict is written by hand. A question says which numbers answer it with yes and which with no;
all others leave it open. The verdict follows from the answers alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Says = Literal["yes", "no", "open"]
Verdict = Literal["reproduced", "not reproduced", "open at this budget"]
Found = Mapping[str, Any]

SURE = 0.05  # a two-sided p below it answers with yes
CONTRARY = 0.01  # one below it, on the other side, with no: a single no decides
PAPERS, FAIR = "the paper's way", "the fair way"  # names of ways
FEWEST = 5  # networks that an interval over them needs to answer anything
RULE = (
    "Reproduced where every question is answered yes, not reproduced where any is answered no, "
    f"else open at this budget. Tests are two-sided: yes needs p < {SURE:g} in the direction of "
    f"the claim, no needs p < {CONTRARY:g} in the other. Intervals are 95 %."
)


@dataclass(frozen=True)
class Question:
    """A part of a claim, what answers it with yes and what with no, in words."""

    asks: str
    yes: str
    no: str

    @property
    def rule(self) -> str:
        """The rule as a sentence."""
        return f"{self.asks} Yes: {self.yes}. No: {self.no}. Else open."

    def answered(self, found: str, *, yes: bool, no: bool) -> "Answer":
        """The answer; where both would hold, the numbers contradict each other, and it is open."""
        return Answer(self, "open" if yes == no else "yes" if yes else "no", found)

    def tested(self, found: str, p: float | None, *, claimed: bool) -> "Answer":
        """The answer of a two-sided test; `claimed` is whether it is in the claim's direction."""
        known = p is not None
        return self.answered(
            found if p is None else f"{found}; p = {small(p)}",
            yes=known and claimed and float(p or 0) < SURE,
            no=known and not claimed and float(p or 0) < CONTRARY,
        )


@dataclass(frozen=True)
class Answer:
    """What the numbers answer to a question, and the numbers."""

    question: Question
    says: Says
    found: str


@dataclass(frozen=True)
class Number:
    """A number of ours, with its interval where it has one, beside the paper's."""

    what: str
    paper: str
    ours: str


@dataclass(frozen=True)
class Way:
    """One way to look at a claim: the paper's own, or a fair one."""

    name: str
    about: str
    answers: tuple[Answer, ...]

    @property
    def verdict(self) -> Verdict:
        """What follows from the answers, by RULE."""
        said = [answer.says for answer in self.answers]
        if "no" in said:
            return "not reproduced"
        return "reproduced" if said and set(said) == {"yes"} else "open at this budget"


@dataclass(frozen=True)
class Judgement:
    """The verdict of a claim, what it rests on, and how the setting differs from the paper's.

    The last of the ways decides; the others are told beside it.
    """

    ways: tuple[Way, ...]
    numbers: tuple[Number, ...]
    rests_on: tuple[str, ...]
    differs: tuple[str, ...] = ()

    @property
    def verdict(self) -> Verdict:
        """That of the way that decides."""
        return self.ways[-1].verdict

    @property
    def changes(self) -> str:
        """What the way of looking changes, in a sentence; empty where there is but one."""
        if len(self.ways) < 2:
            return ""
        verdicts = [way.verdict for way in self.ways]
        if len(set(verdicts)) == 1:
            return f"Both ways say the same: {verdicts[0]}."
        each = "; ".join(f"{way.name}: {way.verdict}" for way in self.ways)
        return f"The way of looking changes the verdict. {each}. The last one counts."

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON."""
        return {
            "verdict": self.verdict,
            "changes": self.changes,
            "ways": [
                {"name": way.name, "verdict": way.verdict,
                 "answers": [{"rule": a.question.rule, "says": a.says, "found": a.found}
                             for a in way.answers]}
                for way in self.ways
            ],
            "numbers": [vars(n) for n in self.numbers],
            "rests_on": list(self.rests_on),
            "differs": list(self.differs),
        }  # fmt: skip


def small(p: float) -> str:
    """A p in a few digits."""
    return "1" if p >= 0.9995 else f"{p:.2g}" if p >= 1e-4 else f"{p:.0e}"


def ranged(e: Found, *, digits: int = 3) -> str:
    """`0.812 [0.790, 0.834]` of a mapping with value (or share), low and high."""
    value = e.get("value", e.get("share"))
    if value is None:
        return "unknown"
    middle = f"{value:.{digits}f}"
    low, high = e.get("low"), e.get("high")
    if low is None and high is None:
        return middle
    ends = ("…" if end is None else f"{end:.{digits}f}" for end in (low, high))
    return f"{middle} [{', '.join(ends)}]"


def counted(e: Found) -> str:
    """`13 of 40 (0.33 [0.20, 0.48])`."""
    return f"{e['count']} of {e['of']} ({ranged(e, digits=2)})"


def tokens(value: float | None) -> str:
    """`1.02 M`; of none, never."""
    if value is None:
        return "never"
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g} {letter}"
    return f"{value:.0f}"


def nearest(keys: Sequence[str], wanted: float) -> str:
    """The key, a number as text, that is nearest to the wanted number; the smaller of two."""
    return min(keys, key=lambda key: (abs(float(key) - wanted), float(key)))


def short_of(got: float, wanted: float) -> str:
    """How much more it takes to be able to say no, as the end of a sentence; empty if nothing."""
    return f"; a no takes {wanted / got:.2g} times the tokens" if 0 < got < wanted else ""


def spread(e: Found) -> str:
    """`median (least to most)`."""
    if e["median"] is None:
        return "never"
    if e["median"] < 1000:
        return f"{e['median']:.2f} ({e['least']:.2f} to {e['most']:.2f})"
    return f"{tokens(e['median'])} ({tokens(e['least'])} to {tokens(e['most'])})"


def parity_differs(about: Any) -> tuple[str, ...]:
    """How the preset `quick` of examples/parity is not the paper's setting."""
    if about["same_setting"]:
        return ()
    return ("shorter parities, smaller batches, fewer steps and higher learning rates than in the "
            "paper (docs/parity.md, preset quick)",)  # fmt: skip
