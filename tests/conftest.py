"""What the tests share: a cache of their own, a tiny model on disk, and a small domain."""

from collections.abc import Iterator
from pathlib import Path

import pytest

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


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama on disk. Do not write to it."""
    return write_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def domain_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small domain on disk. Do not write to it."""
    return write_domain(tmp_path_factory.mktemp("domains") / "text")
