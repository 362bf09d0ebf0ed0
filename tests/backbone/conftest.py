"""Shared by the backbones' tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from clplatform.backbone.pretrained import reachable


@pytest.fixture(autouse=True)
def hub_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """The hub's client in its offline mode, with a cache of our own: name of a model → the folder of its files."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("CLPLATFORM_MODELS", raising=False)
    reachable.cache_clear()
    commit = "0" * 40

    def folder(name: str) -> Path:
        model = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        files = model / "snapshots" / commit
        files.mkdir(parents=True)
        (model / "refs").mkdir()
        (model / "refs" / "main").write_text(commit)
        return files

    yield folder
    reachable.cache_clear()
