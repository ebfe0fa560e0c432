"""What a model is worth on text: loss, bits per byte and accuracy; and all measured, as a row.

Everything counted on text is summed per document first, since documents, not tokens, are what a
bootstrap may resample: tokens of one file are far from independent.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .cost import Size as Size
from .cost import Speed as Speed
from .cost import evaluating, greedy, positions
from .cost import flops_per_token as flops_per_token
from .cost import prefill_flops as prefill_flops
from .cost import size as size
from .cost import speed as speed
from .cost import weight_bytes as weight_bytes
from .errors import BadInput
from .losses import CHUNK, output_head
from .precision import copied
from .progress import Track, silent
from .rows import Estimate as Estimate
from .rows import Row
from .rows import Spread as Spread

if TYPE_CHECKING:
    from .blocks import Blocks

RESAMPLES = 2000
DRAWS = 4_000_000  # drawn at one time: bounds the memory of the bootstrap


@dataclass(frozen=True)
class TokenResults:
    """Per target, which is every position of a block but its first: (blocks, length - 1)."""

    nats: Tensor  # float32, cross-entropy
    hits: Tensor  # bool, whether the likeliest token was the right one


@dataclass(frozen=True)
class DocumentSums:
    """Sums over the targets of each document, (documents,) float64; separators are no targets."""

    documents: Tensor  # int64, which documents
    tokens: Tensor
    bytes: Tensor
    nats: Tensor
    hits: Tensor


@dataclass(frozen=True)
class Quality:
    """How well a model predicts text: nats per token, bits per UTF-8 byte, top-1 accuracy."""

    tokens: int
    documents: int
    loss: Estimate
    bits_per_byte: Estimate
    accuracy: Estimate


@torch.inference_mode()
def token_results(
    model: Any,
    blocks: "Blocks",
    *,
    batch_size: int = 4,
    bf16: bool = False,
    track: Track = silent,
) -> TokenResults:
    """Cross-entropy and hit of every target, without the logits of a whole batch in memory.

    `bf16` runs a copy of the model in bfloat16 (about three times as fast on CPUs that know it);
    the log-softmax is always float32.
    """
    if bf16:
        model = copied(model, torch.bfloat16)
    device = next(model.parameters()).device
    batches = blocks.batches(batch_size)
    nats, hits = [], []
    with evaluating(model):
        pieces = _pieces_of(model, blocks.tokens[:1, :8].long().to(device))
        total = math.ceil(len(blocks.tokens) / batch_size)
        for batch in track(batches, "measuring", total):
            tokens = batch.to(device)
            targets = tokens[:, 1:].flatten()
            at = 0
            for logits in pieces(tokens):
                right = targets[at : at + len(logits)]
                nats.append(F.cross_entropy(logits.float(), right, reduction="none").cpu())
                hits.append((logits.argmax(-1) == right).cpu())
                at += len(logits)
    shape = (len(blocks.tokens), blocks.tokens.shape[1] - 1)
    return TokenResults(torch.cat(nats).reshape(shape), torch.cat(hits).reshape(shape))


def document_sums(
    model: Any,
    blocks: "Blocks",
    *,
    batch_size: int = 4,
    bf16: bool = False,
    track: Track = silent,
) -> DocumentSums:
    """Measure the model on the blocks and add up by document."""
    results = token_results(model, blocks, batch_size=batch_size, bf16=bf16, track=track)
    return sums_of(results, blocks)


def sums_of(results: TokenResults, blocks: "Blocks") -> DocumentSums:
    """Add up by document. Raises BadInput if the blocks hold no target at all."""
    target = ~_separators(blocks)[:, 1:]
    owner = blocks.documents[:, 1:][target].long()
    if not len(owner):
        raise BadInput("The blocks hold nothing but separators: give the domain some text.")
    documents, index = torch.unique(owner, return_inverse=True)

    def add(values: Tensor) -> Tensor:
        zeros = torch.zeros(len(documents), dtype=torch.float64)
        return zeros.index_add_(0, index, values[target].double())

    return DocumentSums(
        documents,
        tokens=add(torch.ones_like(results.nats)),
        bytes=add(blocks.sizes[:, 1:]),
        nats=add(results.nats),
        hits=add(results.hits),
    )


def quality(
    model: Any,
    blocks: "Blocks",
    *,
    batch_size: int = 4,
    bf16: bool = False,
    track: Track = silent,
    seed: int = 0,
) -> Quality:
    """Measure the model on the blocks."""
    sums = document_sums(model, blocks, batch_size=batch_size, bf16=bf16, track=track)
    return quality_of(sums, seed=seed)


def quality_of(sums: DocumentSums, *, seed: int = 0) -> Quality:
    """The ratios of sums, each with its interval."""
    n = len(sums.documents)

    def ratio(top: Tensor, bottom: Tensor) -> Estimate:
        return bootstrap(torch.stack([top, bottom], 1), lambda s: s[..., 0] / s[..., 1], seed=seed)

    return Quality(
        tokens=int(sums.tokens.sum()),
        documents=n,
        loss=ratio(sums.nats, sums.tokens),
        bits_per_byte=ratio(sums.nats / math.log(2), sums.bytes),
        accuracy=ratio(sums.hits, sums.tokens),
    )


def difference(first: DocumentSums, second: DocumentSums, *, seed: int = 0) -> Estimate:
    """Nats per token of `second` less those of `first`, on the same tokens, documents paired.

    Raises BadInput if the two were not measured on the same tokens.
    """
    _same_documents(first, second)
    if not first.tokens.equal(second.tokens):
        raise BadInput(
            "Nats per token cannot be compared between tokenizers, which cut the same documents "
            "into different tokens. Compare bits per byte instead."
        )
    sums = torch.stack([first.nats, second.nats, first.tokens], 1)
    return bootstrap(sums, lambda s: (s[..., 1] - s[..., 0]) / s[..., 2], seed=seed)


def bits_per_byte_ratio(first: DocumentSums, second: DocumentSums, *, seed: int = 0) -> Estimate:
    """Bits per byte of `second` ÷ those of `first`, documents paired; any two tokenizers."""
    _same_documents(first, second)
    sums = torch.stack([first.nats, first.bytes, second.nats, second.bytes], 1)
    return bootstrap(sums, lambda s: s[..., 2] / s[..., 3] / (s[..., 0] / s[..., 1]), seed=seed)


def bootstrap(
    sums: Tensor,
    statistic: Callable[[Tensor], Tensor],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Estimate:
    """The statistic of summed documents with its 95 % percentile interval.

    `sums` is (documents, k); `statistic` maps (…, k) to (…). Documents are drawn with replacement:
    how often each is drawn is a multinomial row, so a resample is one row of a matrix product.
    The same seed and number of documents give the same draws, which is what pairs two models.
    """
    n = len(sums)
    generator = torch.Generator().manual_seed(seed)
    values = []
    most = max(1, DRAWS // n)
    for start in range(0, resamples, most):
        rows = min(most, resamples - start)
        drawn = torch.randint(n, (rows, n), generator=generator)
        weights = torch.zeros(rows, n, dtype=torch.float64)
        weights.scatter_add_(1, drawn, torch.ones_like(weights))
        values.append(statistic(weights @ sums))
    levels = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = torch.cat(values).quantile(levels).tolist()
    return Estimate(float(statistic(sums.sum(0))), low, high)


def _separators(blocks: "Blocks") -> Tensor:
    """Which tokens end a document or belong to none (document -1), (blocks, length) bool.

    A token without bytes may also be a part of a character, so the separator is known by standing
    before another document. Only if no block shows that is any last token without bytes taken for
    one.
    """
    empty = blocks.sizes == 0
    ends = empty.clone()
    ends[:, :-1] &= blocks.documents[:, 1:] != blocks.documents[:, :-1]
    known = blocks.tokens[:, :-1][ends[:, :-1]]
    ends = empty & torch.isin(blocks.tokens, known) if len(known) else ends
    return ends | (blocks.documents < 0)


def _same_documents(first: DocumentSums, second: DocumentSums) -> None:
    if not first.documents.equal(second.documents):
        raise BadInput(
            f"Two models can be compared on the same documents only, got {len(first.documents)} "
            f"and {len(second.documents)} that differ. Measure both on the same blocks."
        )


def _pieces_of(model: Any, probe: Tensor) -> Callable[[Tensor], Iterator[Tensor]]:
    """From (batch, length) tokens to the logits of their targets, CHUNK positions at a time.

    That takes the output head apart from the body. Models that do something of their own between
    the two give other logits on the `probe`; those run whole, a block at a time.
    """

    def whole(tokens: Tensor) -> Iterator[Tensor]:
        for block in tokens:
            yield model(input_ids=block[None], use_cache=False).logits[0, :-1]

    def apart(tokens: Tensor) -> Iterator[Tensor]:
        hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        flat = hidden[:, :-1].flatten(0, 1)
        for start in range(0, len(flat), CHUNK):
            yield head(flat[start : start + CHUNK])

    try:
        head = output_head(model)
        hidden = model.base_model(input_ids=probe, use_cache=False).last_hidden_state
        same = head(hidden).float().equal(model(input_ids=probe, use_cache=False).logits.float())
    except (AttributeError, TypeError):
        same = False
    return apart if same else whole


@torch.inference_mode()
def complete(model: Any, tokenizer: Any, prompt: str, *, new_tokens: int = 64) -> str:
    """What the model writes after the prompt, greedily, up to its end-of-text token.

    Raises BadInput for a prompt without tokens, which leaves nothing to continue.
    """
    ids = list(tokenizer(prompt)["input_ids"])
    if not ids:
        raise BadInput(f"The prompt {prompt!r} has no tokens: give it at least one character.")
    most = positions(model)
    if most is not None:
        if len(ids) >= most:
            raise BadInput(
                f"The prompt has {len(ids)} tokens, and the model only {most} positions. "
                "Give a shorter prompt."
            )
        new_tokens = min(new_tokens, most - len(ids))
    stop = stop_tokens(model, tokenizer)
    device = next(model.parameters()).device
    written: list[int] = []
    with evaluating(model):
        steps = greedy(model, torch.tensor([ids], device=device))
        for _ in range(new_tokens):
            token = int(next(steps))
            if token in stop:
                break
            written.append(token)
    # Decoded together with the prompt: some tokenizers drop the first space of what stands alone.
    before = tokenizer.decode(ids, skip_special_tokens=True)
    text: str = tokenizer.decode(ids + written, skip_special_tokens=True)
    if text.startswith(before):
        return text[len(before) :]
    return str(tokenizer.decode(written, skip_special_tokens=True))


def stop_tokens(model: Any, tokenizer: Any) -> set[int]:
    """The ids of all tokens that end a text."""
    stop: set[int] = set()
    for owner in (getattr(model, "generation_config", None), model.config, tokenizer):
        found = getattr(owner, "eos_token_id", None)
        if found is not None:
            stop.update(found if isinstance(found, list | tuple) else [found])
    return stop


def row(
    label: str,
    model: Any,
    sums: DocumentSums,
    *,
    name: str,
    sha256: str,
    domain: str,
    part: str,
    first: DocumentSums | None = None,
    folder: Path | None = None,
    timed: Speed | None = None,
    prompt_tokens: int = 512,
    seconds: float | None = None,
    seed: int = 0,
) -> Row:
    """Everything measured of one model as a row; `first` are the sums to compare it with.

    Between tokenizers there is a ratio of bits per byte but no difference of losses, and neither
    where the blocks hold other documents, as those that two tokenizers packed often do.
    """
    q = quality_of(sums, seed=seed)
    s = size(model)
    if first is not None and not first.documents.equal(sums.documents):
        first = None
    same_tokens = first is not None and first.tokens.equal(sums.tokens)
    return Row(
        label=label, model=name, sha256=sha256, domain=domain, part=part,
        tokens=q.tokens, documents=q.documents,
        loss=q.loss, bits_per_byte=q.bits_per_byte, accuracy=q.accuracy,
        parameters=s.parameters, parameters_without_embeddings=s.without_embeddings,
        bytes=None if folder is None else weight_bytes(folder),
        loss_difference=difference(first, sums, seed=seed) if first and same_tokens else None,
        bits_per_byte_ratio=bits_per_byte_ratio(first, sums, seed=seed) if first else None,
        prompt_tokens=prompt_tokens,
        flops=flops_per_token(model, context=prompt_tokens // 2),
        prefill_flops=prefill_flops(model, prompt_tokens),
        prefill=timed.prefill if timed else None, decode=timed.decode if timed else None,
        prefill_ratio=timed.prefill_ratio if timed else None,
        decode_ratio=timed.decode_ratio if timed else None,
        seconds=seconds,
    )
