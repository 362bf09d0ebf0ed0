"""Multi30k as it is published."""

from __future__ import annotations

import gzip
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from clplatform.stream.multi30k import multi30k
from clplatform.types import ClplatformError

REAL = Path(os.environ.get("CLPLATFORM_DATA", "nowhere")).resolve() / "multi30k"
real = pytest.mark.skipif(not REAL.is_dir(), reason="CLPLATFORM_DATA names no folder with multi30k")
OPTIONS: dict[str, Any] = {
    "name": "multi30k", "data_dir": "data", "pairs": ["en-de", "en-fr", "en-cs"], "test": "test_2016_flickr", "limit": None,
    "evaluation_limit": None, "tag": True, "scenario": "domain_incremental", "seed": None, "max_length": 64,
    "max_target_length": 256, "tokenizer_vocab_size": 1000, "tokenizer_on": "first",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _nothing_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLPLATFORM_DATA", raising=False)


def test_the_published_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path("data/multi30k/raw")
    folder.mkdir(parents=True)
    for split, n in (("train", 8), ("val", 3), ("test_2016_flickr", 2)):
        for language in ("en", "de", "fr", "cs"):
            lines = "".join(f"{language} {split} {i}\n" for i in range(n))
            (folder / f"{split}.{language}.gz").write_bytes(gzip.compress(lines.encode()))
    stream = multi30k(**OPTIONS)
    assert [[len(d) for d in (e.train, e.validation, e.test)] for e in stream] == [[8, 3, 2]] * 3  # type: ignore[arg-type]
    assert stream.texts[-1] == ("<cs> en test_2016_flickr 1", "cs test_2016_flickr 1")
    monkeypatch.setenv("CLPLATFORM_DATA", "data")
    assert multi30k(**OPTIONS | {"data_dir": None}).texts == stream.texts
    monkeypatch.delenv("CLPLATFORM_DATA")
    with pytest.raises(ClplatformError, match="the data set multi30k is not here: put train.en, train.de, val.en"):
        multi30k(**OPTIONS | {"data_dir": None})


@real
def test_the_real_multi30k() -> None:
    stream = multi30k(**OPTIONS | {"data_dir": str(REAL), "limit": 400, "evaluation_limit": 50})
    assert [e.name for e in stream] == ["en-de", "en-fr", "en-cs"]
    for e, language in zip(stream, ("de", "fr", "cs"), strict=True):
        for data, stem, n in ((e.train, "train", 400), (e.validation, "val", 50), (e.test, "test_2016_flickr", 50)):
            source, target = (
                gzip.decompress((REAL / "raw" / f"{stem}.{x}.gz").read_bytes()).decode().split("\n")
                for x in ("en", language)
            )
            assert data is not None and len(data) == n
            batch = data.fetch(torch.arange(n))
            assert [stream.texts[i] for i in batch["index"].tolist()] == [
                (f"<{language}> {s.strip()}", t.strip()) for s, t in zip(source[:n], target[:n], strict=True)
            ]
            written = stream.tokenizer.batch_decode(batch["labels"].clamp(min=0), skip_special_tokens=True)
            assert written == [stream.texts[i][1] for i in batch["index"].tolist()]
    with pytest.raises(ClplatformError, match=r"no file test_2017_mscoco.cs .*in the languages de, en, fr"):
        multi30k(**OPTIONS | {"data_dir": str(REAL), "test": "test_2017_mscoco", "limit": 10})
