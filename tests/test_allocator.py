"""Freed memory is kept: what is asked for again does not fault its pages in again."""

import subprocess
import sys

import pytest

COUNT = """
import resource, torch
from llm_narrow.allocator import keep_freed_memory
if {keeps}:
    assert keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 * 2**20)  # 64 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
for _ in range(20):  # the heap settles
    faults()
print(faults())
"""


def faults(*, keeps: bool) -> int:
    done = subprocess.run(
        [sys.executable, "-c", COUNT.format(keeps=keeps)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of glibc")
def test_what_is_freed_is_kept_for_the_next() -> None:
    assert faults(keeps=True) < 0.01 * faults(keeps=False)


def test_other_systems_are_left_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    from llm_narrow.allocator import keep_freed_memory

    monkeypatch.setattr(sys, "platform", "darwin")
    assert not keep_freed_memory()
