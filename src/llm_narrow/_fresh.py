"""Run as a script in a fresh process: what a checkpoint folder says to someone who opens it there.

`python -P _fresh.py QUESTION`, where QUESTION is a json file with `folders` (each with `folder`,
`layout`, `dtype` and `tokenizer`, whether there is one), `tokens` (a safetensors file with
`tokens`), `text` and `answer`: a prefix, to which the number of the folder is added. Nothing of
llm_narrow is imported unless a folder is uneven, so what passes here passes where only transformers
is installed.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer


def opened(folder: str, layout: str, dtype: torch.dtype) -> Any:
    """The model of the folder; ValueError if any of its weights would be a random one."""
    if layout == "uneven":
        from llm_narrow import checkpoint

        return checkpoint.load(Path(folder), dtype=dtype)
    stock: Any = AutoModelForCausalLM
    model, info = stock.from_pretrained(
        folder, dtype=dtype, local_files_only=True, output_loading_info=True
    )
    wrong = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    if wrong:
        raise ValueError(f"weights do not fit the config: {wrong}")
    return model.eval()


@torch.no_grad()
def answers(model: Any, tokens: Tensor) -> dict[str, Tensor]:
    """Logits of all tokens, those of the last from a cache of the others, and greedy tokens."""
    before = model(tokens[:, :-1], use_cache=True)
    last = model(tokens[:, -1:], past_key_values=before.past_key_values, use_cache=True)
    greedy = model.generate(
        tokens[:1], attention_mask=torch.ones_like(tokens[:1]), do_sample=False,
        max_new_tokens=4, pad_token_id=0,
    )  # fmt: skip
    return {
        "logits": model(tokens, use_cache=False).logits.float(),
        "cached": last.logits[:, -1].float().contiguous(),
        "generated": greedy[:, tokens.shape[1] :].contiguous(),
    }


def main(question: Path) -> None:
    """Answer for each folder in turn."""
    asked = json.loads(question.read_text(encoding="utf-8"))
    tokens = load_file(asked["tokens"])["tokens"]
    for number, about in enumerate(asked["folders"]):
        model = opened(about["folder"], about["layout"], getattr(torch, about["dtype"]))
        answer = answers(model, tokens)
        if about["tokenizer"]:
            tokenizer = AutoTokenizer.from_pretrained(about["folder"], local_files_only=True)
            answer["encoded"] = torch.tensor(tokenizer(asked["text"])["input_ids"])
        if about["layout"] != "uneven" and "llm_narrow" in sys.modules:
            raise ImportError("llm_narrow was imported: this would not show what stock code does")
        save_file(answer, f"{asked['answer']}{number}.safetensors", {"class": type(model).__name__})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
