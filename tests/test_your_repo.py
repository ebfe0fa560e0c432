"""The script that narrows to the code of a folder: what it takes, leaves out, refuses and tells."""

import importlib
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from folders import WORDS
from llm_narrow import rows as rowfile

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SECRET = "AKIA" + "ABCDEFGHIJKLMNOP"
SMALL = ["--length", "32", "--no-speed"]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr("llm_narrow.checkpoint.verify", lambda *args, **given: 0.0)
    monkeypatch.setenv("COLUMNS", "200")
    return importlib.import_module("your_repo")


def code(seed: int, lines: int = 30) -> str:
    chance = random.Random(seed)
    names = ("_".join(chance.choices(WORDS, k=4)) for _ in range(lines))
    return "".join(f"let {name} = {chance.random()};\n" for name in names)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Rust files, two of them alike, among other things; a git checkout where there is git."""
    folder = tmp_path / "repository"
    (folder / "src").mkdir(parents=True)
    for number in range(40):
        (folder / f"src/{number}.rs").write_text(code(number))
    (folder / "src/copy.rs").write_text(code(3))
    (folder / "src/keys.rs").write_text(f'// one\nlet key = "{SECRET}";\n' + code(50))
    (folder / "src/other.rs").write_text("// SPDX-License-Identifier: MPL-2.0\n" + code(51))
    (folder / "src/latin.rs").write_bytes(b"// caf\xe9\n")
    (folder / "src/object.rs").write_bytes(b"\0\1\2")
    (folder / "data.json").write_text(json.dumps([code(n) for n in range(60, 140)]))
    (folder / "setup.py").write_text("print('hello')\n")
    (folder / "LICENSE").write_text("\n  MIT License\n\nCopyright\n")
    return folder


def tracked(folder: Path) -> None:
    """Make the folder a git checkout that tracks all of its files."""
    for command in (["init", "--quiet"], ["add", "."]):
        subprocess.run(["git", "-C", str(folder), *command], check=True)


def go(script: ModuleType, *arguments: object) -> None:
    script.main([str(a) for a in arguments])


def test_it_narrows_and_tells_what_it_was_worth(
    script: ModuleType, repository: Path, model_folder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "runs/mine"
    go(script, repository, "--model", model_folder, "--out", out, "--sparsity", 0.25, *SMALL)
    said = capsys.readouterr().out
    assert "43 files that are not hidden fit **/*.rs" in said
    assert "src/keys.rs:2: a key of AWS" in said and SECRET not in said
    assert "Licence: LICENSE: MIT License" in said and "1 files say MPL-2.0" in said
    assert "Left out as duplicate: 1" in said
    lines = (tmp_path / "runs/mine-text.jsonl").read_text().splitlines()
    texts = [json.loads(line) for line in lines]
    names = {f"src/{n}.rs" for n in (*range(40), "copy", "other")}
    assert {row["path"] for row in texts} == names
    (before, after), _ = rowfile.read(out / "rows.jsonl")
    ratio = after.bits_per_byte_ratio
    assert ratio is not None and after.parameters < before.parameters
    for told in (f"{before.bits_per_byte.value:.3f} → {after.bits_per_byte.value:.3f}",
                 f"{ratio.value:.3f} times", f"{before.parameters:,} → {after.parameters:,}",
                 str(out / "model"), str(out / "report.md")):  # fmt: skip
        assert told in said
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["domain"]["tokens"]["held_out"] >= 8 * 32
    assert manifest["recipe"]["domain"]["project_column"] == "path"


def test_whole_files_are_held_out(
    script: ModuleType, repository: Path, model_folder: Path, tmp_path: Path
) -> None:
    rows = script.written(script.read(repository, [f"src/{n}.rs" for n in range(40)]),
                          tmp_path / "rows.jsonl")  # fmt: skip
    stamp = rows.stat().st_mtime_ns
    again = script.read(repository, [f"src/{n}.rs" for n in range(40)])
    assert script.written(again, rows).stat().st_mtime_ns == stamp
    domain = script.domains.load(str(rows), text_column="text", project_column="path")
    projects = [{d.project for d in documents} for documents in domain.documents.values()]
    assert sum(map(len, projects)) == len(set().union(*projects)) == 40


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_only_what_git_tracks_is_taken(script: ModuleType, repository: Path) -> None:
    tracked(repository)
    (repository / "src/untracked.rs").write_text(code(70))
    (repository / "src/0.rs").unlink()  # in the index still
    paths, which = script.listed(repository)
    assert which == "that git tracks"
    assert "src/1.rs" in paths and not {"src/untracked.rs", "src/0.rs"} & {*paths}
    assert script.listed(repository / "src")[0] == sorted(
        name.removeprefix("src/") for name in paths if name.startswith("src/")
    )


def test_the_language_is_that_of_most_code(script: ModuleType, repository: Path) -> None:
    paths, _ = script.listed(repository)
    assert script.main_glob(repository, paths) == "**/*.rs"
    with pytest.raises(script.BadInput, match=r"looks like code\. Say which to take with --glob"):
        script.main_glob(repository, ["LICENSE", "data.json"])


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("-----BEGIN RSA " + "PRIVATE KEY-----", "a private key"),
        ("-----BEGIN " + "PRIVATE KEY-----", "a private key"),
        ("ghp_" + "a1" * 18, "a token of GitHub"),
        ("xoxb-" + "1234567890", "a token of Slack"),
        ("sk-" + "a1b2" * 8, "a key of an API"),
        ('{"api_key": "' + "x9" * 10 + '"}', "a password or token"),
        ("PASSWORD = '" + "x9" * 10 + "'", "a password or token"),
    ],
)
def test_secrets_are_seen(script: ModuleType, text: str, what: str) -> None:
    found = script.secrets(script.File("a.py", f"one\ntwo {text} three\n"))
    assert f"a.py:2: {what}" in found


@pytest.mark.parametrize(
    "text", ["password = input()", "token = tokens[0]", "api_key = os.environ['API_KEY']",
             "task-" + "a" * 30, "the secret: none"],
)  # fmt: skip
def test_code_about_secrets_is_none(script: ModuleType, text: str) -> None:
    assert script.secrets(script.File("a.py", text)) == []


def test_with_secrets_nothing_is_left_out(
    script: ModuleType, repository: Path, model_folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def stop(**given: Any) -> None:
        raise script.BadInput("far enough")

    monkeypatch.setattr("llm_narrow.prune", stop)
    with pytest.raises(SystemExit):
        go(script, repository, "--model", model_folder, "--out", tmp_path / "o", "--with-secrets",
           *SMALL)  # fmt: skip
    assert SECRET in (tmp_path / "o-text.jsonl").read_text()


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--length", "128"], ["is too small to narrow on: 3 problems", "calibration:",
                               "2,048 are needed (16 blocks of 128)", "held_out:", "--length"]),
        (["--glob", "**/*.go"], ["None of the 48 files that are not hidden fits --glob '**/*.go'"]),
        (["--glob", "*.py"], ["too little data: 1 documents", "at least 3 (better 30)"]),
        (["--target-params", "200%", *SMALL], ["at most 100%, got '200%'"]),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_with_reasons(
    script: ModuleType, repository: Path, model_folder: Path, tmp_path: Path, more: list[str],
    told: list[str], capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for number in range(6, 40):
        if "128" in more:
            (repository / f"src/{number}.rs").unlink()
    with pytest.raises(SystemExit) as ended:
        go(script, repository, "--model", model_folder, "--out", tmp_path / "o", *more)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert all(text in error for text in told), error
    assert not (tmp_path / "o").exists()


def test_a_folder_that_is_not_there(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        go(script, tmp_path / "none")
    assert "There is no folder" in capsys.readouterr().err


def test_a_run_that_was_stopped_goes_on(
    script: ModuleType, repository: Path, model_folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    line = [repository, "--model", model_folder, "--out", tmp_path / "o", *SMALL,
            "--recover-tokens", "256"]  # fmt: skip

    def stop(*args: object, **given: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("llm_narrow.outcome.finished", stop)
        with pytest.raises(KeyboardInterrupt):
            go(script, *line)
    assert not (tmp_path / "o").exists()
    capsys.readouterr()
    go(script, *line)
    said = capsys.readouterr().out
    assert "Going on with" in said and "Bits per byte on held-out files" in said
    assert (tmp_path / "o/recover.jsonl").is_file()


def test_help_tells_how_to_begin() -> None:
    command = [sys.executable, str(EXAMPLES / "your_repo.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert "python examples/your_repo.py ~/code/mine" in done.stdout
    assert "--with-secrets" in done.stdout
