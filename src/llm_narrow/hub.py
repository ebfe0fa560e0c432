"""Fetch a model from the hub into the hub's own cache: safetensors and tokenizer, no pickles."""

import shutil
import threading
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    DryRunError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name

from .cache import megabytes, no_space
from .errors import BadInput, NarrowError, Unreachable
from .progress import Track, silent

WANTED = (
    "config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json",
    "model-*-of-*.safetensors", "tokenizer*", "vocab.*", "merges.txt", "spiece.model",
    "special_tokens_map.json", "added_tokens.json", "chat_template*", "LICENSE*",
    "keep.safetensors", "vocabulary.safetensors",  # of a narrowed model
)  # fmt: skip
PICKLED = ("pytorch_model*.bin", "*.pth", "*.pt", "*.ckpt", "*.h5", "*.msgpack")
LOCAL = (
    "Without the hub: the alias smollm2-135m (a package), a folder that exists, a .gguf file, or a "
    "model that the hub's cache (HF_HOME) holds already."
)


def download(
    repo: str, revision: str | None = None, *, code: bool = False, track: Track = silent
) -> Path:
    """The folder with the model's files, taken from the cache where the hub is out of reach.

    `code` fetches the Python files that come with the model too. Raises BadInput for a model or
    revision that is not there and for one without safetensors, Unreachable for one that is gated
    and where neither the hub nor its cache has the model.
    """
    wanted = [*WANTED, *(["*.py"] if code else [])]
    try:
        return _download(repo, revision, wanted, track)
    except NarrowError:
        raise
    except Exception as error:  # of the hub's client, of its HTTP client, of the disk
        raise _told(error, repo, revision) from error


def _download(repo: str, revision: str | None, wanted: list[str], track: Track) -> Path:
    try:
        files = snapshot_download(
            repo, revision=revision, allow_patterns=[*wanted, *PICKLED], dry_run=True
        )
    except (DryRunError, LocalEntryNotFoundError) as error:
        if isinstance(error.__cause__, RepositoryNotFoundError):  # gated ones too
            raise error.__cause__ from None
        return _cached(repo, revision, wanted, error)
    pickled = [file.filename for file in files if _is_pickled(file.filename)]
    safe = [file for file in files if file.filename not in pickled]
    if not any(fnmatch(file.filename, "model*.safetensors") for file in safe):
        what = f"only pickled weights ({pickled[0]})" if pickled else "no weights"
        raise BadInput(
            f"{repo} on the hub has {what}; model.safetensors is needed. Choose another revision, "
            "or save the model with safetensors and give the folder."
        )
    missing = [file for file in safe if file.will_download]
    if missing:
        _fetch(repo, missing, track)
    return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))


def _fetch(repo: str, files: Sequence[Any], track: Track) -> None:
    """Put the files into the hub's cache, counting the megabytes as they reach the disk."""
    cache = Path(constants.HF_HUB_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    total, free = sum(file.file_size or 0 for file in files), shutil.disk_usage(cache).free
    if total > free:
        raise BadInput(
            f"No space left on the disk of {cache}: {repo} needs {total / 1e6:,.0f} MB, "
            f"{free / 1e6:,.0f} MB are free. Free some, or set HF_HOME to another disk."
        )
    failed: list[BaseException] = []

    def work() -> None:
        try:
            for file in files:
                hf_hub_download(repo, file.filename, revision=file.commit_hash)
        except BaseException as error:
            failed.append(error)

    # A daemon, so that Ctrl-C does not wait for the download.
    thread = threading.Thread(target=work, daemon=True)
    store = cache / repo_folder_name(repo_id=repo, repo_type="model")
    fetched = megabytes(store, thread.is_alive)
    thread.start()
    for _ in track(fetched, f"{repo} (MB)", total // 1_000_000):
        pass
    if failed:
        raise failed[0]


def _cached(repo: str, revision: str | None, wanted: list[str], error: Exception) -> Path:
    """The model as the cache holds it."""
    try:
        folder = Path(
            snapshot_download(
                repo, revision=revision, allow_patterns=wanted, local_files_only=True
            )
        )
        if any(folder.glob("model*.safetensors")):
            return folder
    except LocalEntryNotFoundError:
        pass
    reason = _first_line(error.__cause__ or error)
    raise Unreachable(
        f"{_name(repo, revision)}: the hub cannot be reached ({reason}), and its cache does not "
        f"hold the model. Try again with a network. {LOCAL}"
    ) from error


def _told(error: Exception, repo: str, revision: str | None) -> NarrowError:
    """What went wrong, in the user's terms."""
    if isinstance(error, GatedRepoError):
        return Unreachable(
            f"{repo} is gated: accept its licence on its page of the hub, then log in "
            f"(hf auth login, or HF_TOKEN). {LOCAL}"
        )
    if isinstance(error, RepositoryNotFoundError | HFValidationError):
        return BadInput(
            f"{repo} is neither a folder nor a model on the hub. Check the name; for a private "
            "model log in first (hf auth login, or HF_TOKEN)."
        )
    if isinstance(error, RevisionNotFoundError):
        return BadInput(
            f"{repo} has no revision {revision!r} on the hub. Give a branch, tag or commit it has."
        )
    full = no_space(error, Path(constants.HF_HUB_CACHE))
    return full or Unreachable(
        f"{_name(repo, revision)} cannot be fetched ({_first_line(error)}). Try again. {LOCAL}"
    )


def _is_pickled(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in PICKLED)


def _name(repo: str, revision: str | None) -> str:
    return f"{repo}@{revision}" if revision else repo


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
