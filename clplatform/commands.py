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


def update(arguments: list[str]) -> int:
    """`clplatform update RUN DATA`"""
    parser = Parser(
        prog="clplatform update",
        description="Teach the model of a run new data as its next experience, with the strategy that it has: what that keeps "
        "(a memory, importances, experts) is there. Makes a new run; RUN stays as it is. Classes that the model knows by name "
        "are the same, others are new ones. Settings: trainer.max_epochs=3, optimizer.lr=1e-4, …, and stream.… for how DATA "
        "is read, such as stream.label_column=intent.",
    )
    parser.add_argument("run", type=Path, help="a completed run directory")
    parser.add_argument(
        "data",
        type=Path,
        help="what fits the model: labelled texts (CSV, TSV, JSONL, Parquet), a folder with a folder of images for each class, "
        "tagged words, questions, pairs of texts, plain text",
    )
    parser.add_argument("settings", nargs="*", metavar="setting=value", help="how to train, and how to read DATA")
    parser.add_argument("--test", type=Path, help="the same to test on (default: a fifth of DATA is held out)")
    parser.add_argument("-o", "--output", type=Path, help="the new run directory (default: outputs/<name>/<time>)")
    parser.add_argument(
        "--without-earlier-data",
        action="store_true",
        help="the data that RUN was trained on are not there any more: the model is not evaluated on them again",
    )
    options = parser.parse_intermixed_args(arguments)
    from clplatform.updating import update as teach

    folder = teach(
        options.run, options.data, test=options.test, output=options.output, settings=options.settings,
        earlier_data=not options.without_earlier_data,
    )  # fmt: skip
    print(f"The updated model: {folder}")
    return 0


def report(arguments: list[str]) -> int:
    """`clplatform report PATH...`"""
    parser = Parser(prog="clplatform report", description="Report over one run, several, or a sweep.")
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="run directories, or folders of them")
    parser.add_argument("-o", "--output", type=Path, help="folder for a comparison (default: beside the runs)")
    parser.add_argument(
        "--watch", action="store_true", help="show how a run or a sweep goes on in another process, until it has ended"
    )
    options = parser.parse_args(arguments)
    if options.watch:
        if len(options.paths) > 1 or options.output:
            raise ClplatformError("report --watch: give one run directory, or one folder of runs, and no --output")
        from clplatform.report.watch import watch

        return watch(options.paths[0])
    from clplatform.report import report as write

    print(write(options.paths, options.output))
    return 0


def dashboard(arguments: list[str]) -> int:
    """`clplatform dashboard PROJECT`"""
    parser = Parser(
        prog="clplatform dashboard",
        description="Create a workspace and a report in Weights & Biases for the runs of a project (tracking.project): curves "
        "over experiences by strategy, matrices, final metrics, losses, cost. Needs clplatform[dashboard] and a login.",
    )
    parser.add_argument("project", metavar="PROJECT", help="name of the W&B project")
    parser.add_argument("--entity", help="user or team that it belongs to (default: yours)")
    parser.add_argument("--dry-run", action="store_true", help="print what would be made as JSON; needs no login")
    options = parser.parse_args(arguments)
    from clplatform.dashboard import dashboard as create

    print(create(options.project, options.entity, dry_run=options.dry_run))
    return 0


def diagnose(arguments: list[str]) -> int:
    """`clplatform diagnose RUN`"""
    parser = Parser(
        prog="clplatform diagnose",
        description="Why has a finished run forgotten? Looks at its saved models and its data again: how much of the "
        "forgetting is the head's, how far the features have drifted, how fast what is forgotten is relearned. Writes "
        "diagnosis.json, and the report anew. A run with keep_models=true can be told the most of.",
    )
    parser.add_argument("run", type=Path, help="the run directory")
    parser.add_argument(
        "--part",
        action="append",
        choices=("head_bias", "drift", "relearning"),
        help="only this; may be given more than once (default: all)",
    )
    parser.add_argument(
        "--samples", type=int, default=1000, help="training samples of each experience to fit probes to (default: 1000)"
    )
    parser.add_argument(
        "--level", type=float, default=0.9, help="share of its old accuracy at which it is relearned (default: 0.9)"
    )
    parser.add_argument(
        "--steps", type=int, help="most steps of relearning (default: those of an experience, up to 500)"
    )
    parser.add_argument("--device", default="cpu", help="where models run (default: cpu)")
    parser.add_argument("--trust", action="append", default=[], help="allow classes with this prefix in the model")
    options = parser.parse_args(arguments)
    for name in ("samples", "steps"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ClplatformError(f"diagnose: --{name} {value}: give 1 or more")
    if not 0 < options.level <= 1:
        raise ClplatformError(f"diagnose: --level {options.level}: give a share above 0, at most 1")
    from clplatform.diagnosis.diagnose import PARTS
    from clplatform.diagnosis.diagnose import diagnose as find
    from clplatform.report import write_report

    find(
        options.run, parts=tuple(options.part or PARTS), samples=options.samples, level=options.level,
        steps=options.steps, device=options.device, trust=tuple(options.trust),
        tell=lambda text: print(text, flush=True),
    )  # fmt: skip
    print(write_report(options.run))
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
        description="Answer new samples with the model of a run: classes of texts or images, entities in texts, answers to "
        "questions, texts that are written, gone on with, or have tokens filled in. INPUT: text lines (.txt, or - for "
        "standard input), CSV, TSV or JSONL with a text column (of questions: question and context), image files or a "
        "folder of them, or an array (.npy). One JSON object per sample on standard output.",
    )
    parser.add_argument("run", type=Path, help="a run directory or a saved model")
    parser.add_argument("input", nargs="*", help="files; - or nothing: text lines from standard input")
    parser.add_argument(
        "--column",
        action="append",
        default=[],
        help="text column of CSV, TSV and JSONL files (default: text, or question and context); twice for models of pairs "
        "of texts",
    )
    parser.add_argument("--task", type=int, help="task label, for models trained with task ids")
    parser.add_argument("--top", type=int, default=3, help="how many classes or tokens to show (default: 3)")
    how = parser.add_argument_group("of models that write (default: as the run did)")
    how.add_argument("--beams", type=int, help="beam search; 1: the most likely token, again and again")
    how.add_argument("--length-penalty", type=float, help="of a beam search (default: 1)")
    how.add_argument("--temperature", type=float, help="draw tokens at random; the lower, the more likely ones")
    how.add_argument("--top-k", type=int, help="draw among the K most likely tokens")
    how.add_argument("--top-p", type=float, help="draw among the likeliest that have this much probability together")
    how.add_argument("--seed", type=int, help="of what is drawn (default: 0)")
    parser.add_argument("--trust", action="append", default=[], help="allow classes with this prefix in the model")
    options = parser.parse_intermixed_args(arguments)
    from clplatform.inputs import read_images, read_texts
    from clplatform.saved import load

    predictor = load(options.run, trust=tuple(options.trust))
    text = predictor.info.input.modality == "text"
    paths = options.input or ["-"]
    names, inputs = read_texts(paths, options.column or predictor.columns) if text else read_images(paths)
    answers = predictor.predict(inputs, task=options.task, top=options.top, **_search(options, predictor))
    for name, answer in zip(names, answers, strict=True):
        print(json.dumps({"input": name, **answer.row()}, ensure_ascii=False))
    return 0


def _search(options: argparse.Namespace, predictor: Any) -> dict[str, Any]:
    """How a model should write, if that was said."""
    names = ("beams", "length_penalty", "temperature", "top_k", "top_p", "seed")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    if not given:
        return {}
    if not predictor.writes:
        raise ClplatformError(f"predict --{next(iter(given)).replace('_', '-')}: this model does not write texts")
    if "length_penalty" in given and given.get("beams", 1) == 1:
        raise ClplatformError("predict --length-penalty: it has no effect without --beams of 2 or more")
    if "seed" in given and "temperature" not in given:
        raise ClplatformError("predict --seed: it has no effect without --temperature")
    import torch

    from clplatform.backbone.search import Search

    seed = given.pop("seed", 0)
    return {"search": Search(**given, generator=torch.Generator(predictor.learner.device).manual_seed(seed))}
