import errno
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llm_narrow import cache
from llm_narrow.errors import BadInput


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_NARROW_CACHE", str(tmp_path / "cache"))


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir()) if folder.exists() else []


def test_cache_dir_follows_the_environment(tmp_path, monkeypatch):
    assert cache.cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("LLM_NARROW_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_dir() == tmp_path / "xdg" / "llm-narrow"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.cache_dir() == tmp_path / "home" / ".cache" / "llm-narrow"


def test_a_folder_appears_only_when_it_is_whole(tmp_path):
    target = tmp_path / "runs" / "x"
    with cache.written_whole(target) as partial:
        assert partial == target.parent / f".x.partial-{os.getpid()}"
        (partial / "sub").mkdir()
        (partial / "sub" / "a").write_text("new")
        assert not target.exists()
    assert (target / "sub" / "a").read_text() == "new"
    assert names(target.parent) == ["x"]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(1)])
def test_nothing_half_written_stays(tmp_path, error):
    target = tmp_path / "x"
    with pytest.raises(type(error)), cache.written_whole(target) as partial:
        (partial / "a").write_text("half")
        raise error
    assert names(tmp_path) == []


def test_an_existing_folder_needs_force_and_survives_a_failure(tmp_path):
    target = tmp_path / "x"
    target.mkdir()
    (target / "a").write_text("old")
    with pytest.raises(BadInput, match=r"x exists already.*--force"), cache.written_whole(target):
        pytest.fail("the block must not run")
    with pytest.raises(ValueError), cache.written_whole(target, force=True) as partial:
        (partial / "a").write_text("new")
        raise ValueError
    assert (target / "a").read_text() == "old"
    with cache.written_whole(target, force=True) as partial:
        (partial / "b").write_text("new")
    assert names(target) == ["b"]
    assert names(tmp_path) == ["x"]


def test_a_folder_that_appeared_meanwhile_is_not_overwritten(tmp_path):
    target = tmp_path / "x"
    with pytest.raises(BadInput, match="exists already"), cache.written_whole(target) as partial:
        (partial / "a").write_text("mine")
        target.mkdir()
        (target / "a").write_text("theirs")
    assert (target / "a").read_text() == "theirs"
    assert names(tmp_path) == ["x"]


def test_what_stood_there_comes_back_when_the_rename_fails(tmp_path, monkeypatch):
    target = tmp_path / "x"
    target.mkdir()
    (target / "a").write_text("old")
    rename = Path.rename

    def failing(self, to):
        if ".partial-" in self.name:
            raise PermissionError(errno.EACCES, "no")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(PermissionError), cache.written_whole(target, force=True) as partial:
        (partial / "a").write_text("new")
    assert (target / "a").read_text() == "old"
    assert names(tmp_path) == ["x"]


@pytest.mark.parametrize("place", ["HOME", "cwd", "LLM_NARROW_CACHE"])
def test_force_never_replaces_a_folder_that_holds_more_than_a_run(tmp_path, monkeypatch, place):
    target = tmp_path / "precious"
    inside = target / "inside"
    inside.mkdir(parents=True)
    if place == "cwd":
        monkeypatch.chdir(inside)
    else:
        monkeypatch.setenv(place, str(inside))
    refused = pytest.raises(BadInput, match="not replaced, even with --force")
    with refused, cache.written_whole(target, force=True):
        pytest.fail("the block must not run")
    assert inside.is_dir()


def test_what_a_killed_process_left_does_not_get_in(tmp_path):
    left = tmp_path / f".x.partial-{os.getpid()}"
    left.mkdir()
    (left / "stale").write_text("stale")
    with cache.written_whole(tmp_path / "x") as partial:
        (partial / "a").write_text("new")
    assert names(tmp_path / "x") == ["a"]


def test_a_place_that_cannot_hold_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    refused = pytest.raises(BadInput, match=r"cannot be written.*Choose another folder")
    with refused, cache.written_whole(tmp_path / "file" / "x"):
        pytest.fail("the block must not run")


def full() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_told_in_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    told = pytest.raises(BadInput, match=r"No space left.*more than 3 MB needed, 4 MB free\. Free")
    with told, cache.written_whole(tmp_path / "x") as partial:
        (partial / "a").write_bytes(b"0" * 3_000_000)
        raise full()
    assert names(tmp_path) == []


def test_a_full_disk_found_by_fsync_or_reported_by_a_library(tmp_path, monkeypatch):
    told = pytest.raises(BadInput, match="No space left")
    with told, cache.written_whole(tmp_path / "x"):
        # How safetensors reports it: an exception of its own, only the text tells.
        raise RuntimeError("Error while serializing: No space left on device (os error 28)")
    with told, cache.written_whole(tmp_path / "x"):
        try:
            raise full()
        except OSError as error:
            raise ValueError("could not save") from error

    def fsync(handle: int) -> None:
        raise full()

    monkeypatch.setattr(os, "fsync", fsync)
    with told, cache.written_whole(tmp_path / "x") as partial:
        (partial / "a").write_text("a")
    assert names(tmp_path) == []


def test_a_disk_that_really_is_full():
    device = Path("/dev/full")
    if not device.exists():
        pytest.skip("this system has no /dev/full")
    with pytest.raises(OSError) as caught, device.open("wb", buffering=0) as file:
        file.write(b"a")
    assert cache.no_space(caught.value, Path("/dev/x")) is not None
    assert cache.no_space(ValueError("no"), Path("/dev/x")) is None


def test_a_digest_is_remembered_until_the_file_changes(tmp_path, monkeypatch):
    file = tmp_path / "weights"
    file.write_bytes(b"abc")
    read: list[int] = []

    def track(items, what, total=None):
        assert total == 1
        for item in items:
            read.append(len(item))
            yield item

    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert cache.remembered_sha256(file, track) == abc
    assert cache.remembered_sha256(file, track) == abc
    assert read == [3]
    file.write_bytes(b"abd")
    assert cache.remembered_sha256(file, track) != abc
    assert read == [3, 3]
    note = next((tmp_path / "cache" / "digests").iterdir())
    note.write_text("not json")
    assert cache.remembered_sha256(file) == cache.file_sha256(file)
    (tmp_path / "taken").write_text("")
    monkeypatch.setenv("LLM_NARROW_CACHE", str(tmp_path / "taken"))
    assert cache.remembered_sha256(file) == cache.file_sha256(file)


def test_progress_counts_the_megabytes_that_a_folder_grows_by(tmp_path):
    (tmp_path / "old").write_bytes(b"0" * 2_000_000)
    sizes = iter([0, 1_500_000, 4_000_000])

    def running() -> bool:
        """Has fetched 0, 1.5 and 4 MB when asked, and then ends."""
        size = next(sizes, None)
        if size is not None:
            (tmp_path / "new").write_bytes(b"0" * size)
        return size is not None

    assert list(cache.megabytes(tmp_path, running)) == [1, 2, 3, 4]


def test_files_get_the_rights_of_new_files_here(tmp_path):
    with cache.written_whole(tmp_path / "run") as folder:
        save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
    (tmp_path / "new").write_text("")
    wanted = (tmp_path / "new").stat().st_mode
    assert {path.stat().st_mode for path in (tmp_path / "run").iterdir()} == {wanted}
