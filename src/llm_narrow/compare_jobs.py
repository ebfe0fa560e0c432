"""A comparison in several processes: each takes runs that no other is at, until none are left.

On CPUs every process gets its share of the threads, on GPUs a GPU of its own. What they tell goes
into files below the comparison's `work/jobs`.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch

from .allocator import keep_freed_memory
from .compare_cells import Ground
from .compare_shapes import Asked, Cell
from .errors import NarrowError
from .recipe import Recipe

POLL = 1.0  # seconds between two looks at what is done


def run(ground: Ground, recipe: Recipe, jobs: int) -> None:
    """Do what is left of the comparison in `jobs` processes, and wait for them.

    Raises NarrowError, after the others were ended, where one failed; its file is named.
    """
    folder = ground.work.folder / "jobs"
    folder.mkdir(exist_ok=True)
    asked = {
        "place": str(ground.work.place.absolute()), "command": ground.command,
        "recipe": recipe.model_dump(mode="json", exclude_none=True),
        "asked": asdict(ground.asked), "parent": os.getpid(),
    }  # fmt: skip
    file = folder / "asked.json"
    file.write_text(json.dumps(asked, indent=2), encoding="utf-8")
    started: list[subprocess.Popen[bytes]] = []
    try:
        for number in range(jobs):
            with (folder / f"job-{number + 1}.log").open("ab") as log:
                started.append(
                    subprocess.Popen(
                        [sys.executable, "-m", __name__, str(file)],
                        stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                        env={**os.environ, **share(ground.start.device, number, jobs)},
                    )
                )  # fmt: skip
        ground.console.print(
            f"{jobs} processes share the runs; what they tell is in {folder}{os.sep}job-N.log"
        )
        cells = [c for c in ground.asked.cells(ground.recipe.seed) if not _done(ground, c)]
        for cell in ground.track(_finished(ground, cells, started, folder), "runs", len(cells)):
            ground.console.print(f"{cell.method} at {cell.size}, seed {cell.seed}: done")
    finally:
        for process in started:
            if process.poll() is None:
                process.terminate()
        for process in started:
            process.wait()


def share(device: torch.device, number: int, jobs: int) -> dict[str, str]:
    """What of the machine a process gets, as variables of its environment."""
    if device.type == "cuda" and device.index is None:
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        there = named.split(",") if named else [str(n) for n in range(torch.cuda.device_count())]
        return {"CUDA_VISIBLE_DEVICES": there[number % len(there)]}
    if device.type == "cpu":
        return {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // jobs))}
    return {}


def main(file: Path) -> None:
    """What each of the processes does."""
    from . import compare_runs, recipe
    from .inputs import begin
    from .options import told_on
    from .scores import CRITERIA

    keep_freed_memory()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    asked = json.loads(file.read_text(encoding="utf-8"))
    threading.Thread(target=_watch, args=(asked["parent"],), daemon=True).start()
    settings, console, _ = begin(
        recipe.of(asked["recipe"], criteria=CRITERIA), {}, told_on(quiet=False)
    )
    wanted = Asked(**asked["asked"])
    try:
        compare_runs.join(settings, wanted, Path(asked["place"]), asked["command"], console)
    except NarrowError as error:
        print("\n".join([str(error), *getattr(error, "__notes__", [])]), flush=True)
        raise SystemExit(2) from None


def _finished(
    ground: Ground, cells: Sequence[Cell], started: Sequence[subprocess.Popen[bytes]], folder: Path
) -> Iterator[Cell]:
    """Each cell when its run is there, until all processes have ended."""
    left = list(cells)
    while True:
        codes = [process.poll() for process in started]
        for cell in [c for c in left if _done(ground, c)]:
            left.remove(cell)
            yield cell
        for number, code in enumerate(codes, 1):
            if code:
                log = folder / f"job-{number}.log"
                said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
                raise NarrowError(f"Process {number} failed: {said[-1] if said else code}\n{log}")
        if all(code == 0 for code in codes):
            return
        time.sleep(POLL)


def _done(ground: Ground, cell: Cell) -> bool:
    return (ground.work.place / cell.name / "manifest.json").is_file()


def _watch(parent: int) -> None:
    """End with the process that started this one, even where that was killed."""
    with suppress(AttributeError):  # not every system tells
        while os.getppid() == parent:
            time.sleep(POLL)
        os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
