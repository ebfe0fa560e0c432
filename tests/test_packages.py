import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from llm_narrow import packages
from llm_narrow.errors import BadInput, Unreachable
from llm_narrow.packages import Package, fetch


def wheel(folder: Path, tags: str = "py3-none-any", text: str = "x = 1\n") -> Package:
    """A tiny wheel in the folder, whose metadata demands a Python that nobody has."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"tiny_corpus-1.0-{tags}.whl"
    with zipfile.ZipFile(file, "w") as zipped:
        zipped.writestr("tiny_corpus/__init__.py", text)
        about = "Metadata-Version: 2.1\nName: tiny-corpus\nVersion: 1.0\nRequires-Python: >=9\n"
        about += "Requires-Dist: nothing-such\n"
        zipped.writestr("tiny_corpus-1.0.dist-info/METADATA", about)
        tag = "".join(f"Tag: {tags.rsplit('-', 1)[0]}-{p}\n" for p in tags.split("-")[2].split("."))
        zipped.writestr("tiny_corpus-1.0.dist-info/WHEEL", f"Wheel-Version: 1.0\n{tag}")
        zipped.writestr("tiny_corpus-1.0.dist-info/RECORD", "")
    return Package("tiny-corpus", "1.0", file.name, hashlib.sha256(file.read_bytes()).hexdigest())


@pytest.fixture(autouse=True)
def only_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip sees nothing but one local folder."""
    monkeypatch.setenv("LLM_NARROW_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(packages.FOLDER, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    links = tmp_path / "links"
    links.mkdir()
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    return links


def no_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("pip must not run")

    monkeypatch.setattr(subprocess, "Popen", forbidden)


@pytest.mark.parametrize(
    "tags",
    [
        "py3-none-any",
        "cp311-cp311-manylinux2014_x86_64.manylinux_2_17_x86_64",
        "cp39-abi3-macosx_11_0_arm64",
        "cp314-cp314-win_amd64",
    ],
)
def test_the_same_file_comes_on_every_machine(tmp_path, monkeypatch, only_links, tags):
    package = wheel(only_links, tags)
    got = fetch(package)
    assert got == tmp_path / "cache" / "packages" / "tiny-corpus-1.0" / package.file
    assert [p.name for p in got.parent.iterdir()] == [package.file]
    assert [p.name for p in got.parent.parent.iterdir()] == ["tiny-corpus-1.0"]
    with zipfile.ZipFile(got) as zipped:
        assert zipped.read("tiny_corpus/__init__.py") == b"x = 1\n"
    no_pip(monkeypatch)
    assert fetch(package) == got


def test_a_corrupt_cached_file_is_fetched_again(only_links):
    package = wheel(only_links)
    got = fetch(package)
    got.write_bytes(got.read_bytes()[:-1] + b"!")
    assert fetch(package) == got
    assert hashlib.sha256(got.read_bytes()).hexdigest() == package.sha256


def test_another_file_of_that_name_is_refused_and_nothing_stays(tmp_path, only_links):
    package = wheel(only_links)
    wheel(only_links, text="x = 2  # not what was pinned\n")
    with pytest.raises(Unreachable, match=r"tiny-corpus 1\.0 .*HASHES.*LLM_NARROW_PACKAGES"):
        fetch(package)
    assert list((tmp_path / "cache" / "packages").iterdir()) == []


def test_a_package_that_nobody_has():
    absent = Package("tiny-corpus", "1.0", "tiny_corpus-1.0-py3-none-any.whl", "0" * 64)
    with pytest.raises(Unreachable, match=r"fetched: Could not find a version.* put tiny"):
        fetch(absent)


def python_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Put a shell script in the place of the interpreter that runs pip."""
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/sh\n{script}\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))


def test_a_python_without_pip(tmp_path, monkeypatch, only_links):
    package = wheel(only_links)
    python_that(tmp_path, monkeypatch, f'exec "{sys.executable}" -I -S "$@"')
    with pytest.raises(Unreachable, match=r"no pip \(python -m ensurepip.*LLM_NARROW_PACKAGES"):
        fetch(package)


def test_a_full_disk_while_pip_downloads(tmp_path, monkeypatch, only_links):
    package = wheel(only_links)
    said = "ERROR: Could not install: [Errno 28] No space left on device"
    python_that(tmp_path, monkeypatch, f'echo "{said}" >&2; exit 1')
    with pytest.raises(BadInput, match=r"No space left on the disk.*LLM_NARROW_CACHE"):
        fetch(package)


def test_ctrl_c_stops_pip_and_leaves_nothing(tmp_path, monkeypatch, only_links):
    package = wheel(only_links)
    python_that(tmp_path, monkeypatch, "exec sleep 60")
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def recorded(*args, **kwargs):
        started.append(popen(*args, **kwargs))
        return started[0]

    def interrupted(items, what, total=None):
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", recorded)
    with pytest.raises(KeyboardInterrupt):
        fetch(package, interrupted)
    assert started[0].returncode is not None
    assert list((tmp_path / "cache" / "packages").iterdir()) == []


def test_the_users_folder_is_searched_first(tmp_path, monkeypatch, only_links):
    package = wheel(tmp_path / "mine")
    monkeypatch.setenv(packages.FOLDER, str(tmp_path / "mine"))
    no_pip(monkeypatch)
    assert fetch(package) == tmp_path / "mine" / package.file
    (tmp_path / "mine" / package.file).write_bytes(b"other")
    with pytest.raises(BadInput, match=r"must have SHA-256 .*, got .*Replace it, or unset"):
        fetch(package)
    monkeypatch.setenv(packages.FOLDER, str(tmp_path / "absent"))
    with pytest.raises(BadInput, match="absent is not a folder"):
        fetch(package)


def test_a_folder_without_the_file_does_not_stand_in_the_way(tmp_path, monkeypatch, only_links):
    (tmp_path / "mine").mkdir()
    monkeypatch.setenv(packages.FOLDER, str(tmp_path / "mine"))
    assert fetch(wheel(only_links)).is_relative_to(tmp_path / "cache")
