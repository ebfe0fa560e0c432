"""Narrow a model to the code of one folder: a git checkout or any other, in any language.

    python examples/your_repo.py ~/code/mine
    python examples/your_repo.py . --glob '**/*.rs' --recover-tokens 100k --out runs/mine

takes the files that git tracks (all that are not hidden, where there is no git), of the language
that most of them are in unless a glob says otherwise. Files that seem to hold a secret are left
out. Whole files are held out, copies are dropped, and what is too small is refused before anything
runs. Stopped, the same line goes on where it was.
"""

import argparse
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

import llm_narrow
from llm_narrow import blocks, domains, sources
from llm_narrow.errors import BadInput, NarrowError, problems
from llm_narrow.rows import Row

# Endings of what is no program, though it is text.
NO_CODE = {
    "", ".cfg", ".csv", ".html", ".ini", ".ipynb", ".json", ".jsonl", ".lock", ".log", ".map",
    ".md", ".po", ".rst", ".svg", ".toml", ".txt", ".xml", ".yaml", ".yml",
}  # fmt: skip
SECRETS = {
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY",
    "a key of AWS": r"\bAKIA[0-9A-Z]{16}\b",
    "a token of GitHub": r"\bgh[pousr]_[A-Za-z0-9]{36,}",
    "a token of Slack": r"\bxox[abprs]-[A-Za-z0-9-]{10,}",
    "a key of an API": r"\bsk-[A-Za-z0-9_-]{20,}",
    "a password or token": (
        r"(?i)(passw(or)?d|secret|api_?key|token)[\"']?\s*[:=]\s*[\"'][^\"'\s]{16,}[\"']"
    ),
}  # fmt: skip
LICENCE = re.compile(r"(licen[cs]e|copying|notice)", re.IGNORECASE)
SPDX = re.compile(r"SPDX-License-Identifier:\s*([\w.+-]+)")
HEAD = 2000  # characters in which a file tells its licence
LARGEST = 2_000_000  # bytes of a file; larger ones are no source that somebody wrote
LEAST = {"calibration": 16, "held_out": 8, "train": 16}  # blocks
MOST = {"calibration": 65536, "held_out": 32768}  # tokens, the defaults of `prune`


@dataclass(frozen=True)
class File:
    """A file to narrow on: its place in the folder and what is in it."""

    path: str
    text: str


def listed(folder: Path) -> tuple[list[str], str]:
    """The files of the folder, with `/` between folders, and in words where that is from."""
    if not folder.is_dir():
        raise BadInput(f"There is no folder {folder}. Name the one that holds your code.")
    command = ["git", "-C", str(folder), "ls-files", "-z"]
    try:
        done = subprocess.run(command, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return sources.walk(folder), "that are not hidden"
    names = {name for name in done.stdout.decode("utf-8", "surrogateescape").split("\0") if name}
    if not names:
        return sources.walk(folder), "that are not hidden"
    return sorted(name for name in names if (folder / name).is_file()), "that git tracks"


def main_glob(folder: Path, paths: Iterable[str]) -> str:
    """A glob for the ending that most bytes of code have."""
    sizes: Counter[str] = Counter()
    for path in paths:
        if Path(path).suffix.lower() not in NO_CODE and is_text(folder / path):
            sizes[Path(path).suffix] += (folder / path).stat().st_size
    if not sizes:
        raise BadInput(f"No file of {folder} looks like code. Say which to take with --glob.")
    return f"**/*{sizes.most_common(1)[0][0]}"


def is_text(file: Path) -> bool:
    """Whether a file may be text, going by its size and beginning."""
    if file.stat().st_size > LARGEST:
        return False
    with file.open("rb") as opened:
        return b"\0" not in opened.read(8192)


def read(folder: Path, paths: Iterable[str]) -> list[File]:
    """The files that are UTF-8 text."""
    found = []
    for path in paths:
        if is_text(folder / path):
            try:
                found.append(File(path, (folder / path).read_text(encoding="utf-8")))
            except UnicodeDecodeError:
                continue
    return found


def secrets(file: File) -> list[str]:
    """What in a file looks like a secret: the line and the kind, never the secret itself."""
    return [
        f"{file.path}:{file.text.count(chr(10), 0, m.start()) + 1}: {what}"
        for what, pattern in SECRETS.items()
        if (m := re.search(pattern, file.text))
    ]


def licences(folder: Path, paths: Iterable[str], files: Iterable[File]) -> list[str]:
    """What licence files begin with, and the licences that files name for themselves."""
    found = []
    for path in paths:
        if LICENCE.match(Path(path).name) and is_text(folder / path):
            text = (folder / path).read_text(encoding="utf-8", errors="replace")
            first = next((line.strip() for line in text.splitlines() if line.strip()), "empty")
            found.append(f"{path}: {first[:80]}")
    named = Counter(m[1] for f in files if (m := SPDX.search(f.text[:HEAD])))
    return found + [f"{count} files say {name}" for name, count in named.most_common()]


def written(files: Iterable[File], place: Path) -> Path:
    """The files as rows, written only where they have changed: a run goes on with the same text."""
    text = "".join(json.dumps({"path": f.path, "text": f.text}) + "\n" for f in files)
    if not place.is_file() or place.read_text(encoding="utf-8") != text:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text, encoding="utf-8")
    return place


def budget(rows: Path, folder: Path, o: argparse.Namespace, console: Console) -> dict[str, Any]:
    """How many tokens each part gives. Raises BadInput, with all that is too small."""
    domain = domains.load(str(rows), text_column="text", project_column="path")
    for why, count in domain.dropped.items():
        console.print(f"Left out as {why}: {count}", highlight=False)
    tokenizer = llm_narrow.load(o.model).tokenizer
    found, wrong = {}, []
    for part in ("calibration", "held_out", *(["train"] if o.recover_tokens != "0" else [])):
        files = len(domain.documents[part])
        try:
            packed = blocks.pack(domain, part, tokenizer, length=o.length)
        except BadInput as error:
            wrong.append(str(error))
            continue
        count, tokens = len(packed.tokens), packed.tokens.numel()
        console.print(f"{part}: {tokens:,} tokens of {files} files", highlight=False)
        if count < (least := LEAST[part]):
            wrong.append(
                f"{part}: {tokens:,} tokens of {files} files, and {least * o.length:,} are needed "
                f"({least} blocks of {o.length})"
            )
        found[part] = min(tokens, MOST.get(part, tokens))
    if wrong:
        wrong.append("Name a folder with more code, take more of it with --glob, or give shorter "
                     "blocks, such as --length 128")  # fmt: skip
        raise problems(f"{folder} is too small to narrow on", wrong)
    settings = {"calibration_tokens": found["calibration"], "held_out_tokens": found["held_out"]}
    if "train" in found:
        share = found["train"] // 10 // o.length * o.length
        settings["validation_tokens"] = max(o.length, min(16384, share))
    return settings


def told(rows: Sequence[Row], folder: Path) -> str:
    """Before and after, and where the result is."""
    before, after = rows
    ratio = after.bits_per_byte_ratio
    assert ratio is not None
    return (
        f"Parameters: {before.parameters:,} → {after.parameters:,} "
        f"({after.parameters / before.parameters:.1%})\n"
        f"Bits per byte on held-out files: {before.bits_per_byte.value:.3f} → "
        f"{after.bits_per_byte.value:.3f}, {ratio.value:.3f} times the whole model's "
        f"[{ratio.low:.3f}, {ratio.high:.3f}]\n"
        f"The model is in {folder / 'model'}, the report in {folder / 'report.md'}."
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a git checkout, or any folder")
    parser.add_argument("--glob", help="which files; of the language that most are in unless given")
    parser.add_argument("--model", default="smollm2-135m", help="(smollm2-135m)")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--sparsity", help="share of the neurons to remove (0.5)")
    size.add_argument("--target-params", help="parameters to keep: 60%%, 90M")
    parser.add_argument("--recover-tokens", default="0", help="to train on afterwards (0)")
    parser.add_argument("--length", type=int, default=512, help="tokens of a block (512)")
    parser.add_argument("--with-secrets", action="store_true", help="leave no file out for secrets")
    parser.add_argument("--out", type=Path, help="the run folder; runs/FOLDER unless given")
    parser.add_argument("--force", action="store_true", help="replace the run folder")
    parser.add_argument("--no-speed", action="store_true", help="do not measure tokens/s")
    return parser.parse_args(argv)


def run(o: argparse.Namespace, console: Console) -> None:
    """Look at the files, check that they are enough, narrow, and tell what came out."""
    paths, which = listed(o.folder)
    glob = o.glob or main_glob(o.folder, paths)
    chosen = [path for path in paths if sources.matches(path, glob)]
    if not chosen:
        raise BadInput(f"None of the {len(paths)} files {which} fits --glob {glob!r}. Try '**/*'.")
    files = read(o.folder, chosen)
    size = sum(len(f.text.encode()) for f in files)
    console.print(f"{len(files)} files {which} fit {escape(glob)}: {size / 1e3:,.0f} kB",
                  highlight=False)  # fmt: skip
    found = {f.path: hits for f in files if (hits := secrets(f))}
    for hit in (hit for hits in found.values() for hit in hits):
        console.print(f"[red]Secret?[/] {escape(hit)}", highlight=False, soft_wrap=True)
    if found and not o.with_secrets:
        files = [f for f in files if f.path not in found]
        console.print(f"{len(found)} of the files are left out for that (--with-secrets has them).")
    for line in licences(o.folder, paths, files) or ["no file tells one"]:
        console.print(f"Licence: {line}", highlight=False, markup=False, soft_wrap=True)
    console.print("A model can repeat what it was trained on: share the weights as you may share "
                  "the code.")  # fmt: skip
    out = o.out or Path("runs") / o.folder.resolve().name
    rows = written(files, out.with_name(f"{out.name}-text.jsonl"))
    settings = budget(rows, o.folder, o, console)
    given = {"sparsity": o.sparsity, "target_params": o.target_params}
    done = llm_narrow.prune(
        model=o.model, domain=str(rows), text_column="text", project_column="path", out=out,
        length=o.length, recover_tokens=o.recover_tokens, speed=not o.no_speed, force=o.force,
        console=console, **settings, **given,
    )  # fmt: skip
    console.print(told(done.rows, out), highlight=False, soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> None:
    """The command; errors that the user can mend are a line and exit code 2."""
    o = parse(argv)
    console = Console()
    try:
        run(o, console)
    except NarrowError as error:
        Console(stderr=True).print(str(error), style="red", soft_wrap=True, markup=False)
        sys.exit(2)


if __name__ == "__main__":
    main()
