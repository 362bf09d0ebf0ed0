from __future__ import annotations

import io
import subprocess
import sys

import pytest
from rich.console import Console

from clplatform.tracking.tables import cell_text, duration, heat, print_matrix, print_summary


def shown(matrix: list[list[float | None]], *, metric: str = "accuracy", better: bool = True, width: int = 80) -> str:
    console = Console(record=True, width=width, file=io.StringIO())
    print_matrix(matrix, [f"{2 * j}, {2 * j + 1}" for j in range(len(matrix[0]))], metric, better, console)
    return console.export_text()


def triangle(n: int) -> list[list[float | None]]:
    return [[max(0.99 - 0.05 * (i - j), 0.0) if j < max(i, 1) else None for j in range(n)] for i in range(n + 1)]


def test_accuracies_are_percentages_and_empty_cells_dots() -> None:
    lines = shown([[0.1, None], [1.0, None], [0.5, 0.875]]).splitlines()
    assert lines[0].strip() == "Accuracy in %"
    assert lines[1].split() == ["after", "1", "2", "mean"]
    assert lines[2].split() == ["start", "10.0", "·", "·"]
    assert lines[3].split() == ["1", "100.0", "·", "100.0"]
    assert lines[4].split() == ["2", "50.0", "87.5", "68.8"]
    assert lines[5].split("  ")[1:] == ["1: 0, 1", " 2: 2, 3"]


def test_without_colours_a_hundred_does_not_touch_the_next() -> None:
    assert shown([[None, None], [1.0, None], [1.0, 1.0]]).splitlines()[4].split() == ["2", "100.0", "100.0", "100.0"]


def test_up_to_twelve_experiences_fit_whole() -> None:
    text = shown(triangle(12))
    assert max(map(len, text.splitlines())) <= 80
    assert text.splitlines()[1].split() == ["after", *map(str, range(1, 13)), "mean"]


@pytest.mark.parametrize(("n", "width"), [(13, 80), (20, 80), (100, 80), (20, 40)])
def test_a_large_matrix_is_abbreviated(n: int, width: int) -> None:
    lines = shown(triangle(n), width=width).splitlines()
    assert max(map(len, lines)) <= width
    header = lines[1].split()
    assert header[1] == "1" and header[-2] == str(n) and header.count("…") == 1
    last = next(line for line in reversed(lines) if line.split()[0] == str(n)).split()
    assert len(last) == len(header) and last[-2] == "94.0"


def test_other_metrics_keep_their_unit_and_direction() -> None:
    text = shown([[None, None], [12.3456, None], [30.1, 1234.5]], metric="perplexity", better=False)
    assert "Perplexity" in text and "12.3" in text and "1.23e+03" in text and "%" not in text


def test_colour_follows_the_value() -> None:
    assert heat(0.0) == "white on rgb(178,34,52)" and heat(1.0) == "white on rgb(34,128,84)"
    assert heat(-1.0) == heat(0.0) and heat(2.0) == heat(1.0)


def test_markup_in_names_is_text() -> None:
    console = Console(record=True, width=80, file=io.StringIO())
    print_matrix([[None], [0.5]], ["[red]x[/red] [/]"], "accuracy", True, console)
    assert "[red]x[/red] [/]" in console.export_text()


def test_summary_shows_what_there_is() -> None:
    console = Console(record=True, width=80, file=io.StringIO())
    metrics = {"average_accuracy": 0.754, "backward_transfer": -0.23, "forward_transfer": None, "perplexity": 12.5}
    cost = {"seconds": 185.0, "steps": 12000, "peak_memory_bytes": 1.25e9, "bytes": 12800, "flops": 1.5e12}
    print_summary(metrics, cost, "outputs/" + "long/" * 20 + "report.html", console)
    text = console.export_text()
    for words in ("Average accuracy 75.4 %", "Backward transfer -23.0 %", "Perplexity 12.5", "Time 3:05 min"):
        assert words in " ".join(text.split())
    for words in ("Steps 12,000", "Peak memory 1.2 GiB", "Strategy's memory 12.5 KiB", "FLOPs 1.50e+12"):
        assert words in " ".join(text.split())
    assert "Forward transfer" not in text
    assert "Report: outputs/" + "long/" * 20 + "report.html" in text  # in one line, so that it can be copied


def test_numbers_in_words() -> None:
    assert [duration(s) for s in (9.44, 59.9, 185, 7385)] == ["9.4 s", "59.9 s", "3:05 min", "2:03:05 h"]
    assert [cell_text(None), cell_text(1.0), cell_text(0.0)] == ["·", "100.0", "0.0"]


def test_a_console_in_ascii_gets_question_marks() -> None:
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding="ascii"), width=80)
    print_matrix([[None], [0.5]], ["über"], "accuracy", True, console)
    print_summary({"average_accuracy": 0.5}, {}, "größe/report.html", console)
    console.file.flush()
    assert b"50.0" in raw.getvalue() and b"gr??e/report.html" in raw.getvalue()


def test_tables_import_neither_torch_nor_lightning() -> None:
    program = (
        "import sys, clplatform.tracking.tables as t; assert not {'torch', 'pytorch_lightning'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
