"""Stock folders say settings of rotary angles under the names of version 4 too."""

import copy
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import AutoConfig, AutoTokenizer

from folders import write_model
from llm_narrow import checkpoint, models, units
from llm_narrow.families import find_groups
from llm_narrow.older import old_names
from tiny import tiny

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip


def written(kind: str, folder: Path, **changes: Any) -> dict[str, Any]:
    """config.json of a stock folder of the kind, whose config version 5 still reads the same."""
    model = tiny(kind, **copy.deepcopy(changes))  # configs write into what they are given
    groups = find_groups(model)
    checkpoint.write(model, None, folder, original_config=model.config, groups=groups,
                     keep=units.keep_all(groups))  # fmt: skip
    again = AutoConfig.from_pretrained(folder)
    assert getattr(again, "rope_parameters", None) == getattr(model.config, "rope_parameters", None)
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


@pytest.mark.parametrize(
    ("kind", "changes", "names"),
    [
        ("llama", {"rope_theta": 5e4}, {"rope_theta": 5e4, "torch_dtype": "float32"}),
        ("llama", {"rope_theta": 5e5, "rope_scaling": LLAMA3},
         {"rope_theta": 5e5, "rope_scaling": LLAMA3}),
        ("phi", {"rope_theta": 5e4, "partial_rotary_factor": 0.25},
         {"rope_theta": 5e4, "partial_rotary_factor": 0.25}),
        ("gpt_neox", {"rotary_emb_base": 5e4, "rotary_pct": 0.5},
         {"rotary_emb_base": 5e4, "rotary_pct": 0.5}),
        ("gemma3_text", {"rope_theta": 5e4, "rope_local_base_freq": 3e4},
         {"rope_theta": 5e4, "rope_local_base_freq": 3e4}),
        ("qwen3_moe", {}, {"num_experts": 3, "num_local_experts": 3}),
    ],
)  # fmt: skip
def test_config_json_has_the_old_names(
    kind: str, changes: dict[str, Any], names: dict[str, Any], tmp_path: Path
) -> None:
    fields = written(kind, tmp_path, **changes)
    assert {name: fields.get(name) for name in names} == names


def test_without_rotary_angles_none_are_added() -> None:
    assert old_names({"model_type": "gpt2"}, tiny("gpt2").config) == {}


def test_the_tokenizer_names_a_class_that_both_know_and_reads_the_same(tmp_path: Path) -> None:
    loaded = models.load(str(write_model(tmp_path / "of")))
    groups = find_groups(loaded.model)
    checkpoint.write(loaded.model, loaded.tokenizer, tmp_path, original_config=loaded.model.config,
                     groups=groups, keep=units.keep_all(groups))  # fmt: skip
    fields = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert fields["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not {"is_local", "local_files_only"} & fields.keys()
    again: Any = AutoTokenizer.from_pretrained(tmp_path)
    text = "the unit of code"
    assert again(text)["input_ids"] == loaded.tokenizer(text)["input_ids"]
    assert again.eos_token == loaded.tokenizer.eos_token


def test_the_comparison_sees_what_differs(tmp_path: Path) -> None:
    """Of two folders the one whose angles were changed behind its back is off, the other not."""
    path = Path(__file__).parents[1] / "examples/compat/loads.py"
    spec = importlib.util.spec_from_file_location("loads", path)
    loads: Any = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(loads)  # type: ignore[union-attr]
    every = loads.small(tmp_path)
    folders = {name: every[name] for name in ("llama", "mistral", "llama, as 3")}
    config = folders["mistral"][0] / "config.json"
    fields = json.loads(config.read_text())
    fields["rope_parameters"]["rope_theta"] = fields["rope_theta"] = 100.0
    config.write_text(json.dumps(fields))
    (folders["llama, as 3"][0] / "config.json").unlink()
    told = loads.asked(sys.executable, folders, tmp_path)
    rows = {n: loads.row(n, *folders[n], told[n], tmp_path) for n in folders}
    assert rows["llama"]["difference"] < 1e-6 < 1e-3 < rows["mistral"]["difference"]
    assert told[""] == transformers.__version__
    page = loads.page(list(rows.values()), {"there": "0"})
    assert "Error" in rows["llama, as 3"]["error"] and rows["llama, as 3"]["error"] in page
