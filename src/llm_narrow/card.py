"""The model card of a narrowed checkpoint: README.md with the metadata that the hub reads."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index

from . import models
from .report import (
    Manifest,
    at,
    benchmark,
    fenced,
    recovery_mark,
    recovery_tokens,
    reproduction,
    thousands,
    widths,
)
from .rows import Row
from .sources import HUB_NAME

# What the hub calls licences that our list of models names in words. Others are its own words.
LICENCES: dict[str, dict[str, str]] = {
    models.LLAMA: {"license": "llama3.2"},
    "Qwen Research": {"license": "other", "license_name": "qwen-research"},
}
PACKAGED = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}  # what a package was made from
LANGUAGES = {"python": "code", "python-stdlib": "code", "python-github": "code", "english": "en"}
DATASETS = {"python-github": "codeparrot/codeparrot-clean"}
STOCK = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")"""
UNEVEN = """\
from pathlib import Path

import torch
from llm_narrow import checkpoint
from transformers import AutoTokenizer

model = checkpoint.load(Path("FOLDER"), dtype=torch.float32, device="cpu")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")"""

TRIMMED = (
    "Its vocabulary was trimmed: the tokenizer here gives other numbers than the original's, which "
    "does not fit this model."
)


def model_card(manifest: Manifest, rows: Sequence[Row]) -> str:
    """The text of README.md. What the manifest or the rows lack is left out or said to be."""
    model = at(manifest, "model", "name") or "a model"
    domain = at(manifest, "domain", "name") or "a domain"
    figures = benchmark(rows) or "The quality of this model was not measured."
    sections = [
        front(metadata(manifest, rows)),
        f"# {Path(str(model)).name} narrowed to {domain}",
        recovery_mark(manifest),
        f"`{model}` made smaller for one domain, `{domain}`, by removing whole units with "
        f"llm-narrow. {_parameters(rows)}Outside that domain expect it to be worse than the "
        "figures here, which are of that domain only.",
        "## What was removed",
        widths(at(manifest, "plan")) or "The plan was not recorded.",
        "`keep.safetensors` says for every unit of the original model whether it was kept.",
        "## Figures on held-out text",
        figures,
        "## How to load it",
        _loading(at(manifest, "checkpoint", "layout")),
        TRIMMED if at(manifest, "vocabulary") else "",
        "## How to reproduce it",
        reproduction(manifest),
    ]
    return "\n\n".join(s for s in sections if s) + "\n"


def front(data: Mapping[str, Any]) -> str:
    """The block at the head of a card."""
    return f"---\n{yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True)}---"


def metadata(manifest: Manifest, rows: Sequence[Row] = (), *, name: str = "") -> dict[str, Any]:
    """What stands in the YAML block. A licence or origin that is not known is left out.

    `name` is that of the narrowed model, for its figures. Of the four relations to a base model
    that the hub knows (adapter, finetune, merge, quantized) `finetune` is the one for a model with
    weights of its own; that units went is said by the tag `pruned`.
    """
    domain = str(at(manifest, "domain", "name") or "")
    tags = ["llm-narrow", "pruned"]
    if recovery_tokens(manifest) == 0:
        tags.append("not-recovered")
    origin = _origin(manifest)
    found = {
        **_licence(manifest),
        "base_model": origin,
        "base_model_relation": "finetune" if origin else None,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "language": LANGUAGES.get(domain),
        "datasets": [dataset] if (dataset := _dataset(domain)) else None,
        "tags": tags,
        "model-index": _results(manifest, rows, name),
    }
    return {key: value for key, value in found.items() if value}


def _licence(manifest: Manifest) -> dict[str, str]:
    """The licence, as the manifest has it or as the list of models does."""
    alias = models.KNOWN.get(str(at(manifest, "model", "name")).partition("@")[0])
    known = alias[2] if alias else None
    told = at(manifest, "model", "license") or at(manifest, "model", "licence") or known
    return LICENCES.get(told, {"license": told.lower()}) if isinstance(told, str) else {}


def _origin(manifest: Manifest) -> str | None:
    """The hub id of the original; a local folder called `a/b` is none."""
    known = at(manifest, "model", "base_model")
    if known:
        return str(known)
    name = str(at(manifest, "model", "name") or "")
    alias = name.partition("@")[0]
    if alias in models.KNOWN:
        source = models.KNOWN[alias][0]
        return source if isinstance(source, str) else PACKAGED.get(alias)
    is_id = re.fullmatch(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?:@.+)?", name)
    return is_id[1] if is_id and not name.endswith(".gguf") and not Path(name).exists() else None


def _dataset(domain: str) -> str | None:
    """The data set of the hub that the domain is; None for text from anywhere else."""
    found = HUB_NAME.fullmatch(domain)
    return DATASETS.get(domain) or (found[1] if found and not Path(domain).exists() else None)


def _results(manifest: Manifest, rows: Sequence[Row], name: str) -> list[dict[str, Any]]:
    """What was measured of the narrowed model, in the form of the hub."""
    if not rows:
        return []
    row = rows[-1]
    text = Path(row.domain).name
    figures = {
        "bits_per_byte": ("Bits per byte", row.bits_per_byte.value),
        "loss": ("Nats per token", row.loss.value),
        "accuracy": ("Accuracy of the next token", row.accuracy.value),
    }
    results = [
        EvalResult(
            task_type="text-generation", task_name="Text generation",
            dataset_type=_dataset(row.domain) or re.sub(r"[^\w.-]+", "-", text),
            dataset_name=f"{text}, {row.tokens:,} tokens", dataset_split=row.part,
            metric_type=kind, metric_name=title, metric_value=round(value, 4),
        )
        for kind, (title, value) in figures.items()
    ]  # fmt: skip
    original = Path(str(at(manifest, "model", "name") or "model")).name
    found: list[dict[str, Any]] = eval_results_to_model_index(
        name or f"{original} narrowed to {text}", results
    )
    return found


def _parameters(rows: Sequence[Row]) -> str:
    if len(rows) < 2:
        return ""
    before, after = rows[0].parameters, rows[-1].parameters
    return f"It has {thousands(after)} parameters, of the {thousands(before)} of the original. "


def _loading(layout: Any) -> str:
    if layout in ("uniform", "padded"):
        return fenced(STOCK, "python")
    uneven = (
        "Its layers have sizes of their own, which no stock configuration can say, so that "
        "llm-narrow has to be installed:"
    )
    if layout is not None:
        return f"{uneven}\n\n{fenced(UNEVEN, 'python')}"
    return (
        f"{fenced(STOCK, 'python')}\n\nIf transformers refuses the folder, its layers have sizes "
        f"of their own and llm-narrow has to be installed:\n\n{fenced(UNEVEN, 'python')}"
    )
