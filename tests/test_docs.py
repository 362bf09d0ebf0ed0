"""The table of `docs/strategies.md` is what the pages, sources and tests say; `python tests/test_docs.py` writes it anew."""

from __future__ import annotations

import ast
from pathlib import Path

from clplatform.listing import strategies

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "strategies.md"
START, END = "<!-- table of strategies: written by tests/test_docs.py -->\n", "<!-- end of the table -->\n"


def checked_by(name: str) -> str:
    """What a strategy's test says of itself; a special case of another method is checked by that one's."""
    path = ROOT / "tests" / "strategy" / f"test_{name}.py"
    if not path.is_file():
        return "with the method that it is a special case of"
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    return " ".join(docstring.split("\n\n")[0].split())


def table() -> str:
    """Every strategy: family, needs, what it learns, source, what its test checks it against."""
    header, rows = strategies()
    assert header[:3] == ["name", "family", "needs"]
    lines = [
        "| strategy | family | needs | learns | source | what it is checked against |",
        "|---|---|---|---|---|---|",
    ]
    for name, family, needs, _, source, learns in rows:
        words = [text.replace("_", " ") for text in (needs, learns)]
        lines.append(f"| `{name}` | {family} | {words[0]} | {words[1]} | {source} | {checked_by(name)} |")
    return "\n".join(lines) + "\n"


def test_the_table_of_strategies_is_up_to_date() -> None:
    text = PAGE.read_text()
    assert text[text.index(START) + len(START) : text.index(END)] == table(), "run: python tests/test_docs.py"


if __name__ == "__main__":
    text = PAGE.read_text()
    PAGE.write_text(text[: text.index(START) + len(START)] + table() + text[text.index(END) :])
