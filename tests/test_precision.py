"""Copies in another precision: weights are rounded, what positions are turned by is not."""

from typing import Any

import torch

from llm_narrow.precision import copied
from tiny import tiny


def test_parameters_are_rounded_and_buffers_are_not() -> None:
    model: Any = tiny("llama")
    twin = copied(model, torch.bfloat16)
    assert {p.dtype for p in twin.parameters()} == {torch.bfloat16}
    for name, held in model.named_buffers():
        assert twin.get_buffer(name).equal(held) and twin.get_buffer(name).dtype == held.dtype
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert (twin.lm_head.weight is twin.model.embed_tokens.weight) == tied


def test_without_a_precision_it_is_a_plain_copy() -> None:
    model: Any = tiny("gpt_neox")
    twin = copied(model, None)
    for (_, ours), (_, theirs) in zip(
        model.named_parameters(), twin.named_parameters(), strict=True
    ):
        assert ours.equal(theirs) and ours.data_ptr() != theirs.data_ptr()
