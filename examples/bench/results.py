"""What the scripts here share: the inputs of a run, rows kept as they are made, tables of them.

A row is written to runs/bench/NAME.jsonl the moment it is finished, with a hash of what it was
made of (model, blocks, settings). A script that is started again takes the rows whose hash is
still right as done, and goes on with the rest.
"""

import argparse
import hashlib
import json
import os
import platform
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KEPT = Path("runs") / "bench"


def options(what: str, out: str) -> argparse.ArgumentParser:
    """A parser with the options that all scripts have."""
    parser = argparse.ArgumentParser(
        description=what, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m", help="as for `llm-narrow prune`")
    parser.add_argument("--length", type=int, default=512, help="tokens of a block")
    parser.add_argument("--batch-size", type=int, default=4, help="blocks of a batch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu, mps, cuda or cuda:N")
    parser.add_argument("--domain", default="python")
    parser.add_argument("--calibration-tokens", type=int, default=65536)
    parser.add_argument("--out", type=Path, default=Path(out), help="writes OUT.json and OUT.md")
    parser.add_argument("--fresh", action="store_true", help="repeat what is finished already")
    return parser


@dataclass(frozen=True)
class Start:
    """A loaded model with its groups, and the blocks to score and refit on and to measure on."""

    recipe: Any
    inputs: Any
    calibration: Any
    held_out: Any
    console: Any
    track: Any

    @property
    def facts(self) -> dict[str, Any]:
        """What every row depends on."""
        from llm_narrow import __version__

        facts = {
            "llm_narrow": __version__,
            "model": self.inputs.loaded.name,
            "model_sha256": self.inputs.loaded.sha256,
            "domain": self.inputs.domain.name,
            "calibration_tokens": self.calibration.tokens.numel(),
            "calibration_sha256": self.calibration.sha256,
            "precision": precision(self.inputs.bf16),
            "batch_size": self.recipe.blocks.batch_size,
            "seed": self.recipe.seed,
        }
        if self.held_out is not None:
            facts["held_out_tokens"] = self.held_out.tokens.numel()
            facts["held_out_sha256"] = self.held_out.sha256
        return facts


def start(
    args: argparse.Namespace, *, kind: str = "neurons", dtype: str = "float32",
    measures: bool = True,
) -> Start:  # fmt: skip
    """Load what the options name, by the same steps as `llm-narrow prune`: so the same blocks."""
    from llm_narrow import inputs
    from llm_narrow.progress import silent

    console = console_of()
    names = ("model", "domain", "length", "batch_size", "calibration_tokens", "seed", "device")
    given = {name: getattr(args, name) for name in names} | {"kinds": kind, "dtype": dtype}
    if measures:
        given["held_out_tokens"] = args.held_out_tokens
    recipe, _, track = inputs.begin(None, given, console)
    if not console.is_terminal:  # in a log, the lines of finished rows are progress enough
        track = silent
    gathered = inputs.gather(recipe, track=track)
    calibration = inputs.calibration(gathered, recipe, track=track)
    held_out = None
    if measures:
        held_out = inputs.held_out(gathered.loaded, gathered.domain, recipe, track=track)
    return Start(recipe, gathered, calibration, held_out, console, track)


def console_of() -> Any:
    """Where progress is told: beside standard output."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def precision(bf16: bool) -> str:
    """What the passes ran in, in words."""
    return "bfloat16 passes" if bf16 else "float32"


def machine() -> dict[str, Any]:
    """What timings depend on beside the code."""
    from importlib.metadata import version

    import torch

    return {
        "torch": version("torch"),
        "transformers": version("transformers"),
        "threads": torch.get_num_threads(),
        "processor": platform.machine(),
        "capabilities": torch.backends.cpu.get_cpu_capability(),
    }


def peak_bytes() -> int:
    """The most memory that this process has had at one time.

    On Linux from /proc: the ru_maxrss of a process there begins with that of its parent.
    """
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def held_bytes() -> int | None:
    """The memory that this process has now; None where the system does not tell."""
    return _status("VmRSS")


def reset_peak() -> bool:
    """Have the peak begin anew. False where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return int(found[0]) * 1024 if found else None


class Rows:
    """The finished rows of one script, on disk line by line; a row is known by its `key`."""

    def __init__(self, out: Path, made_of: Mapping[str, Any], *, fresh: bool = False) -> None:
        """Read what is finished of the same making; `fresh` forgets it."""
        self.file = KEPT / f"{out.name}.jsonl"
        text = json.dumps(made_of, sort_keys=True)
        self.made_of = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.done: dict[str, dict[str, Any]] = {}
        if fresh:
            self.file.unlink(missing_ok=True)
        for line in self.file.read_text("utf-8").splitlines() if self.file.exists() else ():
            try:
                row = json.loads(line)
            except ValueError:  # the last line of a run that was killed
                continue
            if row.get("made_of") == self.made_of:
                self.done[row["key"]] = row

    def add(self, key: str, row: Mapping[str, Any]) -> None:
        """Keep a finished row, on the disk when this returns."""
        whole = {"key": key, "made_of": self.made_of, **row}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("ab+") as file:
            file.seek(0)
            held = file.read()
            cut = "\n" if held and not held.endswith(b"\n") else ""
            file.write(f"{cut}{json.dumps(whole)}\n".encode())
            file.flush()
            os.fsync(file.fileno())
        self.done[key] = whole


def write(
    out: Path, about: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], text: str
) -> None:
    """OUT.json with the rows and what they were made of, and OUT.md with the table."""
    out.parent.mkdir(parents=True, exist_ok=True)
    told = [{k: v for k, v in row.items() if k not in ("key", "made_of")} for row in rows]
    contents = {
        ".json": json.dumps({"about": about, "rows": told}, indent=1, ensure_ascii=False) + "\n",
        ".md": text,
    }
    for ending, content in contents.items():
        fresh = out.with_name(f".{out.name}{ending}")
        fresh.write_text(content, "utf-8")
        fresh.replace(out.with_name(out.name + ending))


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are numbers, so they stand to the right."""
    rule = ["---"] + ["--:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *lines)) + "\n"


def interval(e: Mapping[str, float]) -> str:
    """A value with its 95 % interval."""
    return f"{e['value']:+.3f} ({e['low']:+.3f} to {e['high']:+.3f})"


def measured(sums: Any, whole: Any, seed: int) -> dict[str, Any]:
    """A model's held-out figures as against the whole model's, documents paired."""
    from dataclasses import asdict

    from llm_narrow import measure

    return {
        "loss": measure.quality_of(sums, seed=seed).loss.value,
        "above": asdict(measure.difference(whole, sums, seed=seed)),
        "bits_per_byte_ratio": asdict(measure.bits_per_byte_ratio(whole, sums, seed=seed)),
    }


def document_sums(start: Start, model: Any, blocks: Any = None, *, exact: bool = False) -> Any:
    """What the model makes of the held-out blocks, by document; in float32 if `exact`."""
    from llm_narrow import measure

    return measure.document_sums(
        model, blocks or start.held_out, batch_size=start.recipe.blocks.batch_size,
        bf16=start.inputs.bf16 and not exact, track=start.track,
    )  # fmt: skip


def told(main: Callable[[Sequence[str] | None], None]) -> None:
    """Run a script; what the user can mend is one line and exit code 2."""
    from llm_narrow.errors import NarrowError

    try:
        main(None)
    except NarrowError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
