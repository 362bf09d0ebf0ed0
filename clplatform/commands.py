"""The sub-commands of the console script."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from clplatform.types import ClplatformError

IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


def resume(arguments: list[str]) -> int:
    """`clplatform resume RUN`"""
    parser = argparse.ArgumentParser(prog="clplatform resume", description="Go on where a run stopped.")
    parser.add_argument("run", type=Path, help="the run directory")
    run_dir = parser.parse_args(arguments).run
    from omegaconf import OmegaConf

    from clplatform.compose import show
    from clplatform.files import read_json

    if not (run_dir / "results.json").is_file() or not (run_dir / "config.yaml").is_file():
        raise ClplatformError(f"{run_dir} is not a run directory (no results.json and config.yaml in it)")
    if read_json(run_dir / "results.json")["status"] == "completed":
        print(f"{run_dir}: complete already")
        return 0
    config: Any = OmegaConf.to_container(OmegaConf.load(run_dir / "config.yaml"))
    show(config, run_dir, resume=True)
    return 0


def report(arguments: list[str]) -> int:
    """`clplatform report PATH...`"""
    parser = argparse.ArgumentParser(prog="clplatform report", description="Report over one run, several, or a sweep.")
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="run directories, or folders of them")
    parser.add_argument("-o", "--output", type=Path, help="folder for a comparison (default: beside the runs)")
    options = parser.parse_args(arguments)
    from clplatform.report import report as write

    print(write(options.paths, options.output))
    return 0


def list_(arguments: list[str]) -> int:
    """`clplatform list [KIND]`"""
    from clplatform.listing import KINDS, show

    parser = argparse.ArgumentParser(prog="clplatform list", description="What there is, one line each.")
    parser.add_argument("kind", nargs="?", choices=KINDS, help="only this (default: everything)")
    parser.add_argument("--config-dir", type=Path, help="a folder with pages of your own")
    options = parser.parse_args(arguments)
    show([options.kind] if options.kind else KINDS, options.config_dir)
    return 0


def predict(arguments: list[str]) -> int:
    """`clplatform predict RUN [INPUT]`"""
    parser = argparse.ArgumentParser(
        prog="clplatform predict",
        description="Classify new samples with the model of a run. INPUT: text lines (.txt, or - for standard input), "
        "CSV or JSONL with a text column, image files or a folder of them, or an array (.npy). "
        "One JSON object per sample on standard output.",
    )
    parser.add_argument("run", type=Path, help="a run directory or a saved model")
    parser.add_argument("input", nargs="*", default=["-"], help="files; - or nothing: text lines from standard input")
    parser.add_argument("--column", default="text", help="text column of CSV and JSONL files (default: text)")
    parser.add_argument("--task", type=int, help="task label, for models trained with task ids")
    parser.add_argument("--top", type=int, default=3, help="how many probabilities to show (default: 3)")
    parser.add_argument("--trust", action="append", default=[], help="allow classes with this prefix in the model")
    options = parser.parse_args(arguments)
    from clplatform.saved import load

    predictor = load(options.run, trust=tuple(options.trust))
    text = predictor.info.input.modality == "text"
    names, inputs = read_texts(options.input, options.column) if text else read_images(options.input)
    for name, p in zip(names, predictor.predict(inputs, task=options.task, top=options.top), strict=True):
        row = {"input": name, "label": p.label, "probability": p.probability, "probabilities": p.probabilities}
        print(json.dumps(row, ensure_ascii=False))
    return 0


def read_texts(paths: Iterable[str], column: str) -> tuple[Any, Any]:
    """Texts of all files, in order; twice: as names and as inputs."""
    texts = [text for path in paths for text in _texts(path, column)]
    if not texts:
        raise ClplatformError("there is no text to classify in the input")
    return texts, texts


def _texts(path: str, column: str) -> Iterable[str]:
    lines = sys.stdin.read() if path == "-" else _read(Path(path))
    suffix = Path(path).suffix.lower()
    if suffix == ".csv":
        rows: Any = enumerate(csv.DictReader(lines.splitlines()), start=2)
    elif suffix in (".jsonl", ".ndjson"):
        rows = ((i, _json(path, i, line)) for i, line in enumerate(lines.splitlines(), start=1) if line.strip())
    else:
        for line in lines.splitlines():
            if line.strip():
                yield line
        return
    for number, row in rows:
        if column not in row or row[column] is None:
            raise ClplatformError(
                f"{path}:{number}: no column {column!r} (there is: {', '.join(map(str, row))}); use --column"
            )
        yield row[column]


def _json(path: str, number: int, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ClplatformError(f"{path}:{number}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ClplatformError(f"{path}:{number}: not a JSON object")
    return value


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ClplatformError(f"there is no file {path}") from None
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise ClplatformError(f"{path}: not a text file in UTF-8 ({error})") from None


def read_images(paths: Iterable[str]) -> tuple[Any, Any]:
    """Names and inputs: one array file, or image files and folders of them."""
    files: Any = []
    for path in map(Path, paths):
        if path.is_dir():
            files += sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGES)
        elif path.is_file():
            files.append(path)
        else:
            raise ClplatformError(
                f"there is no file {path}; the model classifies images: give image files or an array (.npy)"
            )
    if len(files) == 1 and files[0].suffix == ".npy":
        import numpy as np

        array = np.load(files[0], allow_pickle=False)
        return [f"{files[0]}[{i}]" for i in range(len(array))], array
    if not files:
        raise ClplatformError("there is no image in the input")
    return [str(f) for f in files], files
