"""Draw the pictures of docs/concepts/ from real declarations and small real computations.

python examples/docs/pictures.py writes docs/assets/*.svg anew; a test compares them.
"""

import copy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from llm_narrow.families import find_groups
from llm_narrow.figure_style import COLOUR, SERIES, finished, sheet, styled
from llm_narrow.penalties import PENALTIES, add_gradient, proximal_step, unit_norms, unit_weights
from llm_narrow.plan import select
from llm_narrow.refit import refit_and_remove
from llm_narrow.scores import score
from llm_narrow.units import Group, Keep, Slice, keep_all, positions, remove

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from tiny import VOCAB, tiny  # noqa: E402

# One layer of a Llama small enough to see every entry: two key/value heads, eight neurons.
SMALL: dict[str, Any] = {
    "num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 2, "intermediate_size": 8,
}  # fmt: skip
NEITHER, GONE = COLOUR["rule"], COLOUR["paper"]
Colours = dict[str, np.ndarray]  # parameter -> a number per entry, an index into a list of colours


def small() -> tuple[Any, list[Group]]:
    """The small Llama and its groups, neurons first."""
    model = tiny("llama", **SMALL)
    return model, sorted(find_groups(model), key=lambda g: g.kind != "neurons")


def owners(model: Any, groups: Sequence[Group]) -> Colours:
    """Which unit owns each entry: 1 + its number, 0 for none."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    found = {s.param: np.zeros(shapes[s.param], int) for g in groups for s in g.slices}
    for g in groups:
        for unit in range(g.size):
            for s in g.slices:
                at = positions(s, torch.tensor([unit])).numpy()
                np.moveaxis(found[s.param], s.dim, 0)[at] = 1 + unit
    return found


def grid(axes: Any, entries: np.ndarray, colours: Sequence[str], title: str) -> None:
    """A matrix, a square for each entry."""
    picture = ListedColormap(list(colours))
    axes.pcolormesh(
        entries[::-1], cmap=picture, vmin=0, vmax=len(colours) - 1,
        edgecolors=COLOUR["paper"], linewidth=0.8,
    )  # fmt: skip
    axes.set_title(title)
    axes.set_aspect("equal")
    axes.axis("off")


def matrices(row: Any, found: Colours, names: Sequence[str], colours: Sequence[str]) -> None:
    """The matrices of a layer side by side, all with room for the tallest."""
    most = max(m.shape[0] for m in found.values())
    for axes, name in zip(row, names, strict=True):
        entries = found[name]
        size = " \u00d7 ".join(map(str, entries.shape))
        grid(axes, entries, colours, f"{name.split('.')[-2]}\n{size}")
        axes.set_ylim(entries.shape[0] - most, entries.shape[0])
        axes.set_xlim(0, max(m.shape[1] for m in found.values()))


def unit() -> Figure:
    """What one neuron and one head own, in all matrices of a layer."""
    model, groups = small()
    figure, axes = sheet(3.4, nrows=2, ncols=4)
    for row, group, chosen in zip(axes, groups, (2, 1), strict=True):
        found = {name: (m == 1 + chosen).astype(int) for name, m in owners(model, [group]).items()}
        names = list(found)
        matrices(row[: len(names)], found, names, [NEITHER, COLOUR["accent"]])
        for left in row[len(names) :]:
            left.axis("off")
        row[0].annotate(
            f"{group.kind[:-1]} {chosen}", (-0.12, 0.35), xycoords="axes fraction", rotation=90,
            ha="right", va="center", color=COLOUR["muted"],
        )  # fmt: skip
    return figure


def group() -> Figure:
    """Both groups of a layer: a colour for each unit."""
    model, groups = small()
    figure, axes = sheet(3.4, nrows=2, ncols=4)
    for row, one in zip(axes, groups, strict=True):
        found = owners(model, [one])
        matrices(row[: len(found)], found, list(found), [NEITHER, *SERIES[: one.size]])
        for left in row[len(found) :]:
            left.axis("off")
        row[0].annotate(
            f"{one.size} {one.kind}", (-0.12, 0.35), xycoords="axes fraction", rotation=90,
            ha="right", va="center", color=COLOUR["muted"],
        )  # fmt: skip
    return figure


def keep() -> Figure:
    """Scores of neurons, the decision made of them, and the matrices before and after."""
    model, groups = small()
    neurons = [g for g in groups if g.kind == "neurons"]
    (one,) = neurons
    batches = [torch.randint(3, VOCAB, (4, 32), generator=torch.Generator().manual_seed(0))]
    scores = score(model, neurons, batches)
    decision = select(scores, neurons, sparsity={"neurons": 0.5})[one.name]
    figure, axes = sheet(4.6, nrows=3, ncols=3, height_ratios=(1, 1, 1))
    for spare in axes[0]:
        spare.remove()
    bars = figure.add_subplot(axes[0, 0].get_gridspec()[0, :])
    fill = [SERIES[u] if decision[u] else GONE for u in range(one.size)]
    edge = [SERIES[u] if decision[u] else COLOUR["muted"] for u in range(one.size)]
    bars.bar(range(one.size), scores[one.name].numpy(), color=fill, edgecolor=edge, linewidth=1)
    bars.set_title("score of each neuron, nats; empty: removed")
    bars.set_xticks(range(one.size))
    bars.set_yticks([])
    bars.grid(False)
    whole = owners(model, neurons)
    matrices(axes[1], {n: np.where(decided(m, decision), m, 0) for n, m in whole.items()},
             list(whole), [NEITHER, *SERIES[: one.size]])  # fmt: skip
    less = copy.deepcopy(model)
    remove(less, groups, {**keep_all(groups), one.name: decision})
    left = decision.nonzero().flatten().tolist()
    after = owners(less, [g for g in find_groups(less) if g.kind == "neurons"])
    after = {n: np.array([0, *(1 + u for u in left)])[m] for n, m in after.items()}
    matrices(axes[2], after, list(after), [NEITHER, *SERIES[: one.size]])
    for axes_of, title in ((axes[1, 0], "before"), (axes[2, 0], "after")):
        axes_of.annotate(
            title, (-0.12, 0.35), xycoords="axes fraction", rotation=90, ha="right",
            va="center", color=COLOUR["muted"],
        )  # fmt: skip
    return figure


def decided(owner: np.ndarray, decision: torch.Tensor) -> np.ndarray:
    """For each entry, whether its owner stays."""
    stays: np.ndarray = np.array([True, *decision.tolist()])[owner]
    return stays


def missed(model: Any, groups: Sequence[Group], decision: Keep, damping: float) -> float:
    """The mean share of the outputs of the readers that the smaller layers do not give."""
    less = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(3, VOCAB, (8, 48), generator=generator) for _ in range(4)]
    errors = refit_and_remove(
        less, groups, decision, batches, damping=damping, sequential=False
    ).errors
    return sum(errors.values()) / len(errors)


def refit() -> Figure:
    """What is lost with and without the refit, by the share of the neurons that went."""
    model = tiny("llama")
    neurons = [g for g in find_groups(model) if g.kind == "neurons"]
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(3, VOCAB, (8, 48), generator=generator) for _ in range(4)]
    scores = score(model, neurons, batches)
    shares = np.linspace(0.1, 0.9, 9)
    figure, axes = sheet(2.6)
    # The stronger the damping, the less the refit moves the weights: this much leaves them.
    for label, damping, colour in (("cut alone", 1e9, SERIES[1]), ("refitted", 0.01, SERIES[0])):
        lost = [
            missed(model, neurons, select(scores, neurons, sparsity={"neurons": s}), damping)
            for s in shares
        ]
        axes.plot(100 * shares, 100 * np.array(lost), color=colour, marker="o", label=label)
    axes.set_xlabel("neurons removed, %")
    axes.set_title("output of the layer that is missing, % of its squared length")
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def lasso() -> Figure:
    """Norms of units on the way: a proximal step gives zeros, a gradient does not."""
    figure, axes = sheet(2.8, ncols=2, sharey=True)
    for place, proximal in zip(axes, (True, False), strict=True):
        norms = drawn(proximal)
        zeros = int((norms[-1] == 0).sum())
        for unit, line in enumerate(norms.T):
            place.plot(line, color=SERIES[unit % len(SERIES)], linewidth=1.2)
        way = "proximal step" if proximal else "gradient of the penalty"
        place.set_title(f"{way}\n{zeros} of {norms.shape[1]} units are 0 at the end")
        place.set_xlabel("steps")
        place.set_ylim(bottom=0)
    axes[0].set_ylabel("norm of each unit")
    return figure


def drawn(proximal: bool, *, steps: int = 400, units: int = 12, strength: float = 0.04) -> Any:
    """Norms of the units of a small network in training, (steps, units); three units would do."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 4, generator=generator)
    wanted = torch.tanh(x @ torch.randn(4, 3, generator=generator)).sum(1, keepdim=True)
    model = torch.nn.Sequential(
        torch.nn.Linear(4, units, bias=False),
        torch.nn.Tanh(),
        torch.nn.Linear(units, 1, bias=False),
    )
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.5)
    groups = [Group("0", "neurons", units, (Slice("0.weight", 0),), (Slice("2.weight", 1),))]
    params = dict(model.named_parameters())
    weights = unit_weights(groups, params, "one")
    rate, rows = 0.1, []
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - wanted).square().mean().backward()
        if not proximal:
            add_gradient(PENALTIES["group_lasso"], strength, groups, params, weights)
        optimizer.step()
        if proximal:
            proximal_step(groups, params, weights, rate * strength)
        rows.append(unit_norms(groups, params)["0"].detach().numpy().copy())
    return np.array(rows)


PICTURES: dict[str, tuple[Callable[[], Figure], str]] = {
    "unit": (unit, "The entries that one neuron and one head own in the matrices of a layer"),
    "group": (group, "The same matrices, a colour for each unit of the two groups"),
    "keep": (keep, "Scores, the decision, and the matrices before and after the removal"),
    "refit": (refit, "What a layer no longer gives, cut alone and refitted"),
    "lasso": (lasso, "Norms of units in training, with a proximal step and with a gradient"),
}


def draw(folder: Path) -> None:
    """Write every picture into the folder, as SVG."""
    with styled():
        for name, (make, words) in PICTURES.items():
            done = finished(make(), name, title=words, caption="", alt=words)
            (folder / f"{name}.svg").write_text(done.svg, encoding="utf-8")


if __name__ == "__main__":
    draw(ROOT / "docs" / "assets")
