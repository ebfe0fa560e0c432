"""Which files of a run go to the hub, and why the others stay. Nothing unknown goes."""

import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from . import checkpoint, report
from .errors import BadInput
from .hub import PICKLED
from .report import at

# Of the folder `model` of a run, and of the run folder itself.
OF_MODEL = (
    "config.json", "generation_config.json", "model.safetensors", "model-*-of-*.safetensors",
    "model.safetensors.index.json", "keep.safetensors", "vocabulary.safetensors",
    "tokenizer*.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "spiece.model",
    "special_tokens_map.json", "added_tokens.json", "chat_template.*", "README.md", "LICENSE*",
    "recipe.yaml", "manifest.json", "certificate.json",
)  # fmt: skip
OF_RUN = ("certificate.md",)
# What an earlier push may have left, and would be taken for a part of this model.
STALE = (*(name for name in OF_MODEL if not name.startswith(("README", "LICENSE"))), *OF_RUN,
         "model*.safetensors", "*.index.json")  # fmt: skip
WHY = (  # names of a run folder -> why they stay
    ((*PICKLED, "*.bin", "*.pkl", "*.pickle"), "pickled: can run any code when opened"),
    (("*.py",), "code"),
    (("state*", "step-*", "*.unfinished", "optimizer*"), "state of a training"),
    (("logs", "*.log", "lasso.jsonl", "recover.jsonl", "events.*"), "log of a training"),
    (("*cache*", ".*"), "cache"),
    (("report.*", "figures", "rows.*", "explain*", "*.html"), "report; the card has the figures"),
    (("scores.safetensors",), "scores, for more cuts of the whole model"),
    (("recipe.yaml", "manifest.json", "certificate.json"), "goes up from model/"),
)
WORDS = ("tokenizer.json", "tokenizer.model", "vocab.*", "merges.txt", "spiece.model")  # no texts
SECRET = re.compile(r"\bhf_[A-Za-z0-9]{20,}")  # how tokens of the hub look


def manifest_of(folder: Path) -> Mapping[str, Any]:
    """The manifest of a finished run; BadInput for anything else."""
    if not folder.is_dir():
        raise BadInput(f"{folder} is no folder. Give a run folder, as `llm-narrow prune` leaves.")
    here = {"manifest.json": Path.is_file, "model": Path.is_dir}
    lacking = [name for name, there in here.items() if not there(folder / name)]
    if lacking:
        outer = folder.parent if (folder.parent / "manifest.json").is_file() else None
        way = f"Give {outer}." if outer else "Give one that `llm-narrow prune` has finished."
        raise BadInput(f"{folder} is not a run folder: it has no {lacking[0]}. {way}")
    return report.read_manifest(folder / "manifest.json")


def chosen(folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """The files that go up by their names there, and the others with why they do not.

    Raises BadInput where the model lies elsewhere.
    """
    if (folder / "model").is_symlink():
        raise BadInput(
            f"{folder / 'model'} is a link: what it leads to is not part of the run. Put the "
            "folder itself there."
        )
    found: dict[str, Path] = {}
    left: dict[str, str] = {}
    for path in sorted([*folder.iterdir(), *(folder / "model").iterdir()]):
        inside = path.parent != folder
        name = f"model/{path.name}" if inside else path.name
        if name == "model":
            continue
        if not path.is_file() or not _matches(path.name, OF_MODEL if inside else OF_RUN):
            why = (told for patterns, told in WHY if _matches(path.name, patterns))
            left[name] = next(why, "not of the checkpoint")
        elif not path.resolve().is_relative_to(folder.resolve()):
            left[name] = "a link to outside of the run"
        else:
            found[path.name] = path
    return found, left


def check(folder: Path, manifest: Mapping[str, Any], found: Mapping[str, Path]) -> None:
    """BadInput where the model is not whole, is not the one of the run, or a text has a token."""
    wanted = ("config.json", "model*.safetensors", "tokenizer*")
    lacking = [name for name in wanted if not any(fnmatch(one, name) for one in found)]
    if lacking:
        raise BadInput(f"{folder / 'model'} is no whole model: {lacking[0]} is missing. Run again.")
    own = checkpoint.weights_sha256(folder / "model")
    certified = "certificate.json" in found and report.read_manifest(found["certificate.json"])
    for file, said, way in (
        ("manifest.json", at(manifest, "checkpoint", "sha256"), "Run it again"),
        ("certificate.json", at(certified, "model", "sha256"), "Certify it again"),
    ):
        if said and said != own:
            raise BadInput(
                f"{folder / 'model'} holds other weights (SHA-256 {own[:16]}…) than {file} says "
                f"({str(said)[:16]}…). {way}, or put the weights back."
            )
    for name, text in _texts(found):
        check_text(f"{name} of {folder}", text)


def check_text(name: str, text: str) -> None:
    """BadInput where a text that goes up holds what looks like a token."""
    if secret := SECRET.search(text):
        raise BadInput(
            f"{name} holds what looks like a token of the hub ({secret[0][:5]}…). Take it out, and "
            "revoke it if it is one."
        )


def _texts(found: Mapping[str, Path]) -> Iterator[tuple[str, str]]:
    for name, path in found.items():
        if path.suffix != ".safetensors" and not _matches(name, WORDS):
            yield name, path.read_text(encoding="utf-8", errors="replace")


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def stale(name: str) -> bool:
    """Whether a file of an earlier push would be taken for a part of the model."""
    return _matches(name, STALE)
