"""Many multilayer perceptrons side by side: one tensor per parameter holds those of all of them.

`Networks` maps the names that `nn.Sequential(Linear, ReLU, Linear, …)` gives its parameters to
tensors with the networks along the first axis, as `torch.func.stack_module_state` does. `one` takes
a network out as such a Sequential, on which the whole of llm_narrow works; what is done to
all at once here (masks, removal, norms, the proximal step) is tested to be what the library does to
that one.

Networks of different widths lie side by side with zeros behind the narrower ones. A unit of zeros
gives 0 and gets gradients of exactly 0, so it stays, and no mask is needed.

Shapes: N networks, `width` units of a hidden layer, B samples. Activations are (N, width, B).
"""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llm_narrow.penalties import EPS
from llm_narrow.units import Keep

Networks = dict[str, Tensor]  # "0.weight": (N, out, in), "0.bias": (N, out), "2.weight": …
PerUnit = list[Tensor]  # of each hidden layer, (N, width)


def fresh(inputs: int, hidden: Sequence[int], seeds: Sequence[int]) -> Networks:
    """Networks as `nn.Linear` begins them after `torch.manual_seed(seed)`, each of its seed."""
    sizes = [inputs, *hidden, 2]
    nets: Networks = {}
    for number, (wide, out) in enumerate(itertools.pairwise(sizes)):
        nets[f"{2 * number}.weight"] = torch.empty(len(seeds), out, wide)
        nets[f"{2 * number}.bias"] = torch.empty(len(seeds), out)
    for n, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed)
        for name, tensor in nets.items():
            wide = max(1, nets[name.replace("bias", "weight")].shape[2])
            tensor[n].uniform_(-1 / math.sqrt(wide), 1 / math.sqrt(wide), generator=generator)
    return nets


def layers(nets: Networks) -> list[tuple[Tensor, Tensor]]:
    """Weight and bias of each layer, inputs first."""
    return [
        (nets[name], nets[name.replace("weight", "bias")]) for name in nets if "weight" in name
    ]


def hidden(nets: Networks) -> list[int]:
    """The widths of the hidden layers."""
    return [weight.shape[1] for weight, _ in layers(nets)[:-1]]


def groups(nets: Networks) -> list[str]:
    """What the library calls the hidden layers."""
    return [name.removesuffix(".weight") for name in nets if "weight" in name][:-1]


def activations(nets: Networks, inputs: Tensor, *, after: int = 0) -> list[Tensor]:
    """What each layer gives to `inputs`, (N, in, B); the last are the logits, (N, 2, B).

    `inputs` may be the activations of the first `after` layers instead.
    """
    found = []
    *inner, (weight, bias) = layers(nets)[after:]
    for w, b in inner:
        inputs = torch.baddbmm(b[:, :, None], w, inputs).relu_()
        found.append(inputs)
    return [*found, torch.baddbmm(bias[:, :, None], weight, inputs)]


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy of every sample in nats, (N, B), of logits (N, 2, B).

    Of two classes it is softplus of wrong minus right, which is cheaper than the general one.
    """
    return F.softplus((logits[:, 1] - logits[:, 0]) * (1 - 2 * labels))


def right(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether the larger logit is that of the label, (N, B)."""
    return (logits[:, 1] > logits[:, 0]) == labels.bool()


def one(nets: Networks, place: int, widths: Sequence[int] | None = None) -> nn.Sequential:
    """One network, of its own. `widths` leaves out the zeros behind it."""
    inputs = next(iter(nets.values())).shape[2]
    sizes = [inputs, *(widths or hidden(nets)), 2]
    steps: list[nn.Module] = []
    for wide, out in itertools.pairwise(sizes):
        steps += [nn.Linear(wide, out, device="meta"), nn.ReLU()]
    net = nn.Sequential(*steps[:-1])
    held = {
        name: nets[name][place][tuple(slice(size) for size in p.shape)].detach().cpu().clone()
        for name, p in net.named_parameters()
    }
    net.load_state_dict(held, assign=True)
    return net.requires_grad_()


def side_by_side(parts: Sequence[Networks]) -> Networks:
    """All networks of the parts in one, as wide as the widest."""
    wide = {name: [max(p[name].shape[d] for p in parts) for d in (1, 2)[: parts[0][name].dim() - 1]]
            for name in parts[0]}  # fmt: skip
    return {name: torch.cat([_wider(p[name], size) for p in parts]) for name, size in wide.items()}


def _wider(tensor: Tensor, sizes: Sequence[int]) -> Tensor:
    """With zeros behind, up to the sizes of all axes but the first."""
    missing = [n for d, size in enumerate(sizes, 1) for n in (size - tensor.shape[d], 0)]
    return F.pad(tensor, missing[::-1])


def chosen(nets: Networks, places: Tensor) -> Networks:
    """The networks at the places, (n,) int64; one may be there more than once."""
    return {name: tensor[places] for name, tensor in nets.items()}


def removed(nets: Networks, keep: PerUnit) -> Networks:
    """The networks without the units that `keep`, (N, width) bool each, drops.

    What stays moves to the front, as wide as the widest network is then; see `one`.
    """
    found = dict(nets)
    names = [name.removesuffix(".weight") for name in nets if "weight" in name]
    for (here, after), stays in zip(itertools.pairwise(names), keep, strict=True):
        wide = max(1, int(stays.sum(1).max()))
        order = stays.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :wide]
        there = stays.gather(1, order)  # False behind what stays
        for name, dim in ((f"{here}.weight", 1), (f"{here}.bias", 1), (f"{after}.weight", 2)):
            old = found[name]
            shape = [len(old), *(wide if d == dim else 1 for d in range(1, old.dim()))]
            sizes = [wide if d == dim else -1 for d in range(old.dim())]
            sizes[0] = len(old)
            index = order.view(shape).expand(*[old.shape[d] if n == -1 else n
                                               for d, n in enumerate(sizes)])  # fmt: skip
            found[name] = old.gather(dim, index) * there.view(shape)
    return found


def widths(keep: PerUnit, place: int) -> list[int]:
    """How many units of each layer stay in one network."""
    return [int(stays[place].sum()) for stays in keep]


def decision(nets: Networks, keep: PerUnit, place: int) -> Keep:
    """The decision on one network as the library takes it."""
    return {name: stays[place].cpu() for name, stays in zip(groups(nets), keep, strict=True)}


def squares(nets: Networks) -> PerUnit:
    """The sum of squares of all that each unit owns: what makes it and what reads it."""
    own = [weight.square().sum(2) + bias.square() for weight, bias in layers(nets)[:-1]]
    read = [weight.square().sum(1) for weight, _ in layers(nets)[1:]]
    return [o + r for o, r in zip(own, read, strict=True)]


def penalty(nets: Networks) -> Tensor:
    """The sum of the norms of all units of each network, (N,); differentiable."""
    return torch.cat([(s + EPS).sqrt() for s in squares(nets)], dim=1).sum(1)


@torch.no_grad()
def proximal_step(nets: Networks, amount: float) -> PerUnit:
    """Shorten every unit by `amount` in place, to exactly 0 at the shortest; the norms after.

    Entries that two units share are scaled by both, with all norms taken before.
    """
    norms = [s.sqrt() for s in squares(nets)]
    tiny = torch.finfo(torch.float32).tiny
    factors = [(1 - amount / norm.clamp_min(tiny)).clamp_min(0) for norm in norms]
    scale(nets, factors)
    return [norm * factor for norm, factor in zip(norms, factors, strict=True)]


@torch.no_grad()
def scale(tensors: Networks, factors: PerUnit) -> None:
    """Multiply everything each unit owns by its factor, in place."""
    for (weight, bias), factor in zip(layers(tensors), factors, strict=False):
        weight.mul_(factor[:, :, None])
        bias.mul_(factor)
    for (weight, _), factor in zip(layers(tensors)[1:], factors, strict=True):
        weight.mul_(factor[:, None])
