"""Which units are explained: what a run kept of the model that it began with, and some of each lot.

A unit is named LAYER.KIND.INDEX (`3.neurons.120`), or GROUP.INDEX where a layer has two groups of
the kind.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from . import scores
from .checkpoint import read_keep
from .depth import carried, stack_of
from .errors import BadInput, problems
from .families import find_groups
from .page_runs import layer_of
from .units import Group, Keep, Kind, Scores

KINDS: tuple[Kind, ...] = ("neurons", "heads")
Place = tuple[int, int]  # number of a group, and of a unit in it


@dataclass(frozen=True)
class Unit:
    """A unit to explain. `why` says how it was chosen; `rank` is by score in its group, from 1."""

    group: Group
    index: int
    name: str
    kept: bool
    why: str
    score: float | None
    rank: int | None


@dataclass(frozen=True)
class Decided:
    """The groups of KINDS of the whole model, what of them stayed, and scores as far as known."""

    groups: tuple[Group, ...]
    keep: Keep
    scores: Scores

    @property
    def removed(self) -> tuple[Kind, ...]:
        """The kinds of which units went."""
        return tuple(
            kind
            for kind in KINDS
            if any(g.kind == kind and not self.keep[g.name].all() for g in self.groups)
        )

    def layer(self, group: Group) -> int:
        """The number of the layer that a group is of."""
        return layer_of(group.name, self.groups.index(group))

    def name(self, group: Group, index: int) -> str:
        """What a unit is called."""
        layer = self.layer(group)
        alone = len(self.at(layer, group.kind)) == 1
        return f"{layer}.{group.kind}.{index}" if alone else f"{group.name}.{index}"

    def at(self, layer: int, kind: str) -> list[Group]:
        """The groups of a kind in a layer."""
        return [g for g in self.groups if g.kind == kind and self.layer(g) == layer]

    def unit(self, group: Group, index: int, why: str) -> Unit:
        """A unit with what is known of it."""
        score = rank = None
        if (found := self.scores.get(group.name)) is not None:
            score = float(found[index])
            rank = 1 + int((found > found[index]).sum())
        kept = bool(self.keep[group.name][index])
        return Unit(group, index, self.name(group, index), kept, why, score, rank)


def decided(folder: Path, model: Any, layers_gone: Sequence[int], file: Path | None) -> Decided:
    """What the run in `folder` did to `model`, which it began with.

    `layers_gone` are the numbers of layers that went whole; `file` holds the scores, those of the
    run unless given. Raises BadInput where keep or scores are of another model.
    """
    groups = find_groups(model)
    keep = _keep(folder / "model" / "keep.safetensors", model, groups, layers_gone)
    own = tuple(g for g in groups if g.kind in KINDS)
    found = _scores(file or folder / "scores.safetensors", own, wanted=file is not None)
    return Decided(own, keep, found)


def chosen(known: Decided, kinds: Sequence[Kind], each: int) -> list[Unit]:
    """Of each kind `each` units that stayed and as many that went, fewer where there are fewer.

    Half of each lot are its highest-scored, half its lowest-scored, no two of one group as long as
    there are others. Raises BadInput where no scores are known.
    """
    units = []
    for kind in kinds:
        groups = [g for g in known.groups if g.kind == kind]
        if any(g.name not in known.scores for g in groups):
            raise BadInput(
                f"The run has no scores of its {kind} to choose by. Give a file that `llm-narrow "
                "score` made as --scores, or name units with --units (e.g. "
                f"{known.name(groups[0], 0)})."
            )
        order = _by_score(groups, known.scores)
        for kept, word in ((True, "kept"), (False, "removed")):
            lot = [(g, u) for g, u in order if bool(known.keep[groups[g].name][u]) is kept]
            high = _spread(lot, each - each // 2)
            taken = set(high)
            low = _spread([one for one in reversed(lot) if one not in taken], each // 2)
            units += [known.unit(groups[g], u, f"highest-scored {word}") for g, u in high]
            units += [known.unit(groups[g], u, f"lowest-scored {word}") for g, u in reversed(low)]
    return units


def named(known: Decided, asked: str) -> list[Unit]:
    """The units that `asked` names, with commas between. Raises BadInput with all it cannot."""
    by_name = {g.name: g for g in known.groups}
    units, wrong = [], []
    for text in dict.fromkeys(part.strip() for part in asked.split(",")):
        head, _, number = text.rpartition(".")
        groups = [by_name[head]] if head in by_name else []
        short = re.fullmatch(r"(\d+)\.(\w+)", head)
        if short and not groups:
            groups = known.at(int(short[1]), short[2])
        if not groups or not number.isdecimal():
            wrong.append(f"{text!r} names no unit: write LAYER.KIND.INDEX, as {_there(known)}")
        elif len(groups) > 1:
            both = " or ".join(f"{g.name}.{number}" for g in groups)
            wrong.append(f"{text!r} may be of two groups: write {both}")
        elif int(number) >= groups[0].size:
            wrong.append(f"{text!r} is not there: {head} has units 0 to {groups[0].size - 1}")
        else:
            units.append(known.unit(groups[0], int(number), "asked for"))
    if wrong:
        raise BadInput(f"--units {wrong[0]}.") if len(wrong) == 1 else problems("--units", wrong)
    return units


def _there(known: Decided) -> str:
    kinds = dict.fromkeys(g.kind for g in known.groups)
    layers = [known.layer(g) for g in known.groups]
    there = f"there are {' and '.join(kinds)} in layers {min(layers)} to {max(layers)}"
    return f"{known.name(known.groups[0], 0)}; {there}"


def _by_score(groups: Sequence[Group], held: Scores) -> list[Place]:
    """Every unit from the highest-scored on; of equal ones that of the first group, then first."""
    values = torch.cat([held[g.name].float() for g in groups])
    places = [(n, u) for n, g in enumerate(groups) for u in range(g.size)]
    return [places[i] for i in values.argsort(descending=True, stable=True).tolist()]


def _spread(lot: Sequence[Place], number: int) -> list[Place]:
    """`number` of the lot, in its order: the first of each group, and where these are too few the
    first of the others."""
    firsts: dict[int, int] = {}
    for at, (group, _) in enumerate(lot):
        firsts.setdefault(group, at)
    taken = list(firsts.values())[:number]
    first = set(taken)
    spare = (at for at in range(len(lot)) if at not in first)
    return [lot[at] for at in sorted([*taken, *itertools.islice(spare, number - len(taken))])]


def _keep(file: Path, model: Any, groups: Sequence[Group], layers_gone: Sequence[int]) -> Keep:
    """The decision in terms of the model that the run began with."""
    held = read_keep(file)
    names = _names(model, groups, layers_gone) if layers_gone else {g.name: g.name for g in groups}
    # A run that began with an uneven model tells its decision in terms of the one before that.
    earlier: Mapping[str, Tensor] = getattr(model, "narrow_keep", {})
    keep: Keep = {}
    for g in groups:
        own = held.get(names[g.name]) if g.name in names else torch.zeros(g.size, dtype=torch.bool)
        before = earlier.get(g.name)
        if own is not None and before is not None and own.shape == before.shape:
            own = own[before]
        if own is None or own.shape != (g.size,):
            units = "none" if own is None else str(len(own))
            raise BadInput(
                f"{file} is of another model than the run began with: of {g.name} it has {units} "
                f"units, and the model has {g.size}. Take the whole folder of one run."
            )
        keep[g.name] = own
    return keep


def _names(model: Any, groups: Sequence[Group], gone: Sequence[int]) -> dict[str, str]:
    """What the groups of the layers that stayed are called in the narrowed model."""
    stack = stack_of(model, groups)
    layers = torch.ones(len(model.get_submodule(stack)), dtype=torch.bool)
    layers[[n for n in gone if 0 <= n < len(layers)]] = False
    places = {g.name: torch.tensor(n) for n, g in enumerate(groups)}
    now = carried(places, layers, stack)
    return {groups[int(n)].name: name for name, n in now.items()}


def _scores(file: Path, groups: Sequence[Group], *, wanted: bool) -> Scores:
    """The scores of the groups that the file has; none where it is not there and not `wanted`."""
    if not file.is_file() and not wanted:
        return {}
    try:
        held, _ = scores.read(file)
    except (OSError, SafetensorError, ValueError) as error:
        raise BadInput(
            f"{file} cannot be read as a score file: {error}. `llm-narrow score` makes one."
        ) from None
    wrong = [g for g in groups if g.name in held and held[g.name].shape != (g.size,)]
    if wrong:
        raise BadInput(
            f"{file} is of another model: it has {len(held[wrong[0].name])} scores of "
            f"{wrong[0].name}, which has {wrong[0].size} units. Give that of this one as --scores."
        )
    return {g.name: held[g.name] for g in groups if g.name in held}
