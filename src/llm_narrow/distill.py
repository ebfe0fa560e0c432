"""Learning from another model's predictions: a loss for `train`, the teacher at hand or cached.

The loss is mix * T^2 * KL(teacher || student) + (1 - mix) * cross-entropy, summed over the targets,
where both distributions are softened by the temperature T (Hinton et al. 2015, arXiv 1503.02531;
T^2 keeps the size of the gradient). Like `language_loss` it never holds the logits of a batch.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from . import processes
from .blocks import Blocks
from .cache import no_space
from .errors import BadInput, problems
from .losses import CHUNK, Loss, chunked_loss, hidden_states, output_head
from .precision import copied
from .progress import Track, silent

SHARD = 16  # blocks per file of a cache


def distill_loss(
    teacher: Any, *, temperature: float = 1.0, mix: float = 0.3, bf16: bool = False
) -> Loss:
    """The loss with the teacher computed beside the student.

    `bf16` computes the teacher on a bfloat16 copy, and needs the given one no longer. Raises
    BadInput for settings out of range and, when called, for a student with another vocabulary.
    """
    _check(temperature, mix)
    teacher = _frozen(teacher, bf16)

    def loss(student: Any, tokens: Tensor) -> Tensor:
        _same_vocabulary(student, _vocabulary(teacher))
        targets = tokens[:, 1:].reshape(-1)
        device = tokens.device.type
        with torch.inference_mode(), torch.autocast(device, enabled=False):
            known = hidden_states(teacher, tokens)
        head = output_head(teacher)

        def piece(logits: Tensor, at: slice) -> Tensor:
            with torch.inference_mode(), torch.autocast(device, enabled=False):
                taught = head(known[at])
            # Divided outside of inference mode, whose tensors cannot be saved for backward.
            wanted = F.log_softmax(taught.float() / temperature, -1)
            logits = logits.float()
            got = F.log_softmax(logits / temperature, -1)
            divergence = F.kl_div(got, wanted, reduction="sum", log_target=True)
            return _mixed(divergence, logits, targets[at], temperature, mix)

        return chunked_loss(student, hidden_states(student, tokens), piece)

    return loss


@dataclass(frozen=True)
class Cached:
    """A teacher's predictions on disk: per target its k likeliest tokens and the mass of the rest.

    Shards of SHARD blocks hold, for each target, `tokens` (blocks, length - 1, k) int32,
    `log_probabilities` (the same) and `rest`, the log of what is left (blocks, length - 1), both
    float32 and at the temperature. That is 8 k + 4 bytes a token.
    """

    folder: Path
    blocks: int
    k: int
    vocabulary: int
    temperature: float
    places: Mapping[bytes, int]  # by the hash of a block's tokens


def cached_teacher(
    teacher: Any,
    blocks: Blocks,
    folder: Path,
    *,
    k: int = 64,
    temperature: float = 1.0,
    name: str = "",
    batch_size: int = 4,
    bf16: bool = False,
    track: Track = silent,
) -> Cached:
    """Write what the teacher predicts on the blocks; what the folder holds already stays.

    `name` says which teacher it is (the hash of its weights): a folder of another teacher, other
    blocks or settings is refused. Raises BadInput for that, for k out of range and a full disk.
    """
    _check(temperature, 1.0)
    vocabulary = _vocabulary(teacher)
    if not 1 <= k <= vocabulary:
        raise BadInput(f"k must be from 1 to {vocabulary}, the vocabulary, got {k}.")
    about = {
        "teacher": name, "blocks": blocks.sha256, "k": k, "temperature": temperature,
        "vocabulary": vocabulary, "bf16": bf16, "shard": SHARD, "batch_size": batch_size,
    }
    _begin(folder, about)
    starts = range(0, len(blocks.tokens), SHARD)
    missing = [s for s in starts if not _whole(folder, s, min(SHARD, len(blocks.tokens) - s))]
    processes.wait()  # none writes before all have looked
    if missing:
        teacher = _frozen(teacher, bf16)
    for start in track(processes.share(missing), "asking the teacher"):
        shard = _predictions(teacher, blocks.tokens[start : start + SHARD], k, temperature,
                             batch_size)  # fmt: skip
        _write(folder, _file(folder, start), shard)
    processes.wait()
    count = len(blocks.tokens)
    places = {_key(tokens): index for index, tokens in enumerate(blocks.tokens)}
    return Cached(folder, count, k, vocabulary, temperature, places)


def cached_distill_loss(cached: Cached, *, mix: float = 0.3) -> Loss:
    """The loss with the teacher from disk, at the temperature it was cached at.

    The divergence is taken between k + 1 outcomes: the teacher's k likeliest tokens and all others
    as one. It is never above the whole one and equal to it at k = vocabulary. Raises BadInput, when
    called, for blocks that were not cached and a student with another vocabulary.
    """
    _check(cached.temperature, mix)
    temperature = cached.temperature
    full = cached.k == cached.vocabulary

    def loss(student: Any, tokens: Tensor) -> Tensor:
        _same_vocabulary(student, cached.vocabulary)
        ids, wanted, rest = (t.to(tokens.device).flatten(0, 1) for t in _read(cached, tokens))
        targets = tokens[:, 1:].reshape(-1)

        def piece(logits: Tensor, at: slice) -> Tensor:
            logits = logits.float()
            soft = logits / temperature
            own = ids[at].long()
            total = soft.logsumexp(-1)
            got = soft.gather(-1, own) - total[:, None]
            divergence = F.kl_div(got, wanted[at], reduction="sum", log_target=True)
            if not full:
                others = soft.scatter(-1, own, -math.inf).logsumexp(-1) - total
                divergence = divergence + F.kl_div(
                    others, rest[at], reduction="sum", log_target=True
                )
            return _mixed(divergence, logits, targets[at], temperature, mix)

        return chunked_loss(student, hidden_states(student, tokens), piece)

    return loss


def _mixed(
    divergence: Tensor, logits: Tensor, targets: Tensor, temperature: float, mix: float
) -> Tensor:
    total = mix * temperature**2 * divergence
    if mix < 1:
        total = total + (1 - mix) * F.cross_entropy(logits, targets, reduction="sum")
    return total


@torch.inference_mode()
def _predictions(
    teacher: Any, blocks: Tensor, k: int, temperature: float, batch_size: int
) -> dict[str, Tensor]:
    device = next(teacher.parameters()).device
    head = output_head(teacher)
    vocabulary = _vocabulary(teacher)
    found: dict[str, list[Tensor]] = {"tokens": [], "log_probabilities": [], "rest": []}
    for batch in blocks.split(batch_size):
        hidden = hidden_states(teacher, batch.long().to(device))
        for h in hidden.split(CHUNK):
            soft = head(h).float() / temperature
            logs = F.log_softmax(soft, -1)
            top = logs.topk(k)
            if k < vocabulary:
                rest = logs.scatter(-1, top.indices, -math.inf).logsumexp(-1)
            else:
                rest = torch.full_like(logs[:, 0], -math.inf)
            found["tokens"].append(top.indices.int().cpu())
            found["log_probabilities"].append(top.values.cpu())
            found["rest"].append(rest.cpu())
    shape = (len(blocks), blocks.shape[1] - 1)
    return {
        name: torch.cat(parts).reshape(*shape, *parts[0].shape[1:]).clone()
        for name, parts in found.items()
    }


def _begin(folder: Path, about: dict[str, Any]) -> None:
    """Write what the cache is of, or compare with what it is of."""
    note = folder / "about.json"
    if note.exists():
        was = json.loads(note.read_text(encoding="utf-8"))
        differ = [
            f"{key} was {was.get(key)!r} and is {value!r} now"
            for key, value in about.items()
            if was.get(key) != value
        ]
        if differ:
            raise problems(
                f"{folder} was cached for something else", [*differ, "Choose another folder."]
            )
        return
    _write(folder, note, about)


def _write(folder: Path, target: Path, content: dict[str, Any]) -> None:
    """Beside, flushed, then renamed: a shard is whole or not there."""
    fresh = folder / f".{target.name}.partial-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if target.suffix == ".json":
            fresh.write_text(json.dumps(content), encoding="utf-8")
        else:
            save_file(content, fresh)
        with fresh.open("rb") as file:
            os.fsync(file.fileno())
        fresh.replace(target)
    except (OSError, SafetensorError) as error:
        raise no_space(error, target) or BadInput(
            f"{target} cannot be written: {error}. Choose another folder."
        ) from error
    finally:
        fresh.unlink(missing_ok=True)


def _file(folder: Path, start: int) -> Path:
    return folder / f"blocks-{start:08d}.safetensors"


def _whole(folder: Path, start: int, count: int) -> bool:
    """Whether the shard is there with all its blocks; safetensors checks the length of the file."""
    try:
        with safe_open(_file(folder, start), "pt") as file:
            return bool(file.get_slice("rest").get_shape()[0] == count)
    except (OSError, SafetensorError):
        return False


@lru_cache(maxsize=64)
def _opened(file: Path) -> Any:
    """Shards stay open and are read where they lie, a block at a time."""
    return safe_open(file, "pt")


def _read(cached: Cached, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    parts = []
    for block in tokens:
        index = cached.places.get(_key(block))
        if index is None:
            raise BadInput(
                f"{cached.folder} has no predictions for a block of the training text. "
                "Cache the teacher on the same blocks."
            )
        start = index // SHARD * SHARD
        file = _opened(_file(cached.folder, start))
        names = ("tokens", "log_probabilities", "rest")
        parts.append([file.get_slice(name)[index - start] for name in names])
    ids, wanted, rest = (torch.stack(column) for column in zip(*parts, strict=True))
    return ids, wanted, rest


def _key(block: Tensor) -> bytes:
    return hashlib.blake2b(block.cpu().int().numpy().tobytes(), digest_size=16).digest()


def _frozen(teacher: Any, bf16: bool) -> Any:
    """The teacher as it is asked: in eval mode, and in bfloat16 a copy."""
    if bf16:
        teacher = copied(teacher, torch.bfloat16)
    return teacher.eval()


def _vocabulary(model: Any) -> int:
    return int(model.get_output_embeddings().weight.shape[0])


def _same_vocabulary(student: Any, wanted: int) -> None:
    if (own := _vocabulary(student)) != wanted:
        raise BadInput(
            f"The student's vocabulary has {own:,} tokens and the teacher's {wanted:,}: they have "
            "to be the same to learn from. Choose a teacher of the same family."
        )


def _check(temperature: float, mix: float) -> None:
    found = []
    if not 0 < temperature < math.inf:
        found.append(f"temperature must be above 0, got {temperature}")
    if not 0 <= mix <= 1:
        found.append(f"mix is a share, from 0 to 1, got {mix}")
    if found:
        raise problems("distillation", found)
