"""Many multilayer perceptrons with two hidden layers side by side: a tensor per parameter.

`Networks` maps the names that `nn.Sequential(Linear, ReLU, Linear, ReLU, Linear)` gives its
parameters to tensors with the networks along the first axis. `one` takes a network out as such a
Sequential, on which the whole of llm_narrow works; what is done to all at once here (norms, the
penalty, removal) is tested to be what the library does to that one.

Networks of different widths lie side by side with zeros behind the narrower ones: a unit of zeros
gives 0 and gets gradients of exactly 0, so no mask is needed.

*Ghosts* are units as the paper "removes" them: no weights in, but a bias and weights out, both of
which go on training. Whatever the image, a ghost gives max(0, its bias). They have their own
tensors, "2.constant" and "2.ghost" for those of the first layer, "4.…" of the second; the networks
of the fair way have none.

Shapes: N networks, H units of a hidden layer, G ghosts of it, B images.
"""

import itertools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from llm_narrow.penalties import EPS

Networks = dict[str, Tensor]  # "0.weight": (N, H, 784), "0.bias": (N, H), "2.weight": …
PerUnit = list[Tensor]  # of each hidden layer, (N, H)

LAYERS = ("0", "2", "4")
CLASSES = 10
# name -> its axes that are units: of the first hidden layer, the second, ghosts of either
AXES: Mapping[str, tuple[str, ...]] = {
    "0.weight": ("H0", "in"), "0.bias": ("H0",), "2.weight": ("H1", "H0"), "2.bias": ("H1",),
    "4.weight": ("out", "H1"), "4.bias": ("out",), "2.ghost": ("H1", "G0"), "2.constant": ("G0",),
    "4.ghost": ("out", "G1"), "4.constant": ("G1",),
}  # fmt: skip


def fresh(inputs: int, hidden: Sequence[int], seeds: Sequence[int]) -> Networks:
    """Networks as `nn.Linear` begins them after `torch.manual_seed(seed)`, each of its seed."""
    sizes = [inputs, *hidden, CLASSES]
    nets: Networks = {}
    for name, (wide, out) in zip(LAYERS, itertools.pairwise(sizes), strict=True):
        nets[f"{name}.weight"] = torch.empty(len(seeds), out, wide)
        nets[f"{name}.bias"] = torch.empty(len(seeds), out)
    for n, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed)
        for name, tensor in nets.items():
            wide = nets[name.replace("bias", "weight")].shape[2]
            tensor[n].uniform_(-1 / math.sqrt(wide), 1 / math.sqrt(wide), generator=generator)
    return nets


def stacked(nets: Sequence[nn.Module]) -> Networks:
    """Networks of one shape or of several, side by side."""
    return side_by_side([{name: p.detach()[None] for name, p in net.named_parameters()}
                         for net in nets])  # fmt: skip


def with_ghosts(nets: Networks) -> Networks:
    """The networks with room for ghosts, of which there are none yet."""
    found = dict(nets)
    count = len(nets["0.bias"])
    for name, out in (("2", nets["2.bias"].shape[1]), ("4", CLASSES)):
        found[f"{name}.ghost"] = nets["0.bias"].new_zeros(count, out, 0)
        found[f"{name}.constant"] = nets["0.bias"].new_zeros(count, 0)
    return found


def hidden(nets: Networks) -> list[int]:
    """The widths of the hidden layers, zeros included."""
    return [nets["0.bias"].shape[1], nets["2.bias"].shape[1]]


def bias(nets: Networks, layer: str) -> Tensor:
    """The bias of a layer, with what ghosts give, (N, out)."""
    found = nets[f"{layer}.bias"]
    if f"{layer}.ghost" in nets:
        given = nets[f"{layer}.constant"].relu()[:, :, None]
        found = found + torch.bmm(nets[f"{layer}.ghost"], given)[:, :, 0]
    return found


def activations(nets: Networks, images: Tensor) -> list[Tensor]:
    """What each layer gives to images (N, B, 784): (N, H, B) twice, logits (N, 10, B)."""
    found = []
    inputs = images.transpose(1, 2)
    for layer in LAYERS:
        inputs = torch.baddbmm(bias(nets, layer)[:, :, None], nets[f"{layer}.weight"], inputs)
        if layer != LAYERS[-1]:
            inputs = inputs.relu_()
        found.append(inputs)
    return found


@torch.no_grad()
def hits(nets: Networks, images: Tensor, labels: Tensor, *, entries: int) -> Tensor:
    """How many of the same images, (V, 784), each network gets right, (N,) int64.

    No activation of more than about `entries` numbers is held at a time.
    """
    found = []
    count, width = nets["0.bias"].shape
    at_once = max(1, entries // (len(images) * max(hidden(nets))))
    for some in torch.arange(count).split(at_once):
        part = {name: p[some[0] : some[-1] + 1] for name, p in nets.items()}
        first = part["0.weight"].reshape(-1, images.shape[1]) @ images.T  # (n * H, V)
        inner = first.view(len(some), width, -1).add_(part["0.bias"][:, :, None]).relu_()
        for layer in LAYERS[1:]:
            inner = torch.baddbmm(bias(part, layer)[:, :, None], part[f"{layer}.weight"], inner)
            if layer != LAYERS[-1]:
                inner = inner.relu_()
        found.append((inner.argmax(1) == labels).sum(1))
    return torch.cat(found)


def one(nets: Networks, place: int, widths: Sequence[int] | None = None) -> nn.Sequential:
    """One network without its ghosts, of its own. `widths` leaves out the zeros behind it."""
    sizes = [nets["0.weight"].shape[2], *(widths or hidden(nets)), CLASSES]
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
    """All networks of the parts in one, as wide as the widest. All or none have ghosts."""
    found = {}
    for name in parts[0]:
        sizes = [max(p[name].shape[d] for p in parts) for d in range(1, parts[0][name].dim())]
        count = sum(len(p[name]) for p in parts)
        found[name] = parts[0][name].new_zeros(count, *sizes)
        at = 0
        for p in parts:
            here = p[name].detach()
            found[name][(slice(at, at + len(here)), *map(slice, here.shape[1:]))] = here
            at += len(here)
    return found


def chosen(nets: Networks, places: Tensor) -> Networks:
    """The networks at the places, (n,) int64; one may be there more than once."""
    return {name: tensor[places] for name, tensor in nets.items()}


def compact(tensors: Networks, keep: PerUnit) -> Networks:
    """What of the networks is kept moves to the front, as wide as the widest network is then.

    `tensors` are networks, or what an optimizer remembers of them. Where there is room for ghosts,
    the units that go become ghosts: their bias and what they give stay as they are.
    """
    found = dict(tensors)
    for number, stays in enumerate(keep):
        here, after, unit = LAYERS[number], LAYERS[number + 1], f"H{number}"
        if f"{after}.ghost" in found:
            gone = _order(~stays, least=0)
            became = (_taken(found[f"{after}.weight"], 2, *gone),
                      _taken(found[f"{here}.bias"], 1, *gone))  # fmt: skip
            for name, more in zip(("ghost", "constant"), became, strict=True):
                found[f"{after}.{name}"] = torch.cat([found[f"{after}.{name}"], more], dim=-1)
        order = _order(stays)
        for name, axes in AXES.items():
            if unit in axes and name in found:
                found[name] = _taken(found[name], 1 + axes.index(unit), *order)
    return found


def _order(wanted: Tensor, least: int = 1) -> tuple[Tensor, Tensor]:
    """Places of the wanted units, (N, most), and whether there is one, the same shape."""
    wide = max(least, int(wanted.sum(1).max()))
    order = wanted.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :wide]
    return order, wanted.gather(1, order)


def _taken(tensor: Tensor, dim: int, order: Tensor, there: Tensor) -> Tensor:
    """The entries of the units along `dim` in a new order, 0 where there is none."""
    shape = [len(order), *(order.shape[1] if d == dim else 1 for d in range(1, tensor.dim()))]
    sizes = [order.shape[1] if d == dim else n for d, n in enumerate(tensor.shape)]
    return tensor.gather(dim, order.view(shape).expand(sizes)) * there.view(shape)


def squares(nets: Networks) -> PerUnit:
    """The sum of squares of the weights into and out of each unit, biases left out, (N, H)."""
    first, between, last = (nets[f"{layer}.weight"] for layer in LAYERS)
    shared = between.square()
    found = [torch.linalg.vector_norm(first, dim=2).square() + shared.sum(1),
             shared.sum(2) + last.square().sum(1)]  # fmt: skip
    if "2.ghost" in nets:
        found[1] = found[1] + nets["2.ghost"].square().sum(2)
    return found


@torch.no_grad()
def add_penalty(grads: Networks, nets: Networks, strength: Tensor, squared: PerUnit) -> None:
    """Add the gradient of strength * (sum of the norms of all units), strength (N,).

    The library's `group_lasso` on units without biases; `squared` as `squares` gives them. Ghosts
    are units too, of what they give.
    """
    into, out = (strength[:, None] / (s + EPS).sqrt() for s in squared)
    grads["0.weight"].addcmul_(nets["0.weight"], into[:, :, None])
    grads["2.weight"].addcmul_(nets["2.weight"], into[:, None] + out[:, :, None])
    grads["4.weight"].addcmul_(nets["4.weight"], out[:, None])
    for layer in LAYERS[1:]:
        if f"{layer}.ghost" in nets:
            ghost = nets[f"{layer}.ghost"]
            own = strength[:, None] / (ghost.square().sum(1) + EPS).sqrt()
            slope = own[:, None] + (out[:, :, None] if layer == "2" else 0)
            grads[f"{layer}.ghost"].addcmul_(ghost, slope.expand_as(ghost))


@torch.no_grad()
def silence(tensors: Networks, alive: PerUnit, *, whole: bool) -> None:
    """Zero, in place, what units that are not alive own: all, or the weights into them alone."""
    for number, stays in enumerate(alive):
        here, after = LAYERS[number], LAYERS[number + 1]
        tensors[f"{here}.weight"].mul_(stays[:, :, None])
        if f"{here}.ghost" in tensors:
            tensors[f"{here}.ghost"].mul_(stays[:, :, None])
        if whole:
            tensors[f"{here}.bias"].mul_(stays)
            tensors[f"{after}.weight"].mul_(stays[:, None])
