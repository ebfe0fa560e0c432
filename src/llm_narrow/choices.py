"""How likely a model finds texts after contexts, token for token as lm-evaluation-harness has it.

What multiple-choice accuracy and bits per byte of short texts come from. The rules (Gao et al.,
"The Language Model Evaluation Harness"; version 0.4): white space at the end of a context belongs
to the text; the text's tokens are those of both together after as many as the context has alone;
what is too long for the model is cut from the left; a text without context follows the
beginning-of-text token, else the end-of-text token.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from . import cost
from .cost import evaluating
from .errors import BadInput
from .losses import CHUNK, output_head

LONGEST = 2048  # tokens of a window where the model does not say how many it can read
WORTHWHILE = 16  # tokens that inputs must have in common for these to be read only once

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Pair:
    """A text whose likelihood after the context is wanted."""

    context: str
    text: str


@dataclass(frozen=True)
class Window:
    """What the model reads at once; the last `scored` of the ids are those that count.

    `cut` tokens of the context had no room before them.
    """

    ids: Ids
    scored: int
    cut: int = 0


@dataclass(frozen=True)
class Likelihood:
    """The nats of a text (less is likelier), its tokens, and whether each was the likeliest."""

    nats: float
    tokens: int
    greedy: bool


def positions(model: Any) -> int:
    """How many tokens a window may feed to the model."""
    return cost.positions(model) or LONGEST


def encoded(tokenizer: Any, pair: Pair, most: int) -> list[Window]:
    """The windows that score the text: one, if it is not longer than the model can read.

    Longer ones are scored in windows of `most` tokens, each with as much before it as fits.
    Raises BadInput where no token is the text's own.
    """
    context, text = pair.context.rstrip(), pair.text
    text = pair.context[len(context) :] + text
    before = _beginning(tokenizer)
    if context:
        ids = _ids(tokenizer, context, before)
        own = _ids(tokenizer, context + text, before)[len(ids) :]
    else:
        ids, own = [before], list(tokenizer.encode(text, add_special_tokens=False))
        if own[:1] == ids and len(own) > 1:
            own = own[1:]
    if not own:
        raise BadInput(
            f"{pair.text[:40]!r} after {pair.context[-40:]!r} has no token of its own. Give texts "
            "of at least one character, and contexts that end where a word does."
        )
    both = (*ids, *own)
    if len(own) <= most:
        return [Window(both[-(most + 1) :], len(own), max(0, len(both) - most - 1))]
    cut = len(ids) - 1
    both = both[len(ids) - 1 :]  # the last token before the text, then the text
    ends = [*range(most, len(own), most), len(own)]
    return [
        Window(both[max(0, end - most) : end + 1], end - start, cut)
        for start, end in zip([0, *ends], ends, strict=False)
    ]


def _beginning(tokenizer: Any) -> int:
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise BadInput(
        "The tokenizer has neither a beginning-of-text nor an end-of-text token, which a text "
        "without context follows. Set bos_token in its tokenizer_config.json."
    )


def _ids(tokenizer: Any, text: str, before: int) -> list[int]:
    """With the special tokens that the tokenizer adds, unless the text spells out the first."""
    if text.startswith(tokenizer.decode([before])):
        return list(tokenizer.encode(text, add_special_tokens=False))
    return list(tokenizer.encode(text))


def width(windows: Sequence[Window]) -> int:
    """The tokens that the longest of the windows feeds to the model."""
    return max(len(window.ids) - 1 for window in windows)


def likelihoods(model: Any, found: Sequence[Sequence[Window]]) -> list[Likelihood]:
    """The likelihood of each text from its windows, all in one batch, padded on the right.

    What stands to the right has no effect on a causal model, so that the batch changes nothing
    but the last digits. Equal inputs (one-token answers to one question) are fed once, and so is
    what all inputs begin with (solved examples).
    """
    windows = [window for some in found for window in some]
    nats, hits = _scored(model, windows)
    ends = list(accumulate(map(len, found)))
    return [
        Likelihood(
            math.fsum(nats[start:end]),
            sum(window.scored for window in some),
            all(hits[start:end]),
        )
        for some, start, end in zip(found, [0, *ends], ends, strict=False)
    ]


@torch.inference_mode()
def _scored(model: Any, windows: Sequence[Window]) -> tuple[list[float], list[bool]]:
    """Of each window the nats of what counts, and whether all of it was the likeliest."""
    device = next(model.parameters()).device
    inputs = list(dict.fromkeys(window.ids[:-1] for window in windows))
    rows = {ids: row for row, ids in enumerate(inputs)}
    counted = [
        (rows[w.ids[:-1]], len(w.ids) - 1 - w.scored + at, w.ids[at - w.scored], number)
        for number, w in enumerate(windows)
        for at in range(w.scored)
    ]
    row, place, right, owner = (torch.tensor(column) for column in zip(*counted, strict=True))
    nats = torch.zeros(len(windows), dtype=torch.float64)
    hits = torch.ones(len(windows), dtype=torch.bool)
    with evaluating(model):
        read, head = _apart(model, torch.tensor([inputs[0][:8]], device=device))
        hidden, skipped = _hidden(read, inputs, int(place.min()), device)
        for start in range(0, len(counted), CHUNK):
            piece = slice(start, start + CHUNK)
            at = hidden[row[piece].to(device), (place[piece] - skipped).to(device)]
            logits, own = head(at).float(), right[piece].to(device)
            loss = F.cross_entropy(logits, own, reduction="none").double().cpu()
            nats.index_add_(0, owner[piece], loss)
            missed = (logits.argmax(-1) != own).cpu()
            hits[owner[piece][missed]] = False
    return nats.tolist(), hits.tolist()


def _hidden(
    read: Callable[..., Any], inputs: Sequence[Ids], first: int, device: torch.device
) -> tuple[Tensor, int]:
    """What the model makes of the inputs from a place on, (inputs, width - place, …); the place.

    It is at most `first`, the first that is asked for.
    """
    low, high = min(inputs), max(inputs)  # all others begin with what these two have in common
    pairs = enumerate(zip(low, high, strict=False))
    shared, past = min(next((at for at, (a, b) in pairs if a != b), first), first), None
    if len(inputs) > 1 and shared >= WORTHWHILE:
        past = read(input_ids=torch.tensor([inputs[0][:shared]], device=device), use_cache=True)[1]
    if past is None:
        shared = 0
    else:
        past.batch_repeat_interleave(len(inputs))
    wide = max(map(len, inputs)) - shared
    ids = torch.zeros(len(inputs), wide, dtype=torch.long)
    for row, own in enumerate(inputs):
        ids[row, : len(own) - shared] = torch.tensor(own[shared:])
    given = {} if past is None else {"past_key_values": past}
    return read(input_ids=ids.to(device), use_cache=past is not None, **given)[0], shared


def _apart(model: Any, probe: Tensor) -> tuple[Callable[..., Any], Callable[[Tensor], Tensor]]:
    """The body of a model, to (hidden states, cache), and its head, to logits.

    Logits of whole batches need not be in memory so. Models that do something of their own between
    the two give other logits on the `probe`: of those the body is the whole, and the head nothing.
    """

    def reading(part: Any, name: str) -> Callable[..., Any]:
        def read(**given: Any) -> tuple[Tensor, DynamicCache | None]:
            out = part(**given)
            cache = getattr(out, "past_key_values", None)
            return getattr(out, name), cache if isinstance(cache, DynamicCache) else None

        return read

    try:
        body, head = reading(model.base_model, "last_hidden_state"), output_head(model)
        made = head(body(input_ids=probe, use_cache=False)[0]).float()
        if made.equal(model(input_ids=probe, use_cache=False).logits.float()):
            return body, head
    except (AttributeError, TypeError):
        pass
    return reading(model, "logits"), lambda logits: logits
