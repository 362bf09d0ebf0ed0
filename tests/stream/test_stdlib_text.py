"""Text that comes with Python: the domains differ, and are the same every time."""

from __future__ import annotations

import ast
import hashlib
import inspect
import platform
import subprocess
import sys
from typing import Any

import pytest
from composed import configuration

from clplatform.build import build_stream
from clplatform.stream.stdlib_text import DOMAINS, documents, stdlib_text
from clplatform.types import ClplatformError

OPTIONS: dict[str, Any] = {
    "name": "stdlib_text", "problem": "causal_lm", "domains": None, "scenario": "domain_incremental", "seed": None,
    "validation_fraction": 0.1, "test_fraction": 0.1, "limit": 20_000, "max_length": 64, "tokenizer_kind": "bpe",
    "tokenizer_vocab_size": 500, "tokenizer_on": "first",
}  # fmt: skip


@pytest.mark.parametrize("domain", list(DOMAINS))
@pytest.mark.parametrize("limit", [1000, 50_000])
def test_a_limit_cuts_the_same_text(domain: str, limit: int) -> None:
    text, longer = "".join(documents(domain, limit, notes := [])), "".join(documents(domain, 100_000, []))
    assert longer.startswith(text) and 0.8 * limit < len(text) <= limit and len(longer) > 90_000
    assert notes == [f"stream.limit keeps {len(text):,} characters of {domain}, of which there are more"]


def test_a_limit_that_leaves_nothing_out_needs_no_note() -> None:
    n = len("".join(documents("unicode", None, notes := [])))
    assert len("".join(documents("unicode", n, notes))) == n and not notes
    assert len("".join(documents("unicode", n - 1, notes))) < n and len(notes) == 1
    topics = documents("manual", None, [])
    whole = documents("manual", len(topics[0]), notes)
    assert whole == topics[:1] and len(notes) == 2  # a document ends there, and others follow


def test_what_the_domains_hold() -> None:
    manual, code, docstrings, unicode = ("".join(documents(name, 100_000, [])) for name in DOMAINS)
    assert "statement" in manual and "def " in code and "Return" in docstrings
    assert "é latin small letter e with acute\n" in "".join(documents("unicode", None, []))
    assert "cjk" not in unicode and sum(not c.isascii() for c in unicode) > 1000
    for text in documents("code", 300_000, [])[:-1]:  # the last is cut
        tree = ast.parse(text)
        assert "#" not in "".join(line.lstrip()[:1] for line in text.splitlines())
        assert not any(ast.get_docstring(n) for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef))


@pytest.mark.filterwarnings("ignore")  # of Avalanche's imports
def test_the_stream() -> None:
    stream = stdlib_text(**OPTIONS)
    assert [e.name for e in stream] == ["manual", "code", "docstrings", "unicode"]
    assert stream.notes[0].startswith(f"text of Python {platform.python_version()} (Unicode ")
    more = "of which there are more"
    assert [n.split(" of ", 1)[1] for n in stream.notes[1:5]] == [f"{e.name}, {more}" for e in stream]
    assert stream.notes[5].startswith("bytes of training / validation / test text: manual 1")
    assert all(len(e.train) > len(e.test) > 0 and e.validation for e in stream)
    assert [e.name for e in stdlib_text(**OPTIONS | {"domains": ["unicode", "code"]})] == ["unicode", "code"]
    assert {stdlib_text(**OPTIONS | {"seed": seed})[0].name for seed in range(6)} > {"manual"}
    with pytest.raises(
        ClplatformError, match="stream=stdlib_text is causal_lm; an Avalanche benchmark is made of class"
    ):
        _ = stream.benchmark
    with pytest.raises(ClplatformError, match="there is no 'licence' in stdlib_text"):
        stdlib_text(**OPTIONS | {"domains": ["licence"]})


def test_without_sources_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(ClplatformError, match="holds no source code: leave code and docstrings out of stream.domains"):
        stdlib_text(**OPTIONS)
    assert len(stdlib_text(**OPTIONS | {"domains": ["manual", "unicode"]})) == 2


def digest(stream: Any) -> str:
    parts = [
        data.columns[name].numpy().tobytes()
        for e in stream
        for data in (e.train, e.validation, e.test)
        for name in ("input_ids", "labels", "n_bytes", "index")
    ]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def test_the_page_gives_the_same_in_any_process() -> None:
    overrides = ["stream=stdlib_text", "backbone=bert_tiny", "strategy=finetuning"]
    script = (
        f"import hashlib, sys\nfrom typing import Any\n{inspect.getsource(digest)}\nsys.path[:0] = {sys.path!r}\n"
        "from composed import configuration\nfrom clplatform.build import build_stream\n"
        f"print(digest(build_stream(configuration(*{overrides!r}))))\n"
    )
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == digest(build_stream(configuration(*overrides)))
