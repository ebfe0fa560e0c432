"""What a model was measured to be before is not measured again, unless anything is another."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from llm_narrow import benchmark, inputs, measure
from llm_narrow import recipe as recipes
from llm_narrow.progress import silent


def begun(model: Path, domain: Path, **changes: Any) -> tuple[Any, Any, Any]:
    """The recipe, what it loads and the held-out blocks."""
    given = {"model": model, "domain": domain, "length": 32, "held_out_tokens": 128, **changes}
    recipe = recipes.load(None, given)
    start = inputs.gather(recipe)
    return recipe, start, inputs.held_out(start.loaded, start.domain, recipe)


def sums(model: Path, domain: Path, **changes: Any) -> measure.DocumentSums:
    recipe, start, blocks = begun(model, domain, **changes)
    return benchmark.known_sums(start.loaded, blocks, recipe, silent)


def test_the_same_is_measured_once(
    model_folder: Path, domain_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    really = measure.document_sums

    def counting(*given: Any, **more: Any) -> measure.DocumentSums:
        asked.append(1)
        return really(*given, **more)

    monkeypatch.setattr(measure, "document_sums", counting)
    first, again = (sums(model_folder, domain_folder) for _ in range(2))
    assert len(asked) == 1
    assert all(a.equal(b) for a, b in zip(vars(first).values(), vars(again).values(), strict=True))
    assert all(a.dtype == b.dtype for a, b in zip(vars(first).values(), vars(again).values(),
                                                  strict=True))  # fmt: skip
    sums(model_folder, domain_folder, held_out_tokens=64)
    sums(model_folder, domain_folder, dtype="bfloat16")
    assert len(asked) == 3


def test_another_config_is_another_model(
    model_folder: Path, domain_folder: Path
) -> None:
    """The weights are the same, what they are taken for is not."""
    recipe, start, blocks = begun(model_folder, domain_folder)
    first = benchmark.known_sums(start.loaded, blocks, recipe, silent)
    start.loaded.model.config.rms_norm_eps = 0.5
    for layer in start.loaded.model.model.layers:
        layer.input_layernorm.variance_epsilon = 0.5
    second = benchmark.known_sums(start.loaded, blocks, recipe, silent)
    assert not first.nats.equal(second.nats)


def test_the_same_tokens_of_other_documents_are_other_text(
    model_folder: Path, domain_folder: Path
) -> None:
    recipe, start, blocks = begun(model_folder, domain_folder)
    first = benchmark.known_sums(start.loaded, blocks, recipe, silent)
    moved = dataclasses.replace(blocks, documents=blocks.documents + 7)
    second = benchmark.known_sums(start.loaded, moved, recipe, silent)
    assert second.documents.equal(first.documents + 7)
    longer = dataclasses.replace(blocks, sizes=blocks.sizes * 2)
    assert benchmark.known_sums(start.loaded, longer, recipe, silent).bytes.equal(first.bytes * 2)


def test_a_broken_file_is_made_anew(model_folder: Path, domain_folder: Path) -> None:
    first = sums(model_folder, domain_folder)
    for file in (benchmark.cache_dir() / "sums").iterdir():
        file.write_bytes(b"broken")
    assert sums(model_folder, domain_folder).nats.equal(first.nats)
