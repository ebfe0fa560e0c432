"""How much each unit matters on the domain: criteria that turn batches into scores.

Notation: `a` is the activation of a unit (its part of the input of the reading matrix), `L` the
summed loss. The first-order effect of removing a unit is the sum over tokens of a * dL/da. How
that is summed matters more than anything else: signs that cancel over the whole data hide units
that matter in every sequence (Michaud et al. 2025, arXiv 2505.15811, sum first).

Only a few numbers per unit are ever accumulated. Weights are frozen while scoring, so that no
weight gradient is computed or held. Several processes take their share of the batches (of the
units, for ablation) and add up what they found, so that all get the same scores.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import UnknownName
from .experts import See, fused, opened
from .losses import CHUNK, FROZEN, Loss, language_loss
from .processes import share, summed
from .progress import Track, silent
from .surgeon import Sums, bytes_of_sums, gathered, solved
from .units import Group, Scores, Slice, norms


@dataclass(frozen=True)
class Data:
    """What every criterion is given. `batches` are (batch, …) inputs for `loss(model, batch)`."""

    model: Any
    groups: Sequence[Group]
    batches: Sequence[Tensor]
    loss: Loss
    seed: int
    track: Track


def attribution(d: Data) -> Scores:
    """Sum over sequences of |sum over tokens of a * dL/da|, in nats: the default."""
    return _reduced(d, lambda effect: effect.abs().sum(0))


def fisher(d: Data) -> Scores:
    """Sum over sequences of the squared effect, (sum over tokens of a * dL/da)^2."""
    return _reduced(d, lambda effect: effect.square().sum(0))


def paper(d: Data) -> Scores:
    """|sum over everything of a * dL/da|, the formula of Michaud et al. 2025, in nats."""
    return {name: s.abs() for name, s in _reduced(d, lambda effect: effect.sum(0)).items()}


def ablation(d: Data) -> Scores:
    """The loss really added when the unit alone is silenced, in nats. Exact; a pass per unit."""

    def measure() -> float:
        return sum(float(d.loss(d.model, b)) for b in d.batches)

    with torch.inference_mode():
        whole = measure()
        scores = {g.name: torch.zeros(g.size) for g in d.groups}
        todo = [(g, u) for g in d.groups for u in range(g.size)]
        for group, unit in d.track(share(todo), "ablating units"):

            def silence(_: Group, s: Slice, x: Tensor, unit: int = unit) -> Tensor:
                at = s.start + unit * s.block
                return torch.cat(
                    (x[..., :at], 0 * x[..., at : at + s.block], x[..., at + s.block :]), dim=-1
                )

            with watched(d.model, [group], silence):
                scores[group.name][unit] = measure() - whole
    return {name: summed(s) for name, s in scores.items()}


def activation(d: Data) -> Scores:
    """The L2 norm of the unit's activation over all tokens."""
    return {g.name: torch.stack([s.sum(1) for s in power]).sum(0).sqrt() for g, power in _powers(d)}


def wanda(d: Data) -> Scores:
    """Activation norm times weight norm (Sun et al. 2024), summed over what reads the unit."""
    params = dict(d.model.named_parameters())
    scores = {}
    for g, power in _powers(d):
        total = torch.zeros(g.size)
        for s, p in zip(g.reads, power, strict=True):
            weight = params[s.param].detach().float().movedim(s.dim, 0)
            strength = weight[s.start : s.start + g.size * s.block].square().flatten(1).sum(1).cpu()
            total += (p * strength.view(g.size, s.block)).sum(1)
        scores[g.name] = total.sqrt()
    return scores


def magnitude(d: Data) -> Scores:
    """The L2 norm of everything the unit owns; looks at no data."""
    params = {name: p.detach() for name, p in d.model.named_parameters()}
    return {g.name: norms(g, params).cpu() for g in d.groups}


def random(d: Data) -> Scores:
    """A seeded random order, drawn without replacement so that counts are exact."""
    generator = torch.Generator().manual_seed(d.seed)
    sizes = [g.size for g in d.groups]
    order = torch.randperm(sum(sizes), generator=generator).float().split(sizes)
    return {g.name: o.clone() for g, o in zip(d.groups, order, strict=True)}


def surgeon(d: Data) -> Scores:
    """What the unit costs once the others were refitted to do its work, in nats (surgeon.py)."""
    return solved(d, gathered(d))


CRITERIA: dict[str, Callable[[Data], Scores]] = {
    "ablation": ablation,
    "activation": activation,
    "attribution": attribution,
    "fisher": fisher,
    "magnitude": magnitude,
    "paper": paper,
    "random": random,
    "surgeon": surgeon,
    "wanda": wanda,
}
HALVED = 3  # times that sums are held at the most: of both halves, and of all
GRADIENT_FREE = frozenset({"ablation", "activation", "magnitude", "random", "wanda"})
WITHOUT_DATA = frozenset({"magnitude", "random"})
# Made of sums over text, by which scores of all of it come from those of two halves: what is summed
# up, and the scores that sums come to.
SUMMED: dict[str, tuple[Callable[[Data], Sums], Callable[[Data, Sums], Scores]]] = {
    "attribution": (attribution, lambda d, sums: sums),
    "fisher": (fisher, lambda d, sums: sums),
    "surgeon": (gathered, solved),
}


def score(
    model: Any,
    groups: Sequence[Group],
    batches: Sequence[Tensor],
    *,
    criterion: str = "attribution",
    loss: Loss = language_loss,
    seed: int = 0,
    track: Track = silent,
) -> Scores:
    """Score every unit of `groups`, (size,) float32 on the CPU, higher = keep.

    Every process gives the same model and all batches, and gets the same scores. The model runs as
    it is, so a bfloat16 model is scored in bfloat16; sums are float32. Its weights, gradients and
    mode are left as they were. Raises UnknownName for the criterion.
    """
    _check(criterion)
    with _frozen(model):
        return CRITERIA[criterion](Data(model, groups, batches, loss, seed, track))


def score_halves(
    model: Any,
    groups: Sequence[Group],
    halves: tuple[Sequence[Tensor], Sequence[Tensor]],
    *,
    criterion: str = "attribution",
    loss: Loss = language_loss,
    seed: int = 0,
    track: Track = silent,
) -> tuple[Scores, Scores, Scores]:
    """The scores of all batches, and of each half of them; else as `score`.

    Where a criterion is made of sums, each half is read once. Elsewhere all is read twice.
    """
    _check(criterion)
    first, second = (Data(model, groups, half, loss, seed, track) for half in halves)
    with _frozen(model):
        if criterion not in SUMMED:
            whole = replace(first, batches=[*halves[0], *halves[1]])
            all_, one, two = (CRITERIA[criterion](d) for d in (whole, first, second))
            return all_, one, two
        add_up, solve = SUMMED[criterion]
        sums = add_up(first)
        one = solve(first, sums)
        more = add_up(second)
        two = solve(second, more)
        whole_sums = {name: sums[name] + more[name] for name in sums}
        return solve(first, whole_sums), one, two


def _check(criterion: str) -> None:
    if criterion not in CRITERIA:
        raise UnknownName("criterion", criterion, CRITERIA)


@contextlib.contextmanager
def watched(model: Any, groups: Sequence[Group], see: See) -> Iterator[None]:
    """Within the block, `see(group, slice, x)` is shown what each reading module is fed."""
    readers = [(g, s) for g in groups for s in g.reads]
    inside = [(g, s) for g, s in readers if fused(model, s.param)]
    with contextlib.ExitStack() as undo:
        undo.enter_context(opened(model, inside, see))
        for g, s in ((g, s) for g, s in readers if not fused(model, s.param)):

            def hook(_: Any, args: tuple[Tensor, ...], g: Group = g, s: Slice = s) -> Any:
                instead = see(g, s, args[0])
                return None if instead is None else (instead, *args[1:])

            handle = model.get_submodule(s.module).register_forward_pre_hook(hook)
            undo.callback(handle.remove)
        yield


@contextlib.contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """No parameter asks for a gradient, and dropout is off."""
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    training = model.training
    model.eval()
    for p, _ in wanted:
        p.requires_grad_(False)
    try:
        yield
    finally:
        model.train(training)
        for p, wants in wanted:
            p.requires_grad_(wants)


def _reduced(d: Data, reduce: Callable[[Tensor], Tensor]) -> Scores:
    """`reduce` maps the effects of one batch, (sequences, size) in nats, to (size,); summed."""
    device = next(d.model.parameters()).device
    scores = {g.name: torch.zeros(g.size, device=device) for g in d.groups}
    effects: dict[str, Tensor] = {}
    sequences = 0

    def see(g: Group, s: Slice, x: Tensor) -> Tensor | None:
        # Weights being frozen, the first reader's input is where gradients have to begin.
        source = x if x.requires_grad else x.detach().requires_grad_()
        seen = x.detach()  # holding `source` in its own hook would be a cycle: a leak per batch

        def on_gradient(gradient: Tensor) -> None:
            wide = (sequences, -1, seen.shape[-1])
            product = seen.reshape(wide).float() * gradient.reshape(wide).float()
            per_input = product.sum(1).narrow(1, s.start, g.size * s.block)
            effect = per_input.view(sequences, g.size, s.block).sum(2)  # (sequences, size)
            effects[g.name] = effects[g.name] + effect if g.name in effects else effect

        source.register_hook(on_gradient)
        return source if source is not x else None

    with watched(d.model, d.groups, see):
        for batch in d.track(share(d.batches), "scoring"):
            sequences = len(batch)
            d.loss(d.model, batch.to(device)).backward()
            for name, effect in effects.items():
                scores[name] += reduce(effect)
            effects.clear()
    return {name: summed(s).cpu() for name, s in scores.items()}


def _powers(d: Data) -> list[tuple[Group, list[Tensor]]]:
    """Per group, for each reading slice, the sum over tokens of a^2, (size, block)."""
    sums = {(g.name, s): torch.zeros(g.size, s.block) for g in d.groups for s in g.reads}

    def see(g: Group, s: Slice, x: Tensor) -> None:
        squares = x.reshape(-1, x.shape[-1]).float().square().sum(0)
        sums[g.name, s] += squares.narrow(0, s.start, g.size * s.block).view(-1, s.block).cpu()

    device = next(d.model.parameters()).device
    with torch.no_grad(), watched(d.model, d.groups, see):
        for batch in d.track(share(d.batches), "reading activations"):
            d.loss(d.model, batch.to(device))
    return [(g, [summed(sums[g.name, s]) for s in g.reads]) for g in d.groups]


def overlap(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], groups: Sequence[Group]
) -> dict[str, float]:
    """Per kind, the share of units kept in `a` that are also kept in `b`, 0 to 1."""
    both: dict[str, int] = {}
    kept: dict[str, int] = {}
    for g in groups:
        both[g.kind] = both.get(g.kind, 0) + int((a[g.name] & b[g.name]).sum())
        kept[g.kind] = kept.get(g.kind, 0) + int(a[g.name].sum())
    return {kind: both[kind] / kept[kind] for kind in kept}


def memory_estimate(
    model: Any, groups: Sequence[Group], *, batch_size: int, length: int, criterion: str
) -> int:
    """Bytes that scoring is expected to hold at its peak, weights included.

    Per token and layer a backward pass keeps about sixteen hidden-sized tensors and, for each
    group, three as wide as its units (Korthikanti et al. 2022 count 34 bytes per hidden entry in
    16 bit, of which frozen weights drop about a third).
    """
    weights: int = sum(p.numel() * p.element_size() for p in model.parameters())
    if criterion in WITHOUT_DATA:
        return weights
    entry: int = next(model.parameters()).element_size()
    tokens = batch_size * length
    widest = max((g.size * s.block for g in groups for s in g.reads), default=0)
    hidden = int(getattr(model.config, "hidden_size", widest))
    vocabulary = int(getattr(model.config, "vocab_size", 0))
    free = criterion in GRADIENT_FREE
    sums = HALVED * bytes_of_sums(model, groups) if criterion == "surgeon" else 0
    logits = min(tokens, CHUNK if free else FROZEN) * vocabulary * (4 + 4 + entry)
    if free:
        return weights + logits + tokens * (4 * hidden + 3 * widest) * entry
    wide = sum(g.size * s.block for g in groups for s in g.reads)
    layers = len({g.name.rpartition(".")[0] for g in groups})
    return weights + sums + logits + tokens * (16 * hidden * layers + 3 * wide) * entry


def write(path: Path, scores: Scores, made_by: Mapping[str, object]) -> None:
    """Scores as safetensors, what they were made of as its metadata."""
    about = {key: v if isinstance(v, str) else json.dumps(v) for key, v in made_by.items()}
    save_file({name: s.contiguous() for name, s in scores.items()}, path, metadata=about)


def read(path: Path) -> tuple[Scores, dict[str, str]]:
    """The scores of a file, and what they were made of."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
