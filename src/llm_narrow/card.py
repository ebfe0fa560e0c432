"""The model card of a narrowed checkpoint: README.md with the metadata that the hub reads."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

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


def model_card(manifest: Manifest, rows: Sequence[Row]) -> str:
    """The text of README.md. What the manifest or the rows lack is left out or said to be."""
    model = at(manifest, "model", "name") or "a model"
    domain = at(manifest, "domain", "name") or "a domain"
    figures = benchmark(rows) or "The quality of this model was not measured."
    sections = [
        f"---\n{yaml.safe_dump(metadata(manifest), sort_keys=False, allow_unicode=True)}---",
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
        "## How to reproduce it",
        reproduction(manifest),
    ]
    return "\n\n".join(s for s in sections if s) + "\n"


def metadata(manifest: Manifest) -> dict[str, Any]:
    """What stands in the YAML block. A licence or origin that is not known is left out."""
    tags = ["llm-narrow", "pruned"]
    if recovery_tokens(manifest) == 0:
        tags.append("not-recovered")
    found = {
        "license": at(manifest, "model", "license") or at(manifest, "model", "licence"),
        "base_model": _origin(manifest),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": tags,
    }
    if isinstance(found["license"], str):
        found["license"] = found["license"].lower()
    return {key: value for key, value in found.items() if value}


def _origin(manifest: Manifest) -> str | None:
    """The hub id of the original; a local folder called `a/b` is none."""
    known = at(manifest, "model", "base_model")
    if known:
        return str(known)
    name = str(at(manifest, "model", "name") or "")
    is_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) and not name.endswith(".gguf")
    return name if is_id and not Path(name).exists() else None


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
