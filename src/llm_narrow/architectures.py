"""What can be removed from each declared architecture, where it loads: docs/architectures.md.

The page is made from the declarations themselves, on small models of every architecture, so that
it cannot say what the code does not. `examples/docs/architectures.py` writes it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import transformers

from .families import find_groups, refused_kinds
from .gguf_config import ARCHITECTURES
from .to_gguf import PER_LAYER
from .units import KINDS, Kind

TITLE = "# Architectures\n"
INTRODUCTION = """
What can be removed from each `model_type`, exactly. Every line obeys the laws of
`tests/test_laws.py` on a small model, with transformers {version}; `tests/test_architectures.py`
removes all its kinds at once, saves it, and loads it again in a fresh process, where the logits
differ by at most 1e-4 of the largest.

An even cut leaves the same number everywhere. *stock* says that its folder loads with
`AutoModelForCausalLM` where only transformers is installed, *ours* that it takes llm_narrow, as
uneven cuts always do. Where a stock config asks that `num_attention_heads` divides `hidden_size`
(Llama, Gemma 2 and 3, DeepSeek 2), even cuts of heads that break the rule are ours too, but for
Llama's, which are stored as Mistral or Granite. Columns of llama.cpp say which cuts
`llm-narrow export --to gguf` takes; see [export.md](export.md) for the conditions.

Where queries are grouped, a head is a key/value head with its query heads; in multi-query models
it is a query head, and the one key/value head stays. A neuron of experts is the neuron of that
number in every expert of the layer. Of experts at least as many stay as a token is given to.

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
    refused: Mapping[Kind, str]  # kinds that cannot, with why
    llama_cpp: str


def architecture(name: str, model: Any) -> Architecture:
    """What can be removed from a model. Raises UndeclaredArchitecture."""
    groups = find_groups(model)
    stock = {
        kind: all(g.config is not None for g in groups if g.kind == kind)
        for kind in KINDS
        if any(g.kind == kind for g in groups)
    }
    c = model.config
    return Architecture(name, c.model_type, stock, refused_kinds(model), _llama_cpp(c))


def page(architectures: Sequence[Architecture]) -> str:
    """The page, as Markdown."""
    kinds = [kind for kind in KINDS if any(kind in a.stock for a in architectures)]
    lines = [
        TITLE + INTRODUCTION.format(version=transformers.__version__),
        f"| model type | {' | '.join(f'{kind}, even cut' for kind in kinds)} | llama.cpp |",
        f"|{' --- |' * (len(kinds) + 2)}",
    ]
    for a in architectures:
        cells = [_cell(a, kind) for kind in kinds]
        lines.append(f"| {_name(a)} | {' | '.join(cells)} | {a.llama_cpp} |")
    reasons: dict[tuple[Kind, str], list[str]] = {}
    for a in architectures:
        for kind, reason in a.refused.items():
            reasons.setdefault((kind, reason), []).append(_name(a))
    lines.append(REFUSED)
    lines += [f"- {kind} of {', '.join(names)}: {why}." for (kind, why), names in reasons.items()]
    return "\n".join(lines) + "\n"


def _name(a: Architecture) -> str:
    form = a.name.removeprefix(a.model_type).removeprefix(", ")
    return f"`{a.model_type}`" + (f" ({form})" if form else "")


def _cell(a: Architecture, kind: Kind) -> str:
    if kind in a.refused:
        return "refused"
    if kind not in a.stock:
        return ""
    return "stock" if a.stock[kind] else "ours"


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
