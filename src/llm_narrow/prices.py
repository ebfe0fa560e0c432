"""The price list: what each removal is expected to cost, and what it saves.

First-order scores of small and large units cannot be compared. In one measurement the scores of
KV groups had a rank correlation of 0.10 with what it really cost to remove them. So large units
(heads, experts, halves of layers, layers) are priced by removing each of them really, and small
ones (neurons) by score, on curves that a few real removals draw.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .budget import Amounts, Ledger, PricedKind, Removal, kinds_of, ledger
from .curves import PROBES, SHARES, Curve, curve, exponent, gone
from .decision import Decision
from .depth import Layer, layers_of
from .errors import UnknownName
from .progress import Track, silent
from .trials import Log, Measured, Text, Trials
from .units import Group, Scores

SMALL = 0.1  # nats per token: the divergence of removals that are small
LEAST_RATE = 0.1


@dataclass(frozen=True)
class Price:
    """One large removal: what it cost when it was tried alone, in nats per token, and saves.

    `increase` is what the loss is expected to rise by: the divergence that was measured, times the
    list's `rate`. `measured` is by how much the loss really rose, noise and all.
    """

    removal: Removal
    increase: float
    saves: Amounts
    score: float | None  # the summed scores of its units, for single units
    measured: float | None = None

    def per(self, resource: str, unit: float = 1.0) -> float:
        """Nats per token for each `unit` of the resource saved; infinite where none is."""
        saved = float(getattr(self.saves, resource))
        return self.increase * unit / saved if saved > 0 else float("inf")


@dataclass(frozen=True)
class Prices:
    """The price list of a model on a domain. `scores` are those of the groups of neurons."""

    loss: float  # loss of the whole model on the blocks that were tried on, nats per token
    targets: int  # tokens that the losses are means of
    bytes_per_token: float
    layers: tuple[Layer, ...]
    ledger: Ledger
    large: tuple[Price, ...]
    curves: tuple[Curve, ...]
    power: float  # of the curves
    scores: Scores
    rate: float = 1.0  # how much the loss rises for each nat of divergence from the whole model

    @property
    def groups(self) -> dict[str, Group]:
        """All groups by name."""
        return {g.name: g for layer in self.layers for g in layer.groups}

    @property
    def whole(self) -> Amounts:
        """What the whole model has."""
        decision = Decision.whole(self.layers)
        return self.ledger.total(decision.kept, decision.layers.tolist())

    @property
    def kinds(self) -> tuple[PricedKind, ...]:
        """The kinds that have a price."""
        found: list[PricedKind] = ["neurons"] if self.curves else []
        return (*found, *dict.fromkeys(p.removal.kind for p in self.large))

    def correlation(self, kind: PricedKind) -> float | None:
        """Spearman's rank correlation of scores and real prices; None for fewer than 3 units."""
        own = [(p.score, p.increase) for p in self.large if p.removal.kind == kind]
        pairs = [(s, d) for s, d in own if s is not None]
        return spearman(pairs) if len(pairs) > 2 else None

    def facts(self) -> dict[str, Any]:
        """What `--json` prints, and what a manifest may hold."""
        return {
            "loss": self.loss,
            "tokens": self.targets,
            "whole": asdict(self.whole),
            "correlation_of_scores": {
                kind: found for kind in self.kinds if (found := self.correlation(kind)) is not None
            },
            "power": self.power,
            "rate": self.rate,
            "large": [
                {
                    "kind": p.removal.kind, "layer": p.removal.layer, "group": p.removal.group,
                    "units": p.removal.units, "increase": p.increase, "measured": p.measured,
                    "saves": asdict(p.saves), "score": p.score,
                }
                for p in self.large
            ],
            "curves": [
                {"group": c.group, "layer": c.layer, "knots": c.knots, "tried": c.tried}
                for c in self.curves
            ],
        }  # fmt: skip


def price(
    model: Any,
    text: Text,
    scores: Scores,
    *,
    kinds: Sequence[str] | None = None,
    log: Log | None = None,
    shares: Sequence[float] = SHARES,
    curves: int = 4,
    probes: Sequence[float] = PROBES,
    bytes_per_token: float = 1.0,
    track: Track = silent,
) -> Prices:
    """Price everything of the kinds given (all that there are) in the model, which is whole.

    `scores` are those of all units, `text` the blocks to try on. Of neurons, `shares` are tried in
    `curves` layers spread over the depth and `probes` in the others. What `log` knows is not tried
    again, so that the same call goes on after a stop. Raises UnknownName for a kind that the model
    does not have.
    """
    layers = layers_of(model)
    groups = [g for layer in layers for g in layer.groups]
    there = kinds_of(groups)
    for kind in kinds or ():
        if kind not in there:
            raise UnknownName("kind", kind, there, "The model has no units of other kinds.")
    chosen = [kind for kind in there if kinds is None or kind in kinds]
    books = ledger(model, layers)
    whole = Decision.whole(layers)
    trials = Trials(model, whole, text, log or Log())
    large = [r for layer in layers for r in removals(layer) if r.kind in chosen]
    small = _tries(groups, layers, scores, shares, curves, probes) if "neurons" in chosen else {}
    if "neurons" in chosen and "mlp" not in chosen:
        ends = [r for layer in layers for r in removals(layer) if r.kind == "mlp"]
    else:
        ends = [r for r in large if r.kind == "mlp"]
    every = list(dict.fromkeys([*large, *ends, *(r for own in small.values() for r in own)]))
    rises = dict(zip(every, trials.rises(every, track), strict=True))
    rate = rate_of(rises.values())
    cost = {removal: rate * rise.divergence for removal, rise in rises.items()}
    drawn, power = _drawn(layers, scores, small, cost)
    return Prices(
        loss=trials.loss(),
        targets=text.targets,
        bytes_per_token=bytes_per_token,
        layers=layers,
        ledger=books,
        large=tuple(
            Price(r, cost[r], saved(books, whole, r), _score(scores, r), rises[r].loss)
            for r in large
        ),
        curves=drawn,
        power=power,
        scores={g.name: scores[g.name] for g in groups if g.kind == "neurons" and small},
        rate=rate,
    )  # fmt: skip


def removals(layer: Layer) -> list[Removal]:
    """Every large removal in a layer: single units, either half, and the layer."""
    found = [
        Removal(g.kind, layer.number, g.name, (u,))
        for g in layer.groups
        if g.kind != "neurons" and g.size > max(1, g.least)
        for u in range(g.size)
    ]
    if layer.attention:
        found.append(Removal("attention", layer.number))
    if layer.mlp:
        found.append(Removal("mlp", layer.number))
    return [*found, Removal("layers", layer.number)]


def saved(books: Ledger, decision: Decision, removal: Removal) -> Amounts:
    """What a removal saves on top of a decision."""
    before = books.of(removal.layer, decision.kept)
    if removal.kind == "layers":
        return before
    return before - books.of(removal.layer, decision.without(books.layers, removal).kept)


def rate_of(rises: Iterable[Measured]) -> float:
    """By how much the loss rises for each nat of divergence, over the smaller of the removals.

    Where a model says what the text does, the two are equal in the mean. One that has never seen
    text like it may even gain by leaving itself behind; the rate is then held at a tenth.
    """
    small = [rise for rise in rises if 0 < rise.divergence < SMALL]
    apart = sum(rise.divergence for rise in small)
    return max(LEAST_RATE, sum(rise.loss for rise in small) / apart) if apart else 1.0


def lowest(scores: Tensor, count: int) -> tuple[int, ...]:
    """The lowest-scored units, ascending by number."""
    return tuple(sorted(scores.argsort(stable=True)[:count].tolist()))


def spearman(pairs: Sequence[tuple[float, float]]) -> float:
    """The rank correlation of pairs, ties by their mean rank; 0 where one side does not vary."""
    ranks = []
    for side in zip(*pairs, strict=True):
        values = torch.tensor(side, dtype=torch.float64)
        below = (values[:, None] > values).sum(1)
        upto = (values[:, None] >= values).sum(1)
        ranks.append((below + upto).double())
    a, b = (r - r.mean() for r in ranks)
    spread = float(a.norm() * b.norm())
    return float(a @ b) / spread if spread > 0 else 0.0


def _tries(
    groups: Sequence[Group],
    layers: Sequence[Layer],
    scores: Scores,
    shares: Sequence[float],
    curves: int,
    probes: Sequence[float],
) -> dict[str, list[Removal]]:
    """Per group of neurons, the removals to try."""
    at = {g.name: layer.number for layer in layers for g in layer.groups}
    rows = [g for g in groups if g.kind == "neurons"]
    places = torch.linspace(0, len(rows) - 1, min(curves, len(rows))).round().long().tolist()
    found = {}
    for number, g in enumerate(rows):
        asked = shares if number in places else probes
        counts = dict.fromkeys(min(max(1, round(x * g.size)), g.size - 1) for x in asked)
        found[g.name] = [
            Removal("neurons", at[g.name], g.name, lowest(scores[g.name], n)) for n in counts if n
        ]
    return found


def _drawn(
    layers: Sequence[Layer],
    scores: Scores,
    small: dict[str, list[Removal]],
    cost: dict[Removal, float],
) -> tuple[tuple[Curve, ...], float]:
    """The curves of all groups of neurons, and the power that they share."""
    tried = {name: {len(r.units): cost[r] for r in own} for name, own in small.items()}
    shares = {name: gone(scores[name]) for name in small}
    power = exponent(
        [[(float(shares[n][m]), d) for m, d in own.items()] for n, own in tried.items()]
    )
    found = []
    for layer in layers:
        own = [g for g in layer.mlp if g.name in small]
        alone = len(layer.mlp) == 1  # else the whole half is not the end of one group's curve
        end = cost.get(Removal("mlp", layer.number)) if alone else None
        found += [
            curve(g.name, layer.number, scores[g.name], tried[g.name], power=power, whole=end)
            for g in own
        ]
    return tuple(found), power


def _score(scores: Scores, removal: Removal) -> float | None:
    if not removal.units or removal.group not in scores:
        return None
    return float(scores[removal.group][list(removal.units)].sum())
