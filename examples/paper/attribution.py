"""Attribution against ablation, for neurons and for channels of the residual stream (figure 11).

    python examples/paper/attribution.py --out runs/attribution

Every unit is ablated for real: all that it owns is set to zero, and the loss of each batch is
measured again; layers before a neuron's own are passed over. Beside these prices stand three scores
of the same batches: the paper's (the sum over a unit's weights of gradient times weight), and the
library's `attribution` and `paper` (the sum over tokens of activation times gradient; absolute by
sequence, and absolute at the end). Each ablation is kept as it is made, so that the same command
goes on where it was stopped.

Passes are in float32, as in the paper: a neuron is worth some 1e-5 nats per token, and bfloat16
rounds logits at their third digit, which changes the mean over some thousand tokens by more.
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
from llm_narrow.depth import layers_of, stack_of
from llm_narrow.errors import BadInput
from llm_narrow.losses import language_loss
from llm_narrow.paper_toys import told
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
    calibration_tokens = args.tokens * args.batches
    recipe, start, track = kept.gathered(args, console, calibration_tokens=calibration_tokens)
    blocks = inputs.calibration(start, recipe, track=track)
    rows = max(1, args.tokens // args.length)
    batches = [b.to(start.device) for b in blocks.tokens.long().split(rows)][: args.batches]
    model = start.loaded.model
    if args.dtype == "bfloat16":
        model = copied(model, torch.bfloat16)
    model.eval()
    stream = channels.group_of(model)
    chosen: dict[str, list[Pair]] = {
        "neurons": sampled("neurons", start.groups, args.neurons, args.seed),
        "channels": sampled("channels", [stream], args.channels or stream.size, args.seed),
    }
    about = {
        "llm_narrow": __version__, "model": start.loaded.name, "sha256": start.loaded.sha256,
        "domain": start.domain.name, "tokens": batches[0].numel(), "batches": len(batches),
        "blocks": blocks.sha256, "precision": args.dtype, "seed": args.seed,
    }  # fmt: skip
    done = kept.Rows(args.out / "losses.jsonl", kept.made_of(about))
    about["units"] = {kind: len(pairs) for kind, pairs in chosen.items()}
    about["of"] = {"neurons": sum(g.size for g in start.groups), "channels": stream.size}
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
    parser.add_argument(
        "--neurons", type=int, default=500, help="as many of each layer, drawn without replacement"
    )
    parser.add_argument("--channels", type=int, default=0, help="drawn alike; 0 is all")
    parser.add_argument("--tokens", type=int, default=2048, help="of a batch")
    parser.add_argument("--batches", type=int, default=3, help="that intervals reach over")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args(argv)
    for name, least in (("neurons", 1), ("channels", 0), ("tokens", 1), ("batches", 1)):
        if getattr(args, name) < least:
            raise BadInput(f"--{name} must be at least {least}, got {getattr(args, name)}.")
    return args


def sampled(kind: str, groups: Sequence[Group], count: int, seed: int) -> list[Pair]:
    """So many units, none twice, and of each group as many, give or take one, while it has them.

    Raises BadInput where there are fewer.
    """
    there = sum(g.size for g in groups)
    if count > there:
        raise BadInput(f"--{kind} must be at most {there}, all there are, got {count}.")
    chance = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(g.size, generator=chance).tolist() for g in groups]
    turns = torch.randperm(len(groups), generator=chance).tolist()
    rounds = range(max(g.size for g in groups))
    found = [(groups[n], orders[n][at]) for at in rounds for n in turns if at < groups[n].size]
    return found[:count]


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


class Shortened:
    """A model whose first layers can be passed over, as what enters each of the others is known."""

    def __init__(self, model: Any, batches: Sequence[Tensor]) -> None:
        """Runs nothing yet. All groups that lie in a layer know which it is."""
        self.model, self.batches = model, batches
        layers = layers_of(model)
        self.layer_of = {g.name: layer.number for layer in layers for g in layer.groups}
        self.stack = list(model.get_submodule(stack_of(model, layers[0].groups)))
        self._entering: list[list[Tensor]] = []  # for each batch, of each layer
        self._beside: list[tuple[Any, ...] | None] = []  # what each gives beside hidden states

    def losses(self, group: Group | None = None) -> list[float]:
        """The loss of each batch, where nothing before the layer of the group has changed."""
        first = 0 if group is None else self.layer_of.get(group.name, 0)
        if first and not self._entering:
            raise RuntimeError("look() comes before anything is ablated")
        found = []
        for number, batch in enumerate(self.batches):
            with self._over(first, number):
                found.append(float(language_loss(self.model, batch)))
        return found

    def look(self) -> list[float]:
        """Keep what enters the layers of the model as it is; the loss of each batch."""
        self._entering, self._beside = [[] for _ in self.batches], [None] * len(self.stack)
        found = []
        for number, batch in enumerate(self.batches):
            with contextlib.ExitStack() as hooks:
                for at, layer in enumerate(self.stack):
                    hook = layer.register_forward_hook(self._keep(number, at), with_kwargs=True)
                    hooks.callback(hook.remove)
                found.append(float(language_loss(self.model, batch)))
        return found

    def _keep(self, number: int, at: int) -> Any:
        def keep(_: Any, args: Any, kwargs: Any, out: Any) -> None:
            self._entering[number].append(args[0] if args else kwargs["hidden_states"])
            self._beside[at] = out[1:] if isinstance(out, tuple) else None

        return keep

    @contextlib.contextmanager
    def _over(self, first: int, number: int) -> Iterator[None]:
        """Within, layers before the first give what enters that one."""
        for at, layer in enumerate(self.stack[:first]):

            def passed(*_: Any, beside: Any = self._beside[at], **__: Any) -> Any:
                hidden = self._entering[number][first]
                return hidden if beside is None else (hidden, *beside)

            layer.forward = passed
        try:
            yield
        finally:
            for layer in self.stack[:first]:
                del layer.forward


@torch.no_grad()
def ablated(
    model: Any, pairs: Sequence[Pair], batches: Sequence[Tensor], done: kept.Rows, track: Any,
    kind: str,
) -> Tensor:  # fmt: skip
    """What each unit's ablation adds to the loss of each batch, (batches, units), in nats."""
    keys = [f"{group.name} {unit}" for group, unit in pairs]
    todo = [pair for key, pair in zip(keys, pairs, strict=True) if key not in done.done]
    if todo or "whole" not in done.done:
        short = Shortened(model, batches)
        whole = short.look()
        if "whole" not in done.done:
            done.add("whole", {"losses": whole})
        for group, unit in track(todo, f"ablating {kind}"):
            with without(model, group, unit):
                done.add(f"{group.name} {unit}", {"losses": short.losses(group)})
    rows = [done.done[key]["losses"] for key in ("whole", *keys)]
    found = torch.tensor(rows, dtype=torch.float64)
    return (found[1:] - found[0]).T


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
    told(main)
