"""The package: what the wheel holds, how fast it starts, and what a shell is told."""

import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest

import llm_narrow
from commands import refused
from llm_narrow import completion, domains, models, options, recipe
from llm_narrow.scores import CRITERIA

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FIXED = {"torch", "transformers", "datasets", "accelerate", "peft", "evaluate", "safetensors",
         "typer", "rich"}  # fmt: skip


def build(source: Path, out: Path, *what: str) -> Path:
    """The file that `python -m build` makes of the folder with this environment alone."""
    environment = {**os.environ, "PIP_NO_INDEX": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", *what, "--outdir", out, source],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = out.iterdir()
    return made


def copied(source: Path) -> Path:
    """What a build reads, and the tests, which it must leave out."""
    leave = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("src", "recipes", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=leave)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    return source


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An sdist, and the wheel that was built from what it holds."""
    pytest.importorskip("build", reason="build is not installed")
    place = tmp_path_factory.mktemp("packaging")
    sdist = build(copied(place / "source"), place / "sdist", "--sdist")
    shutil.unpack_archive(sdist, place / "unpacked", filter="data")
    (unpacked,) = (place / "unpacked").iterdir()
    return sdist, build(unpacked, place / "wheel", "--wheel")


def held(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as zipped:
        return {name: zipped.read(name) for name in zipped.namelist()}


def test_the_wheel_holds_what_runs_and_nothing_else(built: tuple[Path, Path]) -> None:
    wheel = built[1]
    assert wheel.name == f"llm_narrow-{llm_narrow.__version__}-py3-none-any.whl"
    assert wheel.stat().st_size < 1_000_000
    own = {n: data for n, data in held(wheel).items() if ".dist-info/" not in n}
    package = ROOT / "src/llm_narrow"
    there = [p for p in package.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    wanted = {f"llm_narrow/{p.relative_to(package).as_posix()}": p.read_bytes() for p in there}
    recipes = [p for p in (ROOT / "recipes").iterdir() if p.suffix in (".yaml", ".json")]
    wanted |= {f"llm_narrow/recipes/{p.name}": p.read_bytes() for p in recipes}
    assert own.keys() == wanted.keys() and own == wanted
    assert "llm_narrow/py.typed" in own and "llm_narrow/templates/report.html.jinja" in own


def test_the_sdist_makes_the_same_wheel(built: tuple[Path, Path], tmp_path: Path) -> None:
    straight = held(build(copied(tmp_path / "source"), tmp_path / "out", "--wheel"))
    assert straight == held(built[1])


def test_the_metadata_say_what_is_needed(built: tuple[Path, Path]) -> None:
    texts = {name.rpartition("/")[2]: data.decode() for name, data in held(built[1]).items()
             if ".dist-info/" in name}  # fmt: skip
    about = Parser().parsestr(texts["METADATA"])
    assert about["Version"] == llm_narrow.__version__ == PROJECT["version"]
    assert about["Requires-Python"] == ">=3.11" and about["License-Expression"] == "Apache-2.0"
    assert texts["entry_points.txt"].split("\n")[1] == "llm-narrow = llm_narrow.cli:main"
    core = [line for line in about.get_all("Requires-Dist") if "extra ==" not in line]
    assert {line.partition(">")[0] for line in core} >= FIXED
    assert {*about.get_all("Provides-Extra")} == {*PROJECT["optional-dependencies"]}


def test_extras_and_constraints_fit() -> None:
    """Whatever is asked for is pinned, once; the other extras are small."""
    extras = PROJECT["optional-dependencies"]
    assert {"report", "lora", "gguf", "export", "tracking"} <= {*extras}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line.partition("==")[0].lower() for line in lines if "==" in line]
    assert len(pins) == len({*pins})
    asked = [*PROJECT["dependencies"], *(n for e in extras if e != "lm-eval" for n in extras[e])]
    names = {one.partition(">")[0].partition("[")[0].lower() for one in asked}
    assert names - {"llm-narrow"} <= {*pins}
    for name, needed in extras.items():
        assert len(needed) <= 3 or name == "dev"


def test_there_is_one_version() -> None:
    for file in (ROOT / "src/llm_narrow").glob("*.py"):
        assert PROJECT["version"] not in file.read_text("utf-8"), file


# How it starts -------------------------------------------------------------------------------


def seconds(*code: str) -> float:
    """The least of three runs, since other programs disturb."""
    taken = []
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run([sys.executable, *code], check=True, capture_output=True, timeout=60)
        taken.append(time.perf_counter() - started)
    return min(taken)


def loaded(*words: str) -> set[str]:
    """The packages that a command line has imported when it ends."""
    code = (
        "import sys, json\nfrom llm_narrow import cli\n"
        "try:\n    cli.main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=True, timeout=60
    )
    return {*json.loads(done.stdout.splitlines()[-1])}


# Typer itself loads pydantic for the help of a command.
HEAVY = {"torch", "transformers", "datasets", "accelerate", "peft", "evaluate", "numpy", "pyarrow",
         "huggingface_hub", "gguf", "matplotlib"}  # fmt: skip


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["prune", "--help"], ["push", "-h"]])
def test_help_loads_nothing_heavy(words: list[str]) -> None:
    assert not loaded(*words) & HEAVY


def test_it_starts_at_once() -> None:
    """Within 0.3 s for the import and 0.5 s for the help where Python itself takes 0.02 s."""
    slow = max(1.0, seconds("-c", "pass") / 0.02)  # of a machine that is busy, or slower
    assert seconds("-c", "import llm_narrow") < 0.3 * slow
    assert seconds("-m", "llm_narrow", "--help") < 0.5 * slow


def test_the_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "llm_narrow", "--version"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stdout == f"llm-narrow {llm_narrow.__version__}\n"


# Completion ----------------------------------------------------------------------------------


def test_the_names_are_those_of_the_tables() -> None:
    names = {key: {*values} for key, values in completion.NAMES.items()}
    assert names["model"] == {*models.KNOWN}
    assert names["domain"] == names["forget"] == {*domains.DOMAINS}
    assert names["criterion"] == {*CRITERIA}
    assert names.keys() <= {*options.OPTIONS}
    fields: dict[str, dict[str, Any]] = {
        "kinds": {"target_params": "60%"}, "allocation": {"kinds": "neurons"},
    }  # fmt: skip
    for key, values in completion.NAMES.items():
        if key in ("model", "domain", "forget"):
            continue
        for value in values:
            asked = {"model": "m", "domain": "d", "sparsity": "0.5", key: value}
            asked |= fields.get(key, {})
            if key in ("kinds", "allocation"):
                asked.pop("sparsity")
                asked["target_params"] = "60%"
            if key == "weights" or key == "control":
                asked["method"] = "lasso"
            try:
                recipe.load(None, asked, criteria=CRITERIA)
            except llm_narrow.BadInput as error:
                # Refused for what it would need beside it, not as a name that is not known.
                assert "unknown" not in str(error) and "nput should be" not in str(error), error
        with pytest.raises(llm_narrow.NarrowError):
            recipe.load(
                None, {"model": "m", "domain": "d", key: "no such name"}, criteria=CRITERIA
            )


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_the_script_of_a_shell(run: Any, shell: str) -> None:
    done = run("--show-completion", shell)
    assert done.code == 0 and done.err == ""
    assert "llm-narrow" in done.out and "_LLM_NARROW_COMPLETE" in done.out


def test_an_unknown_shell_is_refused(run: Any) -> None:
    refused(run("--show-completion", "tcsh"), "Shell 'tcsh' is unknown. Known: bash, fish")
    refused(run("--install-completion", "bsh"), "Did you mean 'bash'?")


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (["pr"], ["prune", "prices"]),
        (["prune", "--criterion", "a"], ["ablation", "activation", "attribution"]),
        (["prune", "--kinds", "neurons,he"], ["neurons,heads"]),
        (["prune", "--model", "smollm2-3"], ["smollm2-360m"]),
        (["prune", "--domain", "eng"], ["english"]),
        (["push", "--dr"], ["--dry-run"]),
    ],
)
def test_a_shell_is_told_names(typed: list[str], offered: list[str]) -> None:
    """Asked as the script for bash asks."""
    asked = {"_LLM_NARROW_COMPLETE": "complete_bash", "COMP_CWORD": str(len(typed)),
             "COMP_WORDS": " ".join(["llm-narrow", *typed])}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "llm_narrow"], env={**os.environ, **asked},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stdout.split() == offered, done.stderr


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not there")
def test_bash_completes(tmp_path: Path, run: Any) -> None:
    """The script as printed, in bash itself."""
    (tmp_path / "llm-narrow").write_text(f'#!/bin/sh\nexec {sys.executable} -m llm_narrow "$@"\n')
    (tmp_path / "llm-narrow").chmod(0o755)
    script = run("--show-completion", "bash").out + (
        "\nCOMP_WORDS=(llm-narrow prune --kinds he)\nCOMP_CWORD=3\n"
        "_llm_narrow_completion llm-narrow\necho ${COMPREPLY[@]}\n"
    )
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script], env={**os.environ, "PATH": path}, capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip
    assert done.stdout.strip() == "heads", done.stderr


def test_completion_is_put_where_bash_reads_it(tmp_path: Path) -> None:
    environment = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "llm_narrow", "--install-completion", "bash"], env=environment,
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Written to " in done.stdout
    written = tmp_path / ".bash_completions/llm-narrow.sh"
    assert "_LLM_NARROW_COMPLETE" in written.read_text()
    assert str(written) in (tmp_path / ".bashrc").read_text()
