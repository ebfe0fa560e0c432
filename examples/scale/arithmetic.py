"""What a stage needs, in bytes, seconds and bytes sent: the arithmetic that docs/scale.md explains.

Nothing here makes weights: models are built on the `meta` device, to count and to multiply.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from llm_narrow import cost
from llm_narrow.losses import LEARNT

MULTIPLE = 8  # of neurons, as `prune.multiple`


@dataclass(frozen=True)
class Shape:
    """The dimensions of a llama, and where they are from."""

    name: str
    source: str
    hidden: int
    neurons: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = False

    @property
    def keys(self) -> int:
        """Channels of all key heads, or of all value heads."""
        return self.hidden // self.heads * self.kv_heads

    @property
    def layer(self) -> int:
        """Parameters of a layer: q, o, k, v, the three matrices of the MLP and two norms."""
        return self.hidden * (2 * self.hidden + 2 * self.keys + 3 * self.neurons + 2)

    @property
    def ends(self) -> int:
        """Parameters outside of the layers: embedding, output head where it is apart, a norm."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + self.hidden

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.layers * self.layer + self.ends

    def narrowed(self, sparsity: float) -> "Shape":
        """Without that share of the neurons."""
        kept = round(self.neurons * (1 - sparsity) / MULTIPLE) * MULTIPLE
        return replace(self, neurons=max(MULTIPLE, kept))

    def lora(self, rank: int) -> int:
        """Parameters that LoRA adds to the seven matrices of each layer."""
        h = self.hidden
        return self.layers * rank * (4 * h + 2 * (h + self.keys) + 3 * (h + self.neurons))

    def saved(self, how: str) -> int:
        """Bytes that a layer keeps per token for the backward pass.

        autocast: float32 weights, bfloat16 matrices. bfloat16: weights gathered in bfloat16.
        float32: no bfloat16. scoring, scoring32: weights frozen, in bfloat16 or float32.
        """
        h, wide = self.hidden, 2 * self.hidden + 2 * self.keys + 4 * self.neurons
        small = 8 + 4 * self.heads  # of two norms and of the attention, float32
        return small + {
            "autocast": 26 * h + 2 * wide,
            "bfloat16": 16 * h + 2 * wide,
            "float32": 24 * h + 4 * wide,
            "scoring": 8 * h + 2 * wide,
            "scoring32": 8 * h + 4 * wide,
        }[how]

    def config(self) -> Any:
        """The configuration of transformers for it."""
        from transformers import LlamaConfig

        return LlamaConfig(
            hidden_size=self.hidden, intermediate_size=self.neurons,
            num_hidden_layers=self.layers, num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads, vocab_size=self.vocabulary,
            tie_word_embeddings=self.tied,
        )  # fmt: skip

    def on_meta(self) -> Any:
        """The model that transformers builds, without weights."""
        import torch
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(self.config())


MODELS = (
    Shape("Llama-3.1-8B", "The Llama 3 Herd of Models, arXiv 2407.21783, table 3; vocabulary as "
          "in its config.json", 4096, 14336, 32, 32, 8, 128256),
    Shape("Llama-3.1-70B", "the same", 8192, 28672, 80, 64, 8, 128256),
    Shape("SmolLM2-135M", "its config.json", 576, 1536, 30, 9, 3, 49152, tied=True),
)  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """One stage on so many GPUs: bytes per GPU, seconds at the stated speeds."""

    stage: str
    gpus: int
    parts: Mapping[str, float]  # bytes of one GPU while it runs
    around: float  # bytes of one GPU before and after it, when it holds whole models
    seconds: float  # of arithmetic
    received: float = 0.0  # bytes into one GPU, over the whole stage
    micro_batches: int = 1  # of one GPU

    @property
    def total(self) -> float:
        """Bytes of one GPU while it runs."""
        return sum(self.parts.values())


@cache
def operations(shape: Shape, length: int) -> tuple[float, float]:
    """Of a forward pass, per token of a block of that length: all, and the output head's."""
    head = 2.0 * shape.vocabulary * shape.hidden
    body = (cost.prefill_flops(shape.on_meta(), length) - head) / length
    return body + head, head


def chunked(shape: Shape, positions: int, each: int = 12) -> float:
    """Bytes of the logits of so many positions: log-probabilities and two gradients, float32."""
    return float(positions * shape.vocabulary * each)


def score(s: Shape, gpus: int, o: argparse.Namespace) -> Stage:
    """Frozen bfloat16 weights on every GPU; each scores its share of the blocks."""
    tokens = o.score_batch * o.length
    every, _ = operations(s, o.length)
    parts = {
        "weights": 2.0 * s.parameters,
        "activations": float(tokens * s.layers * s.saved("scoring") + 10 * tokens * s.hidden),
        "logits": chunked(s, LEARNT),
    }
    seconds = 2 * every * o.calibration_tokens / (gpus * o.peak * o.mfu)
    return Stage("score", gpus, parts, 0.0, seconds)


def refit(s: Shape, gpus: int, o: argparse.Namespace, sequential: bool) -> Stage:
    """Statistics of the kept neurons, summed over the GPUs and solved on each, in float32."""
    n, out, h = s.narrowed(o.sparsity).neurons, s.hidden, s.hidden
    mine = o.calibration_tokens / gpus
    one = 4.0 * n * (n + out)
    solve = 4.0 * (3 * n * n + 3 * n * out)
    batch = o.batch_size * o.length
    passing = 2.0 * batch * (6 * h + 4 * s.neurons)  # inside a layer, nothing kept
    if sequential:
        parts = {
            "weights": 4.0 * s.parameters, "copies of a layer": 4.0 * s.layer,
            "statistics": one, "solving": solve, "hidden states": 2 * mine * (4 * h + n),
            "activations": passing,
        }  # fmt: skip
    else:
        parts = {
            "weights": 4.0 * s.parameters, "bfloat16 copy": 2.0 * s.parameters,
            "statistics": s.layers * one, "solving": solve, "activations": passing,
        }  # fmt: skip
    every, head = operations(s, o.length)
    forward = (2 if sequential else 1) * (every - head) * mine
    sums = s.layers * 2.0 * n * (n + out) * mine
    solving = s.layers * (2 / 3 * n**3 + 2.0 * n * n * out)
    seconds = forward / (o.peak * o.mfu) + (sums + solving) / (o.peak_float32 * o.mfu)
    received = 2 * (gpus - 1) / gpus * s.layers * one  # a ring's sum
    name = "refit, sequential" if sequential else "refit, one-shot"
    return Stage(name, gpus, parts, 0.0, seconds, received)


def train(
    name: str, s: Shape, gpus: int, o: argparse.Namespace, *, lora: bool = False,
    teacher: Shape | None = None, cached: bool = False, lasso: bool = False,
) -> Stage:  # fmt: skip
    """AdamW on float32 weights; on several GPUs sharded (FSDP2), gathered in bfloat16."""
    n, learnt = s.parameters, s.lora(o.lora_rank) if lora else s.parameters
    tokens, sharded = o.batch_size * o.length, gpus > 1
    parts = {
        "weights": 4.0 * (n + (learnt if lora else 0)) / gpus,
        "gradients": 4.0 * learnt / gpus,
        "moments": 8.0 * learnt / gpus,
    }
    if sharded:
        at_once = 2 * s.layer + s.ends
        parts["gathered"] = 2.0 * at_once
        parts["gradients on their way"] = 0.0 if lora else 6.0 * at_once
    else:
        head = s.vocabulary * s.hidden
        parts["bfloat16 casts"] = 2.0 * (head + 2 * s.layer if lora else n)
        parts["gradient of the head"] = 0.0 if lora else 6.0 * head
    how, kept = ("bfloat16", 2) if sharded else ("autocast", 4)
    whole = tokens * s.layers * s.saved(how)
    again = tokens * (s.layers * kept * s.hidden + s.saved(how))
    outside = 4 * kept * tokens * s.hidden
    parts["activations"] = float((again if o.checkpointing else whole) + outside)
    parts["logits"] = chunked(s, LEARNT)
    every, head_ops = operations(s, o.length)
    ops = (2.0 if lora else 3.0) * every + 6.0 * (learnt if lora else 0)
    ops += every - head_ops if o.checkpointing else 0.0
    around = 4.0 * n
    if lasso:
        around = 8.0 * n  # the proof that removal changes nothing: masked beside whole
    if teacher is not None:
        around = max(around, 4.0 * n + 6.0 * teacher.parameters)
        ops += operations(teacher, o.length)[0]
        if not cached:  # never sharded
            parts["teacher"] = 2.0 * teacher.parameters
            parts["teacher's logits"] = chunked(s, LEARNT, 20)  # its own, and both softened
    seconds = ops * o.train_tokens / (gpus * o.peak * o.mfu)
    moved = 4.0 * n + 4.0 * learnt  # bfloat16 forward and backward; gradients in float32
    micro = round(o.train_tokens / (gpus * tokens))
    return Stage(name, gpus, parts, around, seconds, micro * moved * (gpus - 1) / gpus, micro)


def stages(s: Shape, gpus: int, o: argparse.Namespace) -> list[Stage]:
    """Every stage of a run."""
    narrow = s.narrowed(o.sparsity)
    return [
        score(s, gpus, o),
        refit(s, gpus, o, sequential=False),
        refit(s, gpus, o, sequential=True),
        train("lasso", s, gpus, o, lasso=True),
        train("lasso, teacher", s, gpus, o, lasso=True, teacher=s),
        train("recover, full", narrow, gpus, o),
        train("recover, LoRA", narrow, gpus, o, lora=True),
        train("recover, full, teacher", narrow, gpus, o, teacher=s),
        train("recover, full, cached teacher", narrow, gpus, o, teacher=s, cached=True),
    ]


def cache_bytes(tokens: float, length: int, k: int) -> float:
    """Bytes on disk of a teacher's k likeliest tokens: ids, log-probabilities, and the rest."""
    return tokens * (length - 1) / length * (8 * k + 4)


def state_bytes(learnt: int) -> tuple[int, int]:
    """Bytes of one state of a training run: weights and moments, and the best weights beside."""
    return 12 * learnt, 4 * learnt
