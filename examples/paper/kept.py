"""What the scripts here share: options, inputs, finished rows, results written whole."""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llm_narrow.paper_toys import keep


def options(what: str, out: str) -> argparse.ArgumentParser:
    """A parser with the options that both scripts have."""
    parser = argparse.ArgumentParser(
        description=what, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m", help="as for `llm-narrow prune`")
    parser.add_argument("--domain", default="python")
    parser.add_argument("--length", type=int, default=512, help="tokens of a block")
    parser.add_argument("--batch-size", type=int, default=4, help="blocks fed at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu, mps, cuda or cuda:N")
    parser.add_argument("--out", type=Path, default=Path(out), help="a folder of its own")
    return parser


def gathered(args: argparse.Namespace, console: Any, **more: Any) -> tuple[Any, Any, Any]:
    """Recipe, inputs and track, by the same steps as `llm-narrow prune`: so the same blocks."""
    from llm_narrow import inputs

    names = ("model", "domain", "length", "batch_size", "seed", "device")
    given = {name: getattr(args, name) for name in names}
    recipe, _, track = inputs.begin(None, {**given, "kinds": "neurons", **more}, console)
    return recipe, inputs.gather(recipe, track=track), track


def made_of(about: Mapping[str, Any]) -> str:
    """A hash of what a result depends on."""
    text = json.dumps(about, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Rows:
    """Finished rows of one making, on disk line by line, each known by its key."""

    def __init__(self, file: Path, making: str) -> None:
        """Read those that are there; a line that a kill cut short is dropped."""
        self.file, self.making = file, making
        self.done: dict[str, dict[str, Any]] = {}
        whole = []
        for line in file.read_text("utf-8").splitlines() if file.exists() else ():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            whole.append(line)
            if row["made_of"] == making:
                self.done[row["key"]] = row
        if file.exists():
            keep(file, "".join(f"{line}\n" for line in whole))

    def add(self, key: str, row: Mapping[str, Any]) -> dict[str, Any]:
        """Keep a row, on the disk when this returns."""
        self.done[key] = {"key": key, "made_of": self.making, **row}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self.done[key]) + "\n")
            file.flush()
            os.fsync(file.fileno())
        return self.done[key]


def finished(out: Path, name: str, result: Mapping[str, Any], draw: Callable[[], Any]) -> None:
    """Write OUT/NAME.json last, after its figure, which needs `llm-narrow[report]`."""
    told = []
    try:
        figure = draw()
    except ModuleNotFoundError as error:
        print(f"No figure: {error}. Install llm-narrow[report].", file=sys.stderr)
    else:
        keep(out / "figures" / f"{name}.svg", figure.svg)
        keep(out / "figures" / f"{name}.png", figure.png)
        told = [{k: getattr(figure, k) for k in ("name", "title", "caption", "alt")}]
    keep(out / f"{name}.json", json.dumps({**result, "figures": told}, indent=1) + "\n")
