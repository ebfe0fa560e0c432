"""What a trimmed vocabulary changes in a model, its configs, its blocks and its teacher.

`old_ids`, (new rows,) int64, is the map throughout: the old id of every new row, -1 for a dummy.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from . import blocks as packing
from .blocks import Blocks
from .channels import skeleton
from .errors import BadInput, problems

MAP = "vocabulary.safetensors"
MAP_VERSION = 1
STEP = 64  # by which a model of the same config is made larger, to see what grows
EDGE = 8  # tokens at either end of a stretch that may be replaced one by one
LISTED = ("suppress_tokens", "begin_suppress_tokens")  # ids that are never to be written
NESTED = ("bad_words_ids", "sequence_bias", "forced_decoder_ids")


def new_rows(keep: Tensor, *, multiple: int = 64) -> Tensor:
    """The old ids of the rows that stay, in order, then -1 up to a multiple.

    `keep` is a mask over the old vocabulary. Raises BadInput for a mask that keeps nothing and a
    multiple below 1.
    """
    if multiple < 1:
        raise BadInput(f"The multiple of the vocabulary must be at least 1, got {multiple}.")
    stay = keep.nonzero().flatten()
    if not len(stay):
        raise BadInput("The vocabulary keeps no token. Keep what the domain uses.")
    return F.pad(stay, (0, -len(stay) % multiple), value=-1)


def rows_of(model: Any) -> int:
    """How many tokens the model has rows for."""
    return int(model.get_input_embeddings().weight.shape[0])


def parameters_of_a_row(model: Any) -> int:
    """Parameters that go with one token: of the embedding, and of a head that is not tied to it."""
    named = dict(model.named_parameters())
    entries: int = sum(named[name].numel() for name in vocabulary_axes(model))
    return entries // rows_of(model)


def new_ids(old_ids: Tensor, size: int) -> Tensor:
    """Old id -> new id, (size,) int64, -1 where it is gone."""
    real = old_ids >= 0
    ids = torch.full((size,), -1)
    ids[old_ids[real]] = real.nonzero().flatten()
    return ids


def named_ids(model: Any) -> dict[int, str]:
    """The token ids that config and generation config name, and as what: these have to stay."""
    size = model.get_input_embeddings().weight.shape[0]
    found: dict[int, str] = {}
    for where, owner in _configs(model):
        for key, value in owner.to_dict().items():
            if key.endswith(("_token_id", "_token_ids")):
                for index in value if isinstance(value, list) else [value]:
                    if isinstance(index, int) and 0 <= index < size:
                        found.setdefault(index, f"{key} of {where}")
    return found


@torch.no_grad()
def remove_rows(model: Any, old_ids: Tensor) -> None:
    """Shrink the model in place to the given rows, configs included; -1 makes a row of zeros.

    The logits of the rows that stay are those they were. A dummy row's logit is 0, or the head's
    bias of 0. Raises BadInput for ids out of range, a token that a config names and that would go,
    and a model with parameters of the vocabulary's size that are not rows.
    """
    size = model.get_input_embeddings().weight.shape[0]
    _check(model, old_ids, size)
    axes = vocabulary_axes(model)
    parameters = dict(model.named_parameters())
    for name, dim in axes.items():
        owner_name, _, leaf = name.rpartition(".")
        owner, old = model.get_submodule(owner_name), parameters[name]
        rows = old.index_select(dim, old_ids.clamp(min=0).to(old.device))
        dummies = (old_ids < 0).nonzero().flatten().to(old.device)
        setattr(owner, leaf, nn.Parameter(rows.index_fill_(dim, dummies, 0), old.requires_grad))
    model.tie_weights()
    ids = new_ids(old_ids, size)
    embedding = model.get_input_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.num_embeddings = module.weight.shape[0]
        if isinstance(module, nn.Linear):
            module.out_features = module.weight.shape[0]
        if getattr(module, "vocab_size", None) == size:
            module.vocab_size = len(old_ids)
        padding = getattr(module, "padding_idx", None)
        if isinstance(padding, int) and (module is embedding or not hasattr(module, "weight")):
            module.padding_idx = _renamed(padding, ids)
    model.config.vocab_size = len(old_ids)
    for _, owner in _configs(model):
        _rename(owner, ids)


def vocabulary_axes(model: Any) -> dict[str, int]:
    """The parameters with an axis over the vocabulary, and which: embeddings, head, its bias.

    Found by making the model's config larger, so by no rule of any architecture. A tied head is
    told as the embedding that it is. Raises BadInput where something else grows with it.
    """
    before, after = (_shapes(model.config, more) for more in (0, STEP))
    own = dict(model.named_parameters())
    axes, wrong = {}, []
    for name, shape in before.items():
        grown = [d for d, n in enumerate(shape) if after[name][d] != n]
        if not grown:
            continue
        if name not in own or len(grown) > 1 or after[name][grown[0]] - shape[grown[0]] != STEP:
            wrong.append(f"{name} changes with it in a way of its own; leave the vocabulary whole")
        else:
            axes[name] = grown[0]
    if wrong or not axes:
        raise problems(
            f"The vocabulary of a {model.config.model_type} cannot be trimmed",
            wrong or ["no parameter has rows for its tokens; leave it whole"],
        )
    return axes


def _shapes(config: Any, more: int) -> dict[str, tuple[int, ...]]:
    config = copy.deepcopy(config)
    config.vocab_size += more
    with torch.device("meta"):
        model = skeleton(config)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    return shapes | {name: tuple(b.shape) for name, b in model.named_buffers()}


def _check(model: Any, old_ids: Tensor, size: int) -> None:
    found = []
    real = old_ids[old_ids >= 0]
    if len(outside := real[real >= size]):
        found.append(
            f"row {int(outside[0])} is out of range: the model has {size}; keep rows it has"
        )
    if len(real) != len(real.unique()):
        found.append("a row is kept twice; name each once")
    if not found:
        stay = new_ids(old_ids, size)
        found = [
            f"token {index} is the {role} and has to stay; keep it"
            for index, role in sorted(named_ids(model).items())
            if stay[index] < 0
        ]
    if found:
        raise problems("The vocabulary to keep", found)


def _configs(model: Any) -> Iterator[tuple[str, Any]]:
    yield "config.json", model.config
    if getattr(model, "generation_config", None) is not None:
        yield "generation_config.json", model.generation_config


def _renamed(index: int, ids: Tensor) -> int | None:
    """The new id, None for one that is gone or never was a row (-1, 50256 of a default config)."""
    new = int(ids[index]) if 0 <= index < len(ids) else -1
    return new if new >= 0 else None


def _rename(owner: Any, ids: Tensor) -> None:
    """Put new ids for the old ones into a config. What names a token that is gone goes too."""

    def known(indices: Iterable[int]) -> list[int]:
        return [new for i in indices if (new := _renamed(i, ids)) is not None]

    for key, value in owner.to_dict().items():
        if value is None or isinstance(value, bool):
            continue
        if key.endswith(("_token_id", "_token_ids")) or key in LISTED:
            new: Any = known(value) or None if isinstance(value, list) else _renamed(value, ids)
        elif key in NESTED:
            new = [part for one in value if (part := _sequence(key, one, ids)) is not None] or None
        else:
            continue
        setattr(owner, key, new)


def _sequence(key: str, one: Any, ids: Tensor) -> Any:
    """One entry of a list of sequences; None if a token of it is gone, so that it cannot occur."""
    named = {"bad_words_ids": one, "sequence_bias": one[0], "forced_decoder_ids": one[1:]}[key]
    new = [_renamed(index, ids) for index in named]
    if None in new:
        return None
    return {
        "bad_words_ids": new, "sequence_bias": [new, one[-1]], "forced_decoder_ids": [one[0], *new]
    }[key]  # fmt: skip


def write_map(path: Path, old_ids: Tensor, size: int) -> None:
    """Save the map of a vocabulary that had `size` rows."""
    about = {"format": "llm-narrow vocabulary", "version": str(MAP_VERSION), "size": str(size)}
    save_file({"old_ids": old_ids.long().contiguous()}, path, about)


def read_map(path: Path) -> tuple[Tensor, int]:
    """What `write_map` wrote: the map and how many rows there were. BadInput if it is not one."""
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            if about.get("version") != str(MAP_VERSION):
                raise ValueError(f"version {about.get('version')}, not {MAP_VERSION}")
            old_ids, size = file.get_tensor("old_ids"), int(about["size"])
    except FileNotFoundError:
        raise BadInput(f"{path} is missing. Take the whole folder.") from None
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise BadInput(
            f"{path} is no map of a trimmed vocabulary ({error}). Copy or make it again."
        ) from error
    return old_ids, size


def teacher_tokens(tokens: Tensor, old_ids: Tensor) -> Tensor:
    """The student's tokens as the whole teacher reads them: each is one of its own as well."""
    return old_ids.to(tokens.device)[tokens]


def teacher_columns(taught: Tensor, old_ids: Tensor) -> Tensor:
    """The teacher's logits (…, old) for the tokens that the student has, (…, kept).

    A softmax over them is the teacher's distribution, given that it says a token that stayed.
    """
    return taught.index_select(-1, old_ids[old_ids >= 0].to(taught.device))


def column_divergence(
    logits: Tensor, taught: Tensor, old_ids: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """KL(teacher over the kept columns || student), both softened, summed over positions, ().

    `logits` (positions, new) are the student's, `taught` (positions, old) the whole teacher's.
    Dummy rows have no share in the teacher's mass, so learning takes the student's from them.
    """
    wanted = F.log_softmax(teacher_columns(taught, old_ids).float() / temperature, -1)
    real = (old_ids >= 0).to(logits.device)
    got = F.log_softmax(logits.float() / temperature, -1)[..., real]
    return F.kl_div(got, wanted, reduction="sum", log_target=True)


def translated(
    blocks: Blocks, old: Any, new: Any, ids: Tensor, *, longest: int | None = None
) -> Blocks:
    """The same text, block by block, in the tokens of a trimmed tokenizer; `ids` as of `trimmed`.

    Where a document's stretch of a block has kept tokens only, it keeps them. Any other is encoded
    anew, as the trimmed tokenizer reads it in use, but for at most EDGE tokens at its ends, where
    the block cuts a character or a word: these are replaced one by one. Every block has the bytes
    that it had, in more tokens, so shorter ones are filled up with separators of document -1.

    Raises BadInput where a block gets longer than `longest`, the positions of the model.
    """
    stretches = [
        _Stretch(row, int(owner), *(c[own].tolist() for c in (tokens, sizes)))
        for row, (tokens, sizes, documents) in enumerate(
            zip(blocks.tokens, blocks.sizes, blocks.documents, strict=True)
        )
        for owner in documents.unique_consecutive()
        for own in [(documents == owner).nonzero().flatten()]
    ]
    rows: list[list[tuple[int, int, int]]] = [[] for _ in blocks.tokens]
    for stretch, found in zip(stretches, _translated(stretches, old, new, ids), strict=True):
        rows[stretch.row].extend((*entry, stretch.document) for entry in found)
    length = max(map(len, rows))
    if longest is not None and length > longest:
        raise BadInput(
            f"Blocks of {blocks.tokens.shape[1]} tokens take up to {length} of the trimmed "
            f"vocabulary, and the model has {longest} positions. Ask for shorter blocks (--length)."
        )
    fill = (int(ids[old.eos_token_id]), 0, -1)
    table = torch.tensor([row + [fill] * (length - len(row)) for row in rows], dtype=torch.int32)
    tokens, sizes, documents = (column.contiguous() for column in table.unbind(-1))
    if sizes.max() < 2**15:
        sizes = sizes.short()
    return Blocks(tokens, sizes, documents, packing.hashed(tokens))


@dataclass(frozen=True)
class _Stretch:
    """What a block holds of one document."""

    row: int
    document: int
    tokens: list[int]
    sizes: list[int]


Sized = list[tuple[int, int]]  # tokens with the bytes that each adds


def _translated(stretches: Sequence[_Stretch], old: Any, new: Any, ids: Tensor) -> Iterator[Sized]:
    """The new tokens of each stretch, of as many bytes as it had."""
    reader, writer = _plain(old), _plain(new)
    added = reader.get_added_tokens_decoder()

    def alone(tokens: Iterable[int], sizes: Iterable[int]) -> Sized:
        """Each token for itself; where it is gone, the bytes go to the last of its parts."""
        found: Sized = []
        for token, size in zip(tokens, sizes, strict=True):
            if (kept := int(ids[token])) >= 0:
                parts = [kept]
            elif token in added:
                parts = writer.encode(added[token].content, add_special_tokens=False).ids
            else:
                parts = [part.id for part in writer.model.tokenize(reader.id_to_token(token))]
            found += zip(parts, [0] * (len(parts) - 1) + [size], strict=bool(parts))
        return found

    ended = [s.tokens[-1] == old.eos_token_id and s.sizes[-1] == 0 for s in stretches]
    texts, spans = [], []
    for s, end in zip(stretches, ended, strict=True):
        whole = int(ids[s.tokens].min()) >= 0
        span = (0, 0) if whole else _readable(reader, s.tokens[: -1 if end else None])
        spans.append(span)
        texts.append(reader.decode(s.tokens[slice(*span)], skip_special_tokens=False))
    encoded = packing.tokenised(texts, new)
    for s, (first, last), end, own in zip(stretches, spans, ended, encoded, strict=True):
        total = sum(s.sizes[first:last])
        inner = zip(own.ids.tolist(), _fitted(own.sizes.tolist(), total), strict=True)
        found = alone(s.tokens[:first], s.sizes[:first])
        found += inner if last > first else ()
        found += alone(s.tokens[last:], s.sizes[last:])
        if not end:
            # A token without bytes before another document would be taken for a separator.
            sizes = _fitted([size for _, size in found], sum(s.sizes), least=1)
            found = [(token, size) for (token, _), size in zip(found, sizes, strict=True)]
        yield found


def _plain(tokenizer: Any) -> Tokenizer:
    """A copy that reads as blocks are packed: special tokens that a text spells out are text."""
    own = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    own.no_truncation()
    own.no_padding()
    own.encode_special_tokens = True
    return own


def _readable(reader: Tokenizer, tokens: list[int]) -> tuple[int, int]:
    """The longest span, short of EDGE tokens at either end, whose text gives its tokens again."""
    cuts = [(first, last) for first in range(EDGE + 1) for last in range(EDGE + 1)]
    for first, last in sorted(cuts, key=sum):
        inner = tokens[first : len(tokens) - last]
        text = reader.decode(inner, skip_special_tokens=False)
        if reader.encode(text, add_special_tokens=False).ids == inner:
            return first, first + len(inner)
    return 0, 0


def _fitted(sizes: list[int], total: int, least: int = 0) -> list[int]:
    """The sizes with the total, none below 0 and the last not below `least`, taken from the end."""
    fitted, missing = list(sizes), total - sum(sizes)
    for at in reversed(range(len(fitted))):
        low = min(least, total) if at == len(fitted) - 1 else 0
        fitted[at], missing = max(low, fitted[at] + missing), min(0, fitted[at] + missing - low)
    return fitted
