"""Runs a notebook from top to bottom in a kernel of its own, and keeps what its cells showed.

    python examples/docs/executed.py examples/quickstart.ipynb

writes the notebook anew with the outputs of this run. `--out` writes elsewhere, `--set model=X`
gives another value to a name of the cell tagged `parameters`, in this run only. Files that the
notebook writes go to `--folder`, one to throw away unless it is given.
"""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nbformat
from nbclient import NotebookClient

COLOURS = re.compile(r"\x1b\[[\d;]*m")
SHOWN = ("text/plain", "text/html", "text/markdown", "image/png")  # what is kept of an output


def run(notebook: Any, folder: Path, values: Mapping[str, Any], timeout: int) -> None:
    """Run all cells in place, in the folder. Raises CellExecutionError where one fails."""
    found = [n for n, c in enumerate(notebook.cells) if "parameters" in c.metadata.get("tags", ())]
    if values:
        names = [line.partition(" =")[0] for line in notebook.cells[found[0]].source.splitlines()]
        if unknown := {*values} - {*names}:
            raise SystemExit(f"The notebook has no parameter {', '.join(sorted(unknown))}.")
        text = "\n".join(f"{name} = {value!r}" for name, value in values.items())
        notebook.cells.insert(found[0] + 1, nbformat.v4.new_code_cell(text))
    NotebookClient(
        notebook, timeout=timeout, kernel_name="python3", record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    ).execute()  # fmt: skip
    if values:
        del notebook.cells[found[0] + 1]
    for number, cell in enumerate(c for c in notebook.cells if c.cell_type == "code"):
        cell.execution_count = number + 1
        # What libraries write to stderr, bars and warnings with paths, is of this machine.
        cell.outputs = [one for one in cell.outputs if one.get("name") != "stderr"]
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = number + 1
            for kind in [k for k in output.get("data", {}) if k not in SHOWN]:
                del output.data[kind]
            if "text/plain" in output.get("data", {}):
                output.data["text/plain"] = COLOURS.sub("", output.data["text/plain"])
    for name in [name for name in notebook.metadata if name not in ("kernelspec", "language_info")]:
        del notebook.metadata[name]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the notebook that is named, and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebook", type=Path, help="an .ipynb file")
    parser.add_argument("--out", type=Path, help="where to write it; in its place unless given")
    parser.add_argument("--folder", type=Path, help="where to run it; a new one unless given")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE",
                        help="a parameter of this run, as JSON or as a string")  # fmt: skip
    parser.add_argument("--timeout", type=int, default=3600, help="seconds that a cell may take")
    o = parser.parse_args(argv)
    values = {name: value for name, _, value in (given.partition("=") for given in o.set)}
    for name, value in values.items():
        try:
            values[name] = json.loads(value)
        except ValueError:
            continue
    notebook = nbformat.read(o.notebook, as_version=4)
    with TemporaryDirectory() as fresh:
        run(notebook, o.folder or Path(fresh), values, o.timeout)
    nbformat.validate(notebook)
    nbformat.write(notebook, o.out or o.notebook)


if __name__ == "__main__":
    main()
