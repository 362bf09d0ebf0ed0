"""Markdown that shows what was meant."""

from __future__ import annotations

import pytest

from clplatform.report.document import Code, Document, Section, Table
from clplatform.report.markdown import escape, render_markdown


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("lora_experts", "lora_experts"),
        ("_x_ a|b", r"\_x\_ a\|b"),
        ("<b>*[a](b)", r"\<b\>\*\[a\](b)"),
        ("two\nlines", "two lines"),
        ("a\\b `c`", r"a\\b \`c\`"),
    ],
)
def test_escape(text: str, escaped: str):
    assert escape(text) == escaped


def test_fences_are_longer_than_what_they_hold():
    section = Section("s", "S", [Code("c", "a\n```\nb"), Table("t", ["a", "b"], [["1", "2"]], links={0: "x y.html"})])
    text = render_markdown(Document("T", "", "", "", [], [], [section]))
    assert "````\na\n```\nb\n````" in text
    assert "| [1](x%20y.html) | 2 |" in text
