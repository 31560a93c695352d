"""A family of tiny models, and a cache of digests of its own for every test."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import moved, random_tensors, write_model


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test touches the digests that the user's own merges remember."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "isthmus" / "digests.json"


@pytest.fixture
def family(tmp_path: Path) -> dict[str, Path]:
    """A base and two models of it: `{"base": ..., "beauty": ..., "toys": ...}`."""
    base = random_tensors(0)
    folders = {"base": write_model(tmp_path / "base", base)}
    for seed, label in enumerate(("beauty", "toys"), start=1):
        folders[label] = write_model(tmp_path / label, moved(base, seed))
    return folders
