"""The sub-commands of the console script."""

from __future__ import annotations

import argparse
import difflib
import json
from pathlib import Path
from typing import Any, NoReturn

from clplatform.types import ClplatformError


class Parser(argparse.ArgumentParser):
    """Refuses in one line, as everything else does."""

    def error(self, message: str) -> NoReturn:
        raise ClplatformError(f"{self.prog.partition(' ')[2]}: {message}; see `{self.prog} --help`")


def resume(arguments: list[str]) -> int:
    """`clplatform resume RUN`"""
    parser = Parser(prog="clplatform resume", description="Go on where a run stopped.")
    parser.add_argument("run", type=Path, help="the run directory")
    run_dir = parser.parse_args(arguments).run
    from omegaconf import OmegaConf

    from clplatform.files import read_json
    from clplatform.run import show

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
    parser = Parser(prog="clplatform report", description="Report over one run, several, or a sweep.")
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="run directories, or folders of them")
    parser.add_argument("-o", "--output", type=Path, help="folder for a comparison (default: beside the runs)")
    options = parser.parse_args(arguments)
    from clplatform.report import report as write

    print(write(options.paths, options.output))
    return 0


def list_(arguments: list[str]) -> int:
    """`clplatform list [KIND]`"""
    from clplatform.listing import KINDS, show

    parser = Parser(prog="clplatform list", description="What there is, one line each.")
    parser.add_argument("kind", nargs="?", help=f"only this (default: everything): {', '.join(KINDS)}")
    parser.add_argument("--config-dir", type=Path, help="a folder with pages of your own")
    options = parser.parse_args(arguments)
    if options.kind not in (None, *KINDS):
        near = difflib.get_close_matches(options.kind, KINDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there is: {', '.join(KINDS)}"
        raise ClplatformError(f"list {options.kind}: there is no such kind; {hint}")
    if options.config_dir is not None and not options.config_dir.is_dir():
        raise ClplatformError(f"--config-dir {options.config_dir}: there is no such folder")
    show([options.kind] if options.kind else KINDS, options.config_dir)
    return 0


def check(arguments: list[str]) -> int:
    """`clplatform check strategy=NAME [settings]`"""
    parser = Parser(
        prog="clplatform check",
        description="Put a strategy through the conformance suite, in a tiny world of its own: about twenty promises "
        "that every strategy must keep, whatever it does. Exit code 1 if one is broken.",
    )
    parser.add_argument("settings", nargs="+", metavar="strategy=NAME", help="the strategy, and settings of it")
    parser.add_argument("--config-dir", help="a folder with pages of your own")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    options = parser.parse_intermixed_args(arguments)
    other = [s for s in options.settings if not s.lstrip("+~").startswith(("strategy=", "strategy."))]
    if other:
        raise ClplatformError(f"check {other[0]}: the world of the check is fixed; only strategy=… and strategy.… fit")
    if not any(s.startswith("strategy=") for s in options.settings):
        raise ClplatformError("check: say which strategy, as in `clplatform check strategy=ewc`")
    from clplatform.check.command import run

    return run(options.settings, options.config_dir, traceback=options.traceback)


def predict(arguments: list[str]) -> int:
    """`clplatform predict RUN [INPUT]`"""
    parser = Parser(
        prog="clplatform predict",
        description="Classify new samples with the model of a run. INPUT: text lines (.txt, or - for standard input), "
        "CSV, TSV or JSONL with a text column, image files or a folder of them, or an array (.npy). "
        "One JSON object per sample on standard output.",
    )
    parser.add_argument("run", type=Path, help="a run directory or a saved model")
    parser.add_argument("input", nargs="*", help="files; - or nothing: text lines from standard input")
    parser.add_argument(
        "--column",
        action="append",
        default=[],
        help="text column of CSV, TSV and JSONL files (default: text); twice for models of pairs of texts",
    )
    parser.add_argument("--task", type=int, help="task label, for models trained with task ids")
    parser.add_argument("--top", type=int, default=3, help="how many probabilities to show (default: 3)")
    parser.add_argument("--trust", action="append", default=[], help="allow classes with this prefix in the model")
    options = parser.parse_intermixed_args(arguments)
    from clplatform.inputs import read_images, read_texts
    from clplatform.saved import load

    predictor = load(options.run, trust=tuple(options.trust))
    text = predictor.info.input.modality == "text"
    paths = options.input or ["-"]
    names, inputs = read_texts(paths, options.column or ["text"]) if text else read_images(paths)
    for name, p in zip(names, predictor.predict(inputs, task=options.task, top=options.top), strict=True):
        row = {"input": name, "label": p.label, "probability": p.probability, "probabilities": p.probabilities}
        print(json.dumps(row, ensure_ascii=False))
    return 0
