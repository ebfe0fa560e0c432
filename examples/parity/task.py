"""Compositional multitask sparse parity: strings of random bits, and what is asked about them.

Task bits lie behind control bits. Atomic subtask `i` is the parity of the task bits
`i * size ... (i + 1) * size - 1`; a code names one or several subtasks, sets their control bits,
and asks for the parity of all their bits together. All other task bits are there to distract.
(Michaud et al. 2025, arXiv 2505.15811.)

Samples are made anew at every step. Each is a function of the seed of its network, of the stream
(training, measuring, …), of the step and of its place in the batch, and of nothing else: networks
trained side by side see what each would see alone, a resumed run goes on with the samples that an
undisturbed one sees, a GPU sees those of a CPU, and there is no generator whose state could be
shared or lost.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llm_narrow.errors import problems

Code = tuple[int, ...]  # the subtasks that are asked for together
STREAMS = ("train", "measure", "score", "recover", "measure again")
WORD = 64  # bits of a random number, all that a sample may have
GOLDEN = -0x61C8864680B583EB  # these three are constants of SplitMix64, as signed 64-bit numbers
FIRST = -0x40A7B892E31B1A47
SECOND = -0x6B2FB644ECCEEE15


@dataclass(frozen=True)
class Task:
    """`subtasks` disjoint parities of `size` bits each, among `bits` task bits."""

    subtasks: int
    bits: int
    size: int

    def __post_init__(self) -> None:
        """Raise BadInput with all that is wrong."""
        found = [
            f"{name} must be at least 1, got {value}"
            for name, value in vars(self).items()
            if value < 1
        ]
        if not found and self.subtasks * self.size > self.bits:
            found.append(
                f"{self.subtasks} subtasks of {self.size} bits need {self.subtasks * self.size} "
                f"task bits, got {self.bits}"
            )
        if self.bits > WORD:
            found.append(f"bits must be at most {WORD}, got {self.bits}")
        if found:
            raise problems("task", found)

    @property
    def inputs(self) -> int:
        """Control and task bits together."""
        return self.subtasks + self.bits

    @property
    def atomic(self) -> tuple[Code, ...]:
        """The codes of one subtask each."""
        return tuple((i,) for i in range(self.subtasks))

    def asked(self, code: Code) -> list[int]:
        """The task bits whose parity a code asks for."""
        return [b for i in code for b in range(i * self.size, (i + 1) * self.size)]


@dataclass(frozen=True)
class Layout:
    """What the samples of a batch ask. Networks that are all asked the same share one row.

    control:  (networks or 1, subtasks, samples) float32
    relevant: (networks or 1, samples) int64, the task bits asked about
    places:   (bits, 1) int64, the mask of each task bit
    codes:    how many codes lie one after another in the samples, equally many samples of each
    """

    control: Tensor
    relevant: Tensor
    places: Tensor
    codes: int

    @property
    def samples(self) -> int:
        """Samples of a batch, per network."""
        return self.relevant.shape[1]

    def of(self, networks: Tensor) -> "Layout":
        """The same for some of the networks, given by their places, (n,) int64."""
        if len(self.relevant) == 1:
            return self
        return Layout(self.control[networks], self.relevant[networks], self.places, self.codes)


def layout(
    task: Task, codes: Sequence[Sequence[Code]], per_code: int, device: str | torch.device = "cpu"
) -> Layout:
    """One sequence of codes for each network, or a single one for all of them."""
    counts = {len(row) for row in codes}
    found = [f"networks must have equally many codes, got {sorted(counts)}"] * (len(counts) != 1)
    if any(not code or not set(code) <= set(range(task.subtasks)) for row in codes for code in row):
        found.append(f"codes must name subtasks 0 to {task.subtasks - 1}, got {list(codes)}")
    if per_code < 1:
        found.append(f"samples per code must be at least 1, got {per_code}")
    if found:
        raise problems("layout of a batch", found)
    control = torch.zeros(len(codes), len(codes[0]), task.subtasks)
    for n, row in enumerate(codes):
        for c, code in enumerate(row):
            control[n, c, list(code)] = 1
    places = torch.ones(task.bits, dtype=torch.int64) << torch.arange(task.bits)
    relevant = torch.stack(
        [torch.stack([places[task.asked(code)].sum() for code in row]) for row in codes]
    )
    return Layout(
        control.repeat_interleave(per_code, dim=1).transpose(1, 2).contiguous().to(device),
        relevant.repeat_interleave(per_code, dim=1).to(device),
        places[:, None].to(device),
        len(codes[0]),
    )


def sample(asked: Layout, seeds: Tensor, *, stream: str, step: int) -> tuple[Tensor, Tensor]:
    """Fresh inputs, (networks, inputs, samples) float32, and labels, (networks, samples) int64.

    `seeds` is (networks,) int64.
    """
    drawn = words(seeds, stream=stream, step=step, count=asked.samples)  # (networks, samples)
    bits = (drawn[:, None] & asked.places) != 0  # (networks, bits, samples)
    control = asked.control.expand(len(seeds), -1, -1)
    return torch.cat([control, bits.float()], dim=1), parity(drawn & asked.relevant)


def words(seeds: Tensor, *, stream: str, step: int, count: int) -> Tensor:
    """Random 64-bit numbers, (networks, count) int64.

    Those that SplitMix64 (Steele, Lea and Flood 2014) gives from a state that is itself a scrambled
    seed, stream and step.
    """
    state = scrambled(scrambled(seeds * GOLDEN + STREAMS.index(stream)) + step)
    places = torch.arange(1, count + 1, device=seeds.device)
    return scrambled(state[:, None] + places * GOLDEN)


def scrambled(x: Tensor) -> Tensor:
    """The output function of SplitMix64, on int64 that wrap around."""
    x = (x ^ _shifted(x, 30)) * FIRST
    x = (x ^ _shifted(x, 27)) * SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, by: int) -> Tensor:
    """To the right, with zeros coming in, whatever the sign."""
    return (x >> by) & ((1 << (WORD - by)) - 1)


def parity(x: Tensor) -> Tensor:
    """0 or 1, of the number of ones in each int64."""
    for by in (32, 16, 8, 4, 2, 1):
        x = x ^ (x >> by)
    return x & 1
