"""Whether the wheel installs and works in an empty environment of each Python.

    python examples/packaging/install.py --python python3.11,python3.12,python3.13 \
        --out docs/bench/install

Builds the sdist and, from it, the wheel (the packages `build` and `setuptools` of this environment,
no other), installs the wheel alone into a new environment outside of the repository with the
versions of constraints.txt, and uses it there: the version, the help, `inspect` and `prune` of a
tiny model. A Python that is not there is told and left out.

    python examples/packaging/install.py --borrow --out docs/bench/install

takes all packages but our own from this environment: quick, and still shows that nothing relies on
the source tree.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("src", "recipes", "pyproject.toml", "README.md", "LICENSE")  # all that a build reads
WORDS = ("the", "unit", "group", "score", "keep")
SMALL = ("--length", "32", "--calibration-tokens", "512", "--held-out-tokens", "256",
         "--sparsity", "0.5", "--samples", "0", "--no-speed", "--no-report")  # fmt: skip
# Runs in the new environment, with stock packages alone.
MODEL = """
import sys
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
tokenizer = Tokenizer(BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
alphabet = pre_tokenizers.ByteLevel.alphabet()
trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet)
tokenizer.train_from_iterator([], trainer)
PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(sys.argv[1])
sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
config = LlamaConfig(vocab_size=320, intermediate_size=48, num_key_value_heads=2, **sizes)
LlamaForCausalLM(config).save_pretrained(sys.argv[1])
"""
WHERE = """
import json, platform, sys, llm_narrow
from importlib.metadata import distributions, version
names = ("torch", "transformers", "huggingface_hub", "typer", "pydantic")
told = {"python": platform.python_version(), "llm-narrow": llm_narrow.__version__}
told |= {name: version(name) for name in names}
home, count = llm_narrow.__file__, len([*distributions()])
print(json.dumps({"versions": told, "from": home, "packages": count}))
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Build, install, check, write the table; exits with 1 where a check failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default=sys.executable, help="Interpreters, by commas.")
    parser.add_argument("--out", type=Path, help="Two files, of this name with .json and .md.")
    parser.add_argument("--work", type=Path, help="Where environments go; a temporary folder.")
    parser.add_argument("--constraints", type=Path, default=ROOT / "constraints.txt")
    parser.add_argument("--extras", default="", help="Extras to install with it, by commas.")
    parser.add_argument("--borrow", action="store_true", help="Take packages from this Python's.")
    asked = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=asked.work) as place:
        work = Path(place)
        wheel, sizes = build(work)
        found = [
            installed(name, wheel, work / f"env{number}", asked.constraints, asked.extras)
            for number, name in enumerate([] if asked.borrow else asked.python.split(","))
        ] or [borrowed(wheel, work / "env")]
    told = {"files": sizes, "borrowed": asked.borrow, "installs": found}
    print(page(told))
    if asked.out:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.with_suffix(".json").write_text(json.dumps(told, indent=1) + "\n")
        asked.out.with_suffix(".md").write_text(page(told))
    sys.exit(any(one.get("failed") for one in found))


def build(work: Path) -> tuple[Path, dict[str, int]]:
    """The wheel, built from the sdist that is built from a copy of what is here; bytes of both."""
    source = work / "source"
    leave = shutil.ignore_patterns("__pycache__", "*.egg-info")
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=leave)
        else:
            shutil.copy(ROOT / name, source / name)
    line = [sys.executable, "-m", "build", "--no-isolation", "--outdir", work / "dist", source]
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
    (wheel,) = (work / "dist").glob("*.whl")
    return wheel, {file.name: file.stat().st_size for file in sorted(wheel.parent.iterdir())}


def installed(
    name: str, wheel: Path, place: Path, constraints: Path, extras: str
) -> dict[str, Any]:
    """What came of it with the interpreter called `name`."""
    about: dict[str, Any] = {"asked": Path(name).name}
    if shutil.which(name) is None:
        return about | {"absent": True}
    started = time.perf_counter()
    subprocess.run([name, "-m", "venv", place], check=True)
    python = place / "bin" / "python"
    what = f"{wheel}[{extras}]" if extras else str(wheel)
    pip = [python, "-m", "pip", "install", "--quiet", "--no-compile",
           "--disable-pip-version-check"]  # fmt: skip
    done = subprocess.run([*pip, "-c", constraints, what], capture_output=True, text=True)
    about["install_seconds"] = round(time.perf_counter() - started)
    if done.returncode:
        return about | {"failed": ["pip install"], "told": {"pip install": last(done)}}
    about |= used(place, python)
    held = sum(f.stat().st_size for f in place.rglob("*") if f.is_file() and not f.is_symlink())
    return about | {"megabytes": round(held / 1e6)}


def borrowed(wheel: Path, place: Path) -> dict[str, Any]:
    """The same with the packages that this Python has, ours excepted."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
    python = place / "bin" / "python"
    line = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps",
            "--no-index", "--disable-pip-version-check", wheel]  # fmt: skip
    started = time.perf_counter()
    subprocess.run(line, check=True)
    about = {"asked": "borrowed", "install_seconds": round(time.perf_counter() - started)}
    (site,) = place.glob("lib/python*/site-packages")
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return about | used(place, python)


def used(place: Path, python: Path) -> dict[str, Any]:
    """Versions, and for each check the seconds or why it failed."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment["LLM_NARROW_CACHE"] = str(place / "cache")
    command, here = place / "bin" / "llm-narrow", place / "elsewhere"
    model, text, run = here / "model", here / "text", here / "run"
    text.mkdir(parents=True)
    for number in range(40):
        chance = random.Random(number)
        lines = (" ".join(chance.choices(WORDS, k=8)) + f" {x}"
                 for x in range(number * 100, number * 100 + 30))  # fmt: skip
        (text / f"project{number % 10}").mkdir(exist_ok=True)
        (text / f"project{number % 10}" / f"{number}.txt").write_text("\n".join(lines))
    stock = "from transformers import AutoModelForCausalLM as M; import sys; M.from_pretrained"
    checks: dict[str, list[object]] = {
        "where": [python, "-c", WHERE],
        "--version": [command, "--version"],
        "--help": [command, "--help"],
        "python -m llm_narrow": [python, "-m", "llm_narrow", "--version"],
        "--show-completion bash": [command, "--show-completion", "bash"],
        "models": [command, "models"],
        "a tiny model": [python, "-c", MODEL, model],
        "inspect": [command, "inspect", model, "--json"],
        "prune": [command, "prune", "--model", model, "--domain", text, "--out", run, *SMALL],
        "stock transformers": [python, "-c", f"{stock}(sys.argv[1])", run / "model"],
        "push --dry-run": [command, "push", run, "someone/tiny", "--dry-run"],
    }
    seconds, told, about = {}, {}, {}
    for check, line in checks.items():
        started = time.perf_counter()
        words = [str(word) for word in line]
        done = subprocess.run(words, cwd=here, env=environment, capture_output=True, text=True)
        seconds[check] = round(time.perf_counter() - started, 2)
        if done.returncode:
            told[check] = last(done)
        elif check == "where":
            about = json.loads(done.stdout)
            home = Path(about.pop("from"))
            if not home.is_relative_to(place):
                told[check] = "llm_narrow was imported from outside of the environment"
    return {**about, "seconds": seconds, "failed": [*told], "told": told}


def last(done: "subprocess.CompletedProcess[str]") -> str:
    """The last line of what a process said."""
    lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    return lines[-1][:300] if lines else f"exit code {done.returncode}"


def page(told: Mapping[str, Any]) -> str:
    """The table."""
    sizes = ", ".join(f"{name} {size:,} bytes" for name, size in told["files"].items())
    how = "the packages of another" if told["borrowed"] else "the versions of constraints.txt"
    lines = [
        f"The wheel in new environments, with {how}: {sizes}.", "",
        "| Python | torch | transformers | packages | MB | install, s | `--help`, s | checks |",
        "| --- | --- | --- | --: | --: | --: | --: | --- |",
    ]  # fmt: skip
    for one in told["installs"]:
        of, took = one.get("versions", {}), one.get("seconds", {})
        if one.get("absent"):
            outcome = "no such interpreter here"
        elif one["failed"]:
            outcome = "; ".join(f"{name}: {why}" for name, why in one["told"].items())
        else:
            outcome = f"all {len(took)} pass"
        cells = [of.get("python", one["asked"]), of.get("torch", ""), of.get("transformers", ""),
                 one.get("packages", ""), one.get("megabytes", ""), one.get("install_seconds", ""),
                 took.get("--help", ""), outcome]  # fmt: skip
        lines.append(f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
