"""What can be removed from each declared architecture, where it loads: docs/architectures.md.

The page is made from the declarations themselves, on small models of every architecture, so that
it cannot say what the code does not. `examples/docs/architectures.py` writes it.
"""

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from . import channels, depth, queries
from .errors import BadInput
from .families import find_groups, refused_kinds
from .gguf_config import ARCHITECTURES
from .to_gguf import PER_LAYER
from .units import KINDS, Kind
from .vocabulary_rows import vocabulary_axes

TITLE = "# Architectures\n"
INTRODUCTION = """
What can be removed from each `model_type`, exactly. Every line obeys the laws of
`tests/test_laws.py` on a small model, with transformers {version}; `tests/test_architectures.py`
removes some of everything at once but layers (`tests/test_depth.py` has those), saves it, and
loads it again in a fresh process, where the logits differ by at most 1e-4 of the largest.

An even cut leaves the same number everywhere. *stock* says that its folder loads with
`AutoModelForCausalLM` where only transformers is installed, *ours* that it takes llm_narrow, as
uneven cuts always do. Where a stock config asks that `num_attention_heads` divides `hidden_size`
(Llama, Gemma 2 and 3, DeepSeek 2), even cuts of heads that break the rule are ours too, but for
Llama's, which are stored as Mistral or Granite. Columns of llama.cpp say which cuts
`llm-narrow export --to gguf` takes; see [export.md](export.md) for the conditions.

Where queries are grouped, a head is a key/value head with its query heads; in multi-query models
it is a query head, and the one key/value head stays. A neuron of experts is the neuron of that
number in every expert of the layer. Of experts at least as many stay as a token is given to.

*query heads*: some of those that share a key and a value, the same number everywhere
(`--query-heads`). *channels*: of the residual stream (`--channels`). *layers*: whole ones
(`--kinds layers`); their halves, attention or MLP, can go everywhere, and are always ours.
*vocabulary*: rows of tokens that the domain does not use (`--kinds vocabulary`).

This page is made by `python examples/docs/architectures.py`. To add an architecture, see
[adding-an-architecture.md](adding-an-architecture.md).
"""
REFUSED = """
## What is refused

These units exist, and what is said here keeps them from being removed exactly:
"""


@dataclass(frozen=True)
class Architecture:
    """A model type, or a form of it that its config makes, and what can be removed from it."""

    name: str
    model_type: str
    stock: Mapping[Kind, bool]  # kinds that can go -> whether an even cut has a stock config
    beside: Mapping[str, bool]  # the same for what goes beside units
    refused: Mapping[str, str]  # kinds of either sort that cannot, with why
    llama_cpp: str


def architecture(name: str, model: Any) -> Architecture:
    """What can be removed from a model. Raises UndeclaredArchitecture."""
    groups = find_groups(model)
    stock = {
        kind: all(g.config is not None for g in groups if g.kind == kind)
        for kind in KINDS
        if any(g.kind == kind for g in groups)
    }
    beside: dict[str, bool] = {}
    refused: dict[str, str] = {str(kind): why for kind, why in refused_kinds(model).items()}
    for what, tried in BESIDE.items():
        try:
            found = tried(copy.deepcopy(model))
        except BadInput as error:
            refused[what] = _reason(str(error))
            continue
        if found is not None:
            beside[what] = found
    c = model.config
    return Architecture(name, c.model_type, stock, beside, refused, _llama_cpp(c))


def _query_heads(model: Any) -> bool | None:
    heads = [g for g in find_groups(model) if g.kind == "heads"]
    if not heads or queries.per_head(model.config) < 2:
        return None  # there are none, or they are what is called heads here
    queries.groups_of(model)
    return True


def _channels(model: Any) -> bool:
    stays = torch.arange(model.config.hidden_size) < model.config.hidden_size // 2
    channels.thin(model, stays)
    return not channels.wide(model.config)


def _layers(model: Any) -> bool:
    depth.remove_layers(model, torch.arange(len(depth.layers_of(model))) > 0)
    return True


def _vocabulary(model: Any) -> bool:
    vocabulary_axes(model)
    return True


# What goes beside units -> whether a stock config has what is left; None where there is none.
BESIDE: Mapping[str, Callable[[Any], bool | None]] = {
    "query heads": _query_heads,
    "channels": _channels,
    "layers": _layers,
    "vocabulary": _vocabulary,
}


def _reason(message: str) -> str:
    """Why, of a message that says that something cannot go and what to do instead."""
    why = message.partition(": ")[2] or message
    return re.sub(r"\. Leave [\w.]+ out\.$", "", why).rstrip(".")


def page(architectures: Sequence[Architecture]) -> str:
    """The page, as Markdown."""
    kinds = [kind for kind in KINDS if any(kind in a.stock for a in architectures)]
    lines = [
        TITLE + INTRODUCTION.format(version=transformers.__version__),
        f"| model type | {' | '.join(f'{kind}, even cut' for kind in kinds)} | "
        f"{' | '.join(BESIDE)} | llama.cpp |",
        f"|{' --- |' * (len(kinds) + len(BESIDE) + 2)}",
    ]
    for a in architectures:
        cells = [_cell(a, kind) for kind in (*kinds, *BESIDE)]
        lines.append(f"| {_name(a)} | {' | '.join(cells)} | {a.llama_cpp} |")
    reasons: dict[tuple[str, str], list[str]] = {}
    for a in architectures:
        for kind, reason in a.refused.items():
            reasons.setdefault((kind, reason), []).append(_name(a))
    lines.append(REFUSED)
    lines += [f"- {kind} of {', '.join(names)}: {why}." for (kind, why), names in reasons.items()]
    return "\n".join(lines) + "\n"


def _name(a: Architecture) -> str:
    form = a.name.removeprefix(a.model_type).removeprefix(", ")
    return f"`{a.model_type}`" + (f" ({form})" if form else "")


def _cell(a: Architecture, kind: str) -> str:
    if kind in a.refused:
        return "refused"
    found: dict[str, bool] = {**{str(k): v for k, v in a.stock.items()}, **a.beside}
    return "" if kind not in found else "stock" if found[kind] else "ours"


def _llama_cpp(config: Any) -> str:
    """Which cuts the export takes. Granite has to have Llama's multipliers."""
    kind = config.model_type
    if kind not in ARCHITECTURES:
        return "no"
    if kind == "granite" and (config.residual_multiplier, config.logits_scaling) != (1, 1):
        return "no"
    if kind == "gpt_neox":
        return "even, neurons only"
    return "even and uneven" if kind in PER_LAYER else "even"
