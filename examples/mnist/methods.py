"""Where the runs of each method begin: fresh networks, what attribution leaves, the teacher itself.

Scores, decisions and removal are the library's (`scores.score`, `plan.select`, `units.remove`).
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from digits import PIXELS, Part, Stream
from network import Networks, fresh, side_by_side, stacked, with_ghosts
from presets import Arm, Way
from torch import Tensor, nn
from torch.nn import functional as F
from train import Lane, Side, begun

from llm_narrow import plan, scores, units
from llm_narrow.families import find_groups
from llm_narrow.units import Keep, Scores

STREAM = 500_000  # added to a seed for the examples that the paper scores on and does not count


@dataclass(frozen=True)
class Asked:
    """The runs of one method in one cell: sizes of each configuration, and the seeds."""

    method: str
    way: Way
    sizes: Mapping[int, Sequence[int]]  # by configuration
    seeds: Sequence[int]

    @property
    def arm(self) -> Arm:
        """The settings of the method."""
        return self.way.arms[self.method]


def start(asked: Asked, train: Part, teacher: nn.Sequential) -> Side:
    """The networks of all runs before their first step. `train` are the even digits."""
    lanes, nets = [], []
    scored: dict[int, Scores] = {}
    begun_with: dict[tuple[int, int], Networks] = {}
    for config in sorted(asked.sizes, key=lambda c: asked.arm.configs[c].lr):
        sizes = asked.sizes[config]
        chosen = asked.arm.configs[config]
        for seed in asked.seeds:
            if asked.method == "lasso":
                pending = tuple(sorted(sizes, reverse=True))
                lanes.append(Lane(config, seed, chosen.lr, None, chosen.strength, pending))
                nets.append(whole(teacher, asked))
                continue
            for size in sizes:
                offset = 0
                if asked.method != "attribution":
                    made = fresh(PIXELS, [size // 2] * 2, [seed])
                else:
                    offset = asked.way.scored if asked.way.scored_count else 0
                    if seed not in scored:
                        scored[seed] = scored_by(asked, train, teacher, seed)
                    if (seed, size) not in begun_with:
                        begun_with[seed, size] = cut(asked, teacher, scored[seed], size)
                    made = begun_with[seed, size]
                lanes.append(Lane(config, seed, chosen.lr, size, offset=offset))
                nets.append({name: p.to(train.images.device) for name, p in made.items()})
    side = side_by_side(nets)
    alive = []
    for name in ("0.bias", "2.bias"):
        counts = torch.tensor([n[name].shape[1] for n in nets], device=train.images.device)
        alive.append(torch.arange(side[name].shape[1], device=counts.device) < counts[:, None])
    return begun(lanes, side, alive)


def whole(teacher: nn.Sequential, asked: Asked) -> Networks:
    """The teacher as it is."""
    nets = stacked([teacher])
    return with_ghosts(nets) if asked.arm.training.ghosts else nets


def scored_by(asked: Asked, train: Part, teacher: nn.Sequential, seed: int) -> Scores:
    """The mean over images of |activation * gradient| up to a factor: the library's `attribution`.

    On the first examples of the run itself where they count, else on some that nobody counts.
    """
    stream = seed if asked.way.scored_count else seed + STREAM
    places = Stream(train).places(stream, 0, asked.way.scored).to(train.labels.device)
    batch = train.at(places)
    held = torch.cat([batch.images, batch.labels[:, None].float()], dim=1)

    def loss(model: nn.Module, rows: Tensor) -> Tensor:
        return F.cross_entropy(model(rows[:, :-1]), rows[:, -1].long(), reduction="sum")

    return scores.score(teacher, find_groups(teacher), [held], criterion="attribution", loss=loss)


def cut(asked: Asked, teacher: nn.Sequential, scored: Scores, size: int) -> Networks:
    """The teacher with `size` hidden units left, or as many as the paper's script leaves."""
    rows = find_groups(teacher)
    total = sum(g.size for g in rows)
    if asked.way.counted_output:
        keep = papers_keep(scored, size)
    else:
        keep = plan.select(scored, rows, sparsity={"neurons": 1 - size / total})
    net = copy.deepcopy(teacher)
    units.remove(net, rows, keep)
    nets = stacked([net])
    if asked.arm.training.ghosts:
        nets = with_ghosts(nets)
        for name, after in (("0", "2"), ("2", "4")):
            old = teacher.get_parameter(f"{name}.bias")
            gone = old[~keep[name].to(old.device)]
            out = nets[f"{after}.bias"].shape[1]
            nets[f"{after}.constant"] = gone.detach()[None].clone()
            nets[f"{after}.ghost"] = gone.new_zeros(1, out, len(gone))
    return nets


def papers_counts(widths: Sequence[int], outputs: int, size: int) -> list[int]:
    """How many units of each hidden layer the paper's script leaves when asked for `size`.

    It counts the outputs among the units and gives them their share of what is to go, but none of
    them goes; what rounding leaves over is taken from the widest layers. At least a tenth of a
    layer stays, or a third of `size` where that is less.
    """
    every = [*widths, outputs]
    go = max(0, sum(every) - size)
    share = [int(n * go / sum(every)) for n in every]
    widest = sorted(range(len(every)), key=lambda layer: -every[layer])
    for extra in range(go - sum(share)):
        share[widest[extra % len(every)]] += 1
    least = [min(max(1, size // len(every)), max(1, int(n * 0.1))) for n in widths]
    return [n - min(gone, n - few) for n, gone, few in zip(widths, share, least, strict=False)]


def papers_keep(scored: Scores, size: int) -> Keep:
    """The units that the paper's script keeps: the highest scores of each layer."""
    counts = papers_counts([len(s) for s in scored.values()], 10, size)
    keep = {}
    for (name, score), count in zip(scored.items(), counts, strict=True):
        best = score.argsort(descending=True, stable=True)[:count]
        keep[name] = torch.zeros(len(score), dtype=torch.bool).index_fill_(0, best, True)
    return keep
