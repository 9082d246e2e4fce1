"""Models and texts that the tests of this folder share."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_llama import cycle_text, tiny_llama


@pytest.fixture(scope="session")
def follower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that can do bits per byte on `cycle_text`, and no retrieval."""
    return tiny_llama(tmp_path_factory.mktemp("follower"), follows=True)


@pytest.fixture(scope="session")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that can do nothing."""
    return tiny_llama(tmp_path_factory.mktemp("noise"), follows=False)


@pytest.fixture(scope="session")
def cycle_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "cycle.txt"
    path.write_text(cycle_text(20_000), encoding="utf-8")
    return path
