"""The folder of a run that is not finished: what it was asked for, and what it has so far.

A run that trains keeps `RUN.unfinished` beside the place of its run folder: `job.json`, the states
of its training, and the weights that each finished part left, so that nothing done is done again.
The run folder itself appears whole, at the end, and the unfinished one goes.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import processes
from .cache import written_whole
from .errors import BadInput

SUFFIX = ".unfinished"
FREE = ("save_every_minutes", "trackers")  # settings of `train` that change no weight


@dataclass(frozen=True)
class Job:
    """What a run was asked for. `recipe` is resolved; `line` is how it was asked."""

    command: Literal["prune", "recover"]
    line: str
    recipe: Mapping[str, Any]
    scores: str | None = None  # the score file given

    def same(self) -> dict[str, Any]:
        """What has to be the same to go on."""
        train = {k: v for k, v in self.recipe["train"].items() if k not in FREE}
        return {
            "command": self.command, "scores": self.scores, **self.recipe, "train": train
        }  # fmt: skip


@dataclass(frozen=True)
class Work:
    """An unfinished run."""

    folder: Path
    place: Path  # of the run folder to be
    resumed: bool

    def part(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The tensors and facts of a finished part; None where it is not finished.

        Every process has to call it. Raises BadInput where it is damaged.
        """
        folder = self.folder / name
        # Asked together: else a process that is late finds what a quicker one has just written,
        # and leaves it waiting.
        if not processes.agreed(folder.exists()):
            return None
        try:
            facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
            return load_file(folder / "tensors.safetensors"), facts
        except (OSError, ValueError, SafetensorError) as error:
            raise BadInput(
                f"{folder} is damaged ({error}). Remove it: only this part is then done again."
            ) from None

    def finish(self, name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Keep what a part left, whole or not at all. Every process has to call it."""
        if processes.first():
            self._write(name, tensors, facts)
        processes.wait()

    def _write(self, name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        with written_whole(self.folder / name, force=True) as fresh:
            plain = {name: t.contiguous() for name, t in tensors.items()}
            save_file(plain, fresh / "tensors.safetensors")
            (fresh / "facts.json").write_text(json.dumps(facts), encoding="utf-8")

    def done(self) -> None:
        """The run folder is written: nothing of this is needed any more."""
        if processes.first():
            shutil.rmtree(self.folder, ignore_errors=True)


def unfinished(place: Path) -> Path:
    """Where the unfinished run of a run folder is."""
    return place.with_name(place.name + SUFFIX)


def begin(place: Path, job: Job, *, force: bool = False) -> Work:
    """Begin a run, or go on with an unfinished one of the same job.

    An unfinished run of another job is dropped with `force`, else refused with every key that
    differs.
    """
    folder = unfinished(place)
    if not processes.first():
        processes.wait()  # until the first one has begun it
        return Work(folder, place, False)
    work = _begun(folder, place, job, force)
    processes.wait()
    return work


def _begun(folder: Path, place: Path, job: Job, force: bool) -> Work:
    if folder.exists():
        differ = differences(read(place).same(), job.same())
        if not differ:
            return Work(folder, place, True)
        if not force:
            raise BadInput(
                f"{folder} is an unfinished run of something else:\n"
                + "".join(f"  {line}\n" for line in differ)
                + f"Go on with it by `llm-narrow resume {place}`, or begin anew with --force."
            )
        shutil.rmtree(folder)
    with written_whole(folder) as fresh:
        (fresh / "job.json").write_text(json.dumps(asdict(job), indent=2), encoding="utf-8")
    return Work(folder, place, False)


def read(place: Path) -> Job:
    """The job of the unfinished run of a run folder. Raises BadInput where there is none."""
    file = unfinished(place) / "job.json"
    try:
        return Job(**json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        told = "is finished" if (place / "manifest.json").exists() else "has not been begun"
        raise BadInput(
            f"{place} {told}: there is no {file.parent.name} beside it. Give the folder that --out "
            "named, of a run that trains (--recover-tokens, --method lasso)."
        ) from None
    except (OSError, ValueError, TypeError) as error:
        raise BadInput(
            f"{file} cannot be read: {error}. Remove {file.parent} to begin anew."
        ) from None


@torch.no_grad()
def fill(model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Put kept weights into a model of the same shape, in place."""
    named = dict(model.named_parameters())
    for name, held in tensors.items():
        named[name].copy_(held)


def weights(model: Any) -> dict[str, Tensor]:
    """The weights of a model as `finish` takes them; tied ones once."""
    return {name: p.detach().cpu() for name, p in model.named_parameters()}


def differences(was: Any, now: Any, path: str = "") -> list[str]:
    """Every key of nested mappings whose values differ, as a line."""
    if isinstance(was, dict) and isinstance(now, dict):
        keys = sorted(was.keys() | now.keys())
        return [
            line
            for key in keys
            for line in differences(was.get(key), now.get(key), f"{path}.{key}".lstrip("."))
        ]
    return [] if was == now else [f"{path} was {was!r} and is {now!r} now"]
