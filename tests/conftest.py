"""What the tests share: a cache of their own, a tiny model on disk, and a small domain."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from commands import SMALL, Done, Finished
from folders import write_domain, write_model


@pytest.fixture(autouse=True)
def cache(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Path | None]:
    """A cache of the test's own; tests marked `real` use that of the machine."""
    if request.node.get_closest_marker("real"):
        yield None
        return
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("LLM_NARROW_CACHE", str(folder))
    yield folder


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without report.html, which takes seconds: `finished` and test_page have it."""
    monkeypatch.setattr("llm_narrow.outcome.draw", lambda *args: None)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama on disk. Do not write to it."""
    return write_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def domain_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small domain on disk. Do not write to it."""
    return write_domain(tmp_path_factory.mktemp("domains") / "text")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the command line in this process."""

    def go(*arguments: object) -> Done:
        from llm_narrow import cli

        with pytest.raises(SystemExit) as ended:
            cli.main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        code = ended.value.code
        return Done(code if isinstance(code, int) else 0, out, err)

    return go


@pytest.fixture
def prune(
    run: Any,
    model_folder: Path,
    domain_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Any:
    """`llm-narrow prune` of the tiny model; later arguments win over earlier ones.

    Without the proof in a fresh process, which takes seconds: `finished` and test_checkpoint
    have it.
    """
    monkeypatch.setattr("llm_narrow.checkpoint.verify", lambda *args, **given: 0.0)

    def go(*arguments: object) -> Done:
        start = ["prune", "--model", model_folder, "--domain", domain_folder, *SMALL]
        done: Done = run(*start, "--no-speed", "--out", tmp_path / "run", *arguments)
        return done

    return go


@pytest.fixture(scope="session")
def finished(
    model_folder: Path, domain_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Finished:
    """One whole run, in a process of its own, as a user has it. Do not write to it."""
    place, cache = tmp_path_factory.mktemp("finished"), tmp_path_factory.mktemp("cache")
    names = ["--model", str(model_folder), "--domain", str(domain_folder), *SMALL]
    done = subprocess.run(
        [sys.executable, "-m", "llm_narrow", "prune", *names, "--out", str(place / "run"),
         "--sparsity", "neurons=0.5,heads=0.5", "--json"],
        env={**os.environ, "LLM_NARROW_CACHE": str(cache)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return Finished(place / "run", cache, json.loads(done.stdout), done.stderr)
