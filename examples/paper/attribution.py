"""Attribution against ablation, for neurons and for channels of the residual stream (figure 11).

    python examples/paper/attribution.py --out runs/attribution

Every unit is ablated for real: all that it owns is set to zero, and the loss of each batch is
measured again. Beside these prices stand three scores of the same batches: the paper's (the sum
over a unit's weights of gradient times weight), and the library's `attribution` and `paper` (the
sum over tokens of activation times gradient; absolute by sequence, and absolute at the end). Each
ablation is kept as it is made, so that the same command goes on where it was stopped.

Passes are in float32, as in the paper: a single unit is worth less than what bfloat16 rounds off.
"""

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import kept
import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from llm_narrow import __version__, channels, inputs, units
from llm_narrow.errors import BadInput
from llm_narrow.losses import language_loss
from llm_narrow.precision import copied
from llm_narrow.scores import score
from llm_narrow.units import Group

KINDS = ("neurons", "channels")
WEIGHTS = "weights"
FORMULAS = (WEIGHTS, "attribution", "paper")
DRAWS = 2000  # of the bootstrap
Pair = tuple[Group, int]  # a unit


def main(argv: Sequence[str] | None = None) -> None:
    """Ablate what is not ablated yet, score, and compare."""
    args = parse(argv)
    console = Console(stderr=True, highlight=False)
    wanted = args.tokens * args.batches
    recipe, start, track = kept.gathered(args, console, calibration_tokens=wanted)
    blocks = inputs.calibration(start, recipe, track=track)
    rows = max(1, args.tokens // args.length)
    batches = [b.to(start.device) for b in blocks.tokens.long().split(rows)][: args.batches]
    model = start.loaded.model
    if args.dtype == "bfloat16":
        model = copied(model, torch.bfloat16)
    model.eval()
    stream = channels.group_of(model)
    chosen: dict[str, list[Pair]] = {
        "neurons": sampled(start.groups, args.neurons, args.seed),
        "channels": [(stream, unit) for unit in range(stream.size)],
    }
    about = {
        "llm_narrow": __version__, "model": start.loaded.name, "sha256": start.loaded.sha256,
        "domain": start.domain.name, "tokens": batches[0].numel(), "batches": len(batches),
        "blocks": blocks.sha256, "precision": args.dtype, "seed": args.seed,
        "units": {kind: len(pairs) for kind, pairs in chosen.items()},
    }  # fmt: skip
    done = kept.Rows(args.out / "losses.jsonl", kept.made_of({**about, "units": None}))
    prices = {kind: ablated(model, pairs, batches, done, track, kind)
              for kind, pairs in chosen.items()}  # fmt: skip
    found: dict[str, dict[str, Tensor]] = {}
    for formula in FORMULAS:
        console.print(f"Scoring by {formula}")
        found[formula] = scored(model, formula, [*start.groups, stream], chosen, batches)
    zeros = sum(int((x[kind].sum(0) == 0).sum()) for x in (*found.values(), prices)
                for kind in KINDS)  # fmt: skip
    result = {
        "about": about, "zeros": zeros,
        "correlations": {
            formula: {kind: {scale: correlation(by_kind[kind], prices[kind], scale, args.seed)
                             for scale in ("raw", "log")} for kind in KINDS}
            for formula, by_kind in found.items()
        },
        "points": {
            kind: {name: x[kind].sum(0).abs().tolist()
                   for name, x in (("ablation", prices), *found.items())} for kind in KINDS
        },
    }  # fmt: skip

    def draw() -> Any:
        from drawing import attribution

        return attribution(result)

    kept.finished(args.out, "attribution", result, draw)
    console.print(f"Written: {args.out / 'attribution.json'}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = kept.options(__doc__.splitlines()[0], "runs/attribution")
    parser.add_argument("--neurons", type=int, default=500, help="drawn without replacement")
    parser.add_argument("--tokens", type=int, default=2048, help="of a batch")
    parser.add_argument("--batches", type=int, default=3, help="that intervals reach over")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args(argv)
    for name in ("neurons", "tokens", "batches"):
        if getattr(args, name) < 1:
            raise BadInput(f"--{name} must be at least 1, got {getattr(args, name)}.")
    return args


def sampled(groups: Sequence[Group], count: int, seed: int) -> list[Pair]:
    """So many units of all groups, none twice. Raises BadInput where there are fewer."""
    pairs = [(g, unit) for g in groups for unit in range(g.size)]
    if count > len(pairs):
        raise BadInput(f"--neurons must be at most {len(pairs)}, all there are, got {count}.")
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))
    return [pairs[n] for n in order[:count].tolist()]


@contextlib.contextmanager
def without(model: Any, group: Group, unit: int) -> Iterator[None]:
    """The model with all that a unit owns at zero, until the block ends."""
    params = {s.param: model.get_parameter(s.param).data for s in group.slices}
    place = torch.tensor([unit])
    owned = [(params[s.param], s.dim, units.positions(s, place).to(params[s.param].device))
             for s in group.slices]  # fmt: skip
    before = [p.index_select(dim, at) for p, dim, at in owned]
    keep = torch.ones(group.size, dtype=torch.bool)
    keep[unit] = False
    units.mask(model, [group], {group.name: keep})
    try:
        yield
    finally:
        for (p, dim, at), values in zip(owned, before, strict=True):
            p.index_copy_(dim, at, values)


@torch.no_grad()
def ablated(
    model: Any, pairs: Sequence[Pair], batches: Sequence[Tensor], done: kept.Rows, track: Any,
    kind: str,
) -> Tensor:  # fmt: skip
    """What each unit's ablation adds to the loss of each batch, (batches, units), in nats."""

    def losses(key: str) -> list[float]:
        if key not in done.done:
            done.add(key, {"losses": [float(language_loss(model, b)) for b in batches]})
        found: list[float] = done.done[key]["losses"]
        return found

    whole = torch.tensor(losses("whole"), dtype=torch.float64)
    rows = []
    for group, unit in track(pairs, f"ablating {kind}"):
        key = f"{group.name} {unit}"
        if key in done.done:
            rows.append(losses(key))
        else:
            with without(model, group, unit):
                rows.append(losses(key))
    return (torch.tensor(rows, dtype=torch.float64) - whole).T


def scored(
    model: Any, formula: str, groups: Sequence[Group], chosen: dict[str, list[Pair]],
    batches: Sequence[Tensor],
) -> dict[str, Tensor]:  # fmt: skip
    """The scores of the chosen units by kind, (batches, units); those of weights keep their sign.

    Sums over batches, whose absolute value is the score of all of them together.
    """
    by_batch = [
        by_weights(model, groups, batch) if formula == WEIGHTS
        else score(model, groups, [batch], criterion=formula) for batch in batches
    ]  # fmt: skip
    return {
        kind: torch.stack([torch.stack([one[g.name][unit] for g, unit in pairs])
                           for one in by_batch]).double()
        for kind, pairs in chosen.items()
    }  # fmt: skip


def by_weights(model: Any, groups: Sequence[Group], batch: Tensor) -> dict[str, Tensor]:
    """The sum of gradient times weight over all that each unit owns, with its sign, negated."""
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    for p, _ in wanted:
        p.requires_grad_(True)
    try:
        with torch.enable_grad():
            language_loss(model, batch).backward()
        effect = {name: -(p.detach() * p.grad).float() for name, p in model.named_parameters()
                  if p.grad is not None}  # fmt: skip
    finally:
        for p, wants in wanted:
            p.requires_grad_(wants)
            p.grad = None
    return {
        g.name: torch.stack([units.unit_rows(effect[s.param], s, g.size).sum(1)
                             for s in g.slices]).sum(0).cpu()
        for g in groups
    }  # fmt: skip


def correlation(scores: Tensor, prices: Tensor, scale: str, seed: int) -> dict[str, Any]:
    """Pearson's r of absolute scores and prices, and an interval.

    `value` is of all batches together. The interval holds both the 95 % bootstrap interval over
    units and the values of single batches. Pairs with a 0 have no logarithm and are left out.
    """
    whole = pair(scores.sum(0), prices.sum(0), scale)
    single = [pearson(*pair(s, p, scale)) for s, p in zip(scores, prices, strict=True)]
    chance = np.random.default_rng(seed)
    at = chance.integers(0, len(whole[0]), (DRAWS, len(whole[0])))
    drawn = [pearson(whole[0][rows], whole[1][rows]) for rows in at]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {
        "value": pearson(*whole),
        "low": min(float(low), *single), "high": max(float(high), *single),
        "over_units": [float(low), float(high)], "batches": single,
    }  # fmt: skip


def pair(scores: Tensor, prices: Tensor, scale: str) -> tuple[Any, Any]:
    """Absolute values as numpy arrays, or their logarithms where both have one."""
    a, b = scores.abs().numpy(), prices.abs().numpy()
    if scale == "raw":
        return a, b
    both = (a > 0) & (b > 0)
    return np.log10(a[both]), np.log10(b[both])


def pearson(a: Any, b: Any) -> float:
    """Pearson's correlation; 0 where one does not vary."""
    if len(a) < 2 or not a.std() or not b.std():
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


if __name__ == "__main__":
    kept.told(main)
