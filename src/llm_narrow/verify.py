"""Prove a checkpoint: open it in a fresh process and compare it with the model in memory."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import BadInput, NarrowError
from .precision import copied

Layout = Literal["uniform", "padded", "uneven"]
# Largest allowed |difference of logits| / largest |logit|. The same kernels run on both sides, so
# mostly it is 0; another number of threads or another device costs a few roundings.
TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}
TEXT = 'def f(x1, y=12.5):\n    """größer"""\n\treturn  x1 + 2048 if y != "a_b" else None\n'
SECONDS = 300  # for the fresh process, and a second for each 20 MB more
_FRESH = Path(__file__).with_name("_fresh.py")


class NotVerified(NarrowError):
    """A checkpoint that does not say in a fresh process what the model in memory says."""


@dataclass(frozen=True)
class Written:
    """A folder as written: its layout, the model type in its config and the type of its weights."""

    layout: Layout
    model_type: str
    dtype: torch.dtype


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files with the weights, in order. Raises BadInput if there are none."""
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise BadInput(f"{folder} has no weights: no model.safetensors (or its parts) is in it.")
    return files


@torch.no_grad()
def verify(
    folder: Path, written: Written, model: Any, tokenizer: Any, *, tokens: Tensor | None = None
) -> float:
    """Open `folder` in a fresh process and compare it with `model`; the relative difference.

    Stock transformers alone opens a uniform folder there. Compared are the logits of `tokens`, the
    last of them again from a cache, and the tokenizer's encoding of a text; greedy generation has
    to work. Raises NotVerified, which says what differs.
    """
    if tokens is None:
        g = torch.Generator().manual_seed(0)
        tokens = torch.randint(model.config.vocab_size, (2, 16), generator=g)
    expected = _logits(model, tokens, written.dtype)
    (answer,) = ask([(folder, written, tokenizer is not None)], tokens)
    allowed = TOLERANCE[written.dtype]
    differences = []
    parts = {"logits": expected, "cached": expected[:, -1]}
    for part, what in {"logits": "logits", "cached": "logits from a cache"}.items():
        if answer[part].shape != parts[part].shape:
            raise NotVerified(
                f"The checkpoint is refused: its {what} in a fresh process have another shape "
                "than those in memory. Nothing was left."
            )
        differences.append(float((answer[part] - parts[part]).abs().max() / expected.abs().max()))
        if not differences[-1] <= allowed:  # so that nan is refused too
            raise NotVerified(
                f"The checkpoint is refused: in a fresh process its {what} differ from those in "
                f"memory by {differences[-1]:.2g} of the largest, more than {allowed:g}. Nothing "
                "was left. Please report this, with the command and the model."
            )
    if tokenizer is not None and answer["encoded"].tolist() != tokenizer(TEXT)["input_ids"]:
        raise NotVerified(
            "The checkpoint is refused: its tokenizer, loaded in a fresh process, encodes "
            f"{TEXT!r} otherwise than the one in memory. Nothing was left."
        )
    if not answer["generated"].numel():
        raise NotVerified("The checkpoint is refused: it generates nothing in a fresh process.")
    return max(differences)


def ask(
    folders: Sequence[tuple[Path, Written, bool]], tokens: Tensor
) -> list[dict[str, Tensor]]:
    """What each folder answers in one fresh process (see _fresh.py). True: it has a tokenizer."""
    size = sum(p.stat().st_size for folder, _, _ in folders for p in weight_files(folder))
    quiet = {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
    }
    environment = {**os.environ, **quiet}
    if any(written.layout == "uneven" for _, written, _ in folders):
        # It takes this very package to open them, installed or not.
        paths = [str(_FRESH.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    with tempfile.TemporaryDirectory(prefix="llm-narrow-") as place:
        asked: dict[str, Any] = {
            "folders": [
                {
                    "folder": str(folder),
                    "layout": written.layout,
                    "dtype": str(written.dtype).removeprefix("torch."),
                    "tokenizer": has_tokenizer,
                }
                for folder, written, has_tokenizer in folders
            ],
            "tokens": f"{place}/tokens.safetensors",
            "text": TEXT,
            "answer": f"{place}/answer",
        }
        save_file({"tokens": tokens}, asked["tokens"])
        Path(place, "question.json").write_text(json.dumps(asked), encoding="utf-8")
        command = [sys.executable, "-P", "-W", "ignore", str(_FRESH), f"{place}/question.json"]
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=False,
                timeout=SECONDS + size / 20e6,
            )  # fmt: skip
        except subprocess.TimeoutExpired as late:
            raise NotVerified(
                f"The checkpoint is refused: a fresh process did not open it in {late.timeout:.0f} "
                "seconds. Nothing was left."
            ) from late
        if done.returncode:
            told = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise NotVerified(
                f"The checkpoint is refused: a fresh process cannot open it: {told[-1]}. "
                "Nothing was left."
            )
        return [load_file(f"{place}/answer{n}.safetensors") for n in range(len(folders))]


def _logits(model: Any, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """What the model in memory says on the CPU with its weights in `dtype`."""
    if model.device.type != "cpu" or model.dtype != dtype:
        model = copied(model, dtype).to("cpu")
    training = model.training
    logits: Tensor = model.eval()(tokens, use_cache=False).logits.float()
    model.train(training)
    return logits
