"""What a folder or file is that was taken for a model and is none: a hint at what was meant."""

import os
from collections.abc import Iterator
from pathlib import Path

POINTER = b"version https://git-lfs"


def instead(folder: Path) -> Iterator[str]:
    """What else a folder without a config.json may be, each with the way to a model."""
    if (folder / "adapter_config.json").is_file():
        yield (
            "adapter_config.json: this is an adapter of peft; merge it into its model first "
            "(merge_and_unload, save_pretrained), and give that folder"
        )
    if files := sorted(folder.glob("*.gguf")):
        yield f"{files[0].name} is beside it; to take that, give the file"
    # Of a training run, of a folder of models, and of the hub's own cache.
    below = [*folder.glob("*/config.json"), *folder.glob("snapshots/*/config.json")]
    if inner := sorted(path.parent for path in below):
        more = f" and {len(inner) - 1} more" if len(inner) > 1 else ""
        yield f"models are in folders below it: {inner[-1]}{more}; give one of these"


def unreadable(weights: Path, error: Exception) -> str:
    """Why a file of weights cannot be opened, and what to do."""
    if not os.access(weights, os.R_OK):
        return f"{weights.name} may not be read by this user; change its rights"
    with weights.open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            return (
                f"{weights.name} is a pointer of Git LFS and not the weights; run `git lfs pull` "
                "where it was cloned"
            )
    return f"{weights.name} is corrupt or cut short ({error}); fetch it again"
