"""What a model costs: parameters, bytes on disk, operations per token, and tokens per second."""

import contextlib
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import BadInput
from .families import FAMILIES, find_groups
from .progress import Track, silent
from .rows import Spread

NOT_WEIGHTS = {"keep.safetensors", "scores.safetensors", "training_args.bin"}


@dataclass(frozen=True)
class Speed:
    """Medians in tokens per second, and the ratios to the model timed first in the same rounds."""

    prefill: float
    decode: float
    prefill_ratio: Spread
    decode_ratio: Spread


@dataclass(frozen=True)
class Size:
    """Parameters, tied ones counted once, with and without input and output embeddings."""

    parameters: int
    without_embeddings: int


def size(model: nn.Module) -> Size:
    """Count the parameters of the model."""
    every = {id(p): p.numel() for p in model.parameters()}
    embeddings = {id(p) for m in _embeddings(model) for p in m.parameters()}
    outside = sum(n for i, n in every.items() if i not in embeddings)
    return Size(sum(every.values()), outside)


def weight_bytes(folder: Path) -> int:
    """Bytes on disk of the weight files of a checkpoint folder, in the one format it is read from.

    Raises BadInput if there are none.
    """
    for pattern in ("*.safetensors", "*.gguf", "*.bin"):
        files = [f for f in folder.glob(pattern) if f.name not in NOT_WEIGHTS]
        if files:
            return sum(f.stat().st_size for f in files)
    raise BadInput(f"{folder} holds no weight files (*.safetensors, *.gguf or *.bin).")


def flops_per_token(model: Any, *, context: int = 256) -> float:
    """Floating-point operations of one token that looks back at `context` tokens.

    Two per entry of every matrix it is multiplied with, the output head among them, of experts
    those that a token is given to; and two per context token and channel of the queries and of the
    values. Sliding windows are counted as if they were longer than the context.
    """
    return _body_flops(model, context) + _head_flops(model)


def prefill_flops(model: Any, prompt_tokens: int) -> float:
    """The same for a whole prompt, of which only the last token needs the output head."""
    return prompt_tokens * _body_flops(model, (prompt_tokens + 1) / 2) + _head_flops(model)


def _body_flops(model: Any, context: float) -> float:
    """Of matrices, and of those of experts (expert, …) the share that a token is given to."""
    skip = {id(m) for m in _embeddings(model)}
    given = experts_per_token(model)
    multiplied = 0.0
    for m in model.modules():
        for p in m.parameters(recurse=False) if id(m) not in skip and is_matrix(m) else ():
            if p.dim() == 2:
                multiplied += p.numel()
            elif p.dim() == 3:
                multiplied += p.numel() * min(given, p.shape[0]) / p.shape[0]
    return 2.0 * multiplied + 2.0 * context * _attention_width(model)


def is_matrix(module: nn.Module) -> bool:
    """Whether what a token is, is multiplied with the module's weights: linear layers, experts."""
    name = type(module).__name__
    return isinstance(module, nn.Linear) or name.endswith(("Conv1D", "Router", "Experts"))


def experts_per_token(model: Any) -> int:
    """How many experts a token is given to; 1 where there are none."""
    return getattr(getattr(model, "config", None), "num_experts_per_tok", None) or 1


def _head_flops(model: Any) -> float:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return 0.0 if head is None else 2.0 * head.weight.numel()


def _attention_width(model: Any) -> float:
    """Channels of all queries and of all that is summed, of all layers, as they are now.

    Whatever config.json says, but where heads cannot be removed.
    """
    if not hasattr(model, "config"):
        return 0
    c = model.config
    groups = find_groups(model) if c.model_type in FAMILIES else []
    reads = {s.param: s.dim for g in groups if g.kind == "heads" for s in g.reads}
    summed: int = sum(model.get_parameter(param).shape[dim] for param, dim in reads.items())
    layers: int = c.num_hidden_layers
    return channels_times(c) * summed if reads else 2.0 * layers * fixed_width(c)


def channels_times(config: Any) -> float:
    """Channels of queries and values together, for each channel of values: 2, but in DeepSeek."""
    value = getattr(config, "v_head_dim", None)
    if not value or not hasattr(config, "qk_nope_head_dim"):
        return 2.0
    return 1.0 + float(config.qk_nope_head_dim + config.qk_rope_head_dim) / float(value)


def fixed_width(config: Any) -> int:
    """Channels of the query heads of one layer, as the config has them."""
    heads = getattr(config, "num_attention_heads", 0)
    return int(heads * (getattr(config, "head_dim", None) or config.hidden_size // max(heads, 1)))


def positions(model: Any) -> int | None:
    """How many positions the model has; None where any number will do."""
    names = ("max_position_embeddings", "max_seq_len")  # the second is MPT's
    found = [n for name in names if (n := getattr(model.config, name, None)) is not None]
    return int(min(found)) if found else None


def _embeddings(model: Any) -> list[nn.Module]:
    found: list[nn.Module] = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return [*found, head] if head is not None else found


def speed(
    models: Mapping[str, Any],
    *,
    prompt_tokens: int = 512,
    new_tokens: int = 32,
    repeats: int = 5,
    batch: int = 1,
    seed: int = 0,
    track: Track = silent,
) -> dict[str, Speed]:
    """Time the models side by side, in turns (A B A B …), after one untimed turn each.

    Each turn reads a random prompt of (batch, prompt_tokens) and decodes exactly `new_tokens`
    greedily with the cache, whatever they are. Turns rather than one model after the other:
    what else the machine does then weighs on all alike. Raises BadInput if a model has too few
    positions.
    """
    for name, model in models.items():
        most = positions(model)
        if most is not None and prompt_tokens + new_tokens > most:
            raise BadInput(
                f"{name} has {most} positions, fewer than prompt_tokens + new_tokens = "
                f"{prompt_tokens + new_tokens}. Ask for a shorter prompt."
            )
    prompts = {
        name: torch.randint(
            model.config.vocab_size,
            (batch, prompt_tokens),
            generator=torch.Generator().manual_seed(seed),
        )
        for name, model in models.items()
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for turn in track(range(repeats + 1), "timing", repeats + 1):
        for name, model in models.items():
            timed = _timed(model, prompts[name], new_tokens)
            if turn:
                seconds[name].append(timed)
    return _speeds(seconds, batch * prompt_tokens, batch * new_tokens)


@torch.inference_mode()
def _timed(model: Any, prompt: Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds of the prefill and of the decoding after it."""
    device = next(model.parameters()).device
    with evaluating(model):
        steps = greedy(model, prompt.to(device))
        start = _clock(device)
        next(steps)
        read = _clock(device)
        for _ in range(new_tokens):
            next(steps)
        return read - start, _clock(device) - read


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def _speeds(
    seconds: Mapping[str, Sequence[tuple[float, float]]], read: int, written: int
) -> dict[str, Speed]:
    """Tokens per second and ratios of the turns' (prefill, decode) seconds, first model first."""
    first = next(iter(seconds.values()))

    def ratio(own: Sequence[tuple[float, float]], which: int) -> Spread:
        pairs = [a[which] / b[which] for a, b in zip(first, own, strict=True)]
        return Spread(statistics.median(pairs), min(pairs), max(pairs))

    return {
        name: Speed(
            prefill=read / statistics.median(s for s, _ in own),
            decode=written / statistics.median(s for _, s in own),
            prefill_ratio=ratio(own, 0),
            decode_ratio=ratio(own, 1),
        )
        for name, own in seconds.items()
    }


def greedy(model: Any, tokens: Tensor) -> Iterator[Tensor]:
    """The likeliest next tokens (batch, 1) of (batch, length), one after the other, for ever.

    Not `generate`: its stopping rules and generation config would be part of what is timed.
    """
    cache = None
    while True:
        out = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        tokens = out.logits[:, -1:].argmax(-1)
        yield tokens


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Dropout off while inside; the mode that the model had comes back."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
