"""Checkpoints that readers of before transformers 5 understand as well.

Version 5 writes some settings under new names only. Version 4, and runtimes that read config.json
as it does, take the default for what they do not find, in silence: a model trained with another
base of its rotary angles then computes something else. So stock folders say these settings under
both names. Version 5 reads either.
"""

import json
from pathlib import Path
from typing import Any

# Where version 4 had names of its own. Elsewhere it is rope_theta and partial_rotary_factor.
BASES = {"gpt_neox": "rotary_emb_base"}
PARTS = {"gpt_neox": "rotary_pct"}
TOKENIZER = "PreTrainedTokenizerFast"  # what both versions call the class of tokenizer.json
OURS = ("is_local", "local_files_only")  # how the tokenizer was loaded here, which nobody needs


def say_twice(folder: Path, config: Any) -> None:
    """Add the old names to config.json and tokenizer_config.json of a stock folder."""
    path = folder / "config.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    for name, value in old_names(fields, config).items():
        fields.setdefault(name, value)
    _write(path, fields)
    path = folder / "tokenizer_config.json"
    if path.is_file():
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields.get("tokenizer_class") == "TokenizersBackend":
            fields["tokenizer_class"] = TOKENIZER
        _write(path, {name: fields[name] for name in fields if name not in OURS})


def old_names(fields: dict[str, Any], config: Any) -> dict[str, Any]:
    """What a config.json of version 5 says, in the names of version 4."""
    found: dict[str, Any] = {}
    if "dtype" in fields:
        found["torch_dtype"] = fields["dtype"]
    for alias, name in (getattr(config, "attribute_map", None) or {}).items():
        if "experts" in alias and name in fields:
            found[alias] = fields[name]
    rope = fields.get("rope_parameters") or {}
    if "sliding_attention" in rope:  # Gemma 3 has one for each kind of layer
        found["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope.get("full_attention", {})
    if "rope_theta" in rope:
        kind = fields["model_type"]
        rest = dict(rope)
        found[BASES.get(kind, "rope_theta")] = rest.pop("rope_theta")
        if (part := rest.pop("partial_rotary_factor", None)) is not None:
            found[PARTS.get(kind, "partial_rotary_factor")] = part
        if rest.get("rope_type", "default") != "default":
            found["rope_scaling"] = rest
    return found


def _write(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
