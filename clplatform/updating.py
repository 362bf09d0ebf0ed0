"""`clplatform update RUN DATA`: a trained model learns new data as its next experience.

The new run is a folder of its own: it begins as a copy of the old one's record and of its last checkpoint (weights, and what the
strategy keeps: a memory, importances, experts), its stream is the old one's with the new experience after it, and it is resumed.
The old run stays as it is.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from clplatform import checkpoint
from clplatform.config import EXTRA, conf_dir
from clplatform.files import atomic_write, read_json
from clplatform.results import Results
from clplatform.saved import model_folder, read_description
from clplatform.stream.image_folder import split_folders
from clplatform.tracking.environment import code_state
from clplatform.types import ClplatformError, StreamInfo

# What may be another for the new experience: how it is trained and told of, not what is trained.
GROUPS = ("trainer", "optimizer", "scheduler", "tracking", "checkpoint", "stream")
MAY_CHANGE = (
    "trainer", "optimizer", "scheduler", "tracking", "checkpoint", "batch_size", "eval_batch_size", "num_workers", "threads",
    "label_smoothing", "bucket_by_length", "early_stopping", "evaluate_every", "evaluate_samples", "keep_models",
)  # fmt: skip
# Settings of the stream of the new data that are not for the user, and what is.
GIVEN = {
    "train": "the data come after the run: clplatform update RUN DATA",
    "paths": "the data come after the run: clplatform update RUN DATA",
    "data_dir": "the data come after the run: clplatform update RUN DATA",
    "test": "give --test",
    "epochs": "give trainer.max_epochs",
    **dict.fromkeys(
        ("scenario", "problem", "metric", "max_length", "max_target_length", "channels", "image_size"),
        "it is that of the model, which stays what it is",
    ),
}
HELD_OUT = 0.2  # of new data without a test set of their own
KEPT = ("metrics.jsonl", "continual_evaluation.jsonl", "models")  # of the old run, where it has them


def update(
    run: str | Path, data: str | Path, *, test: str | Path | None = None, output: str | Path | None = None,
    settings: Sequence[str] = (), earlier_data: bool = True,
) -> Path:  # fmt: skip
    """Teach the model of a run new data, without losing what its strategy can hold on to.

    Args:
        run: a completed run directory.
        data: what fits the problem that the run has learned: texts with labels (CSV, TSV, JSONL, Parquet), a folder with a
            folder of images for each class, tagged words, questions, pairs of texts, or plain text.
        test: the same to test on; None: a part of `data` is held out.
        output: the new run directory; None: `outputs/<name>/<time>`.
        settings: as on the command line: `trainer.max_epochs=3`, `optimizer.lr=1e-4`, and `stream.…` for how the new data are
            read (`stream.label_column=intent`).
        earlier_data: False: the data of earlier experiences are not there any more; the model is not evaluated on them again.

    Returns:
        The new run directory.

    Raises:
        ClplatformError: the run cannot be updated, or the new data do not fit; nothing is left behind.
    """
    from clplatform.experiment import AnotherStructure
    from clplatform.run import show

    old = Path(run)
    config = configuration(old)
    model = model_folder(old)
    info = StreamInfo.from_dict(read_description(model / "clplatform.json")["stream"])
    changes = changed(settings)
    node = new_stream(config, info, Path(data), None if test is None else Path(test), changes.pop("stream", {}))
    config["updates"] = [*config.get("updates", []), node]
    for root, value in changes.items():
        config[root] = {**config[root], **value} if isinstance(value, dict) else value
    config["references"] = False  # they were made for the stream as it was
    if not earlier_data:
        config["remembered"] = str(model.absolute())
        config["updates"] = [node]  # those before are known by the model too
    folder = Path(output or Path("outputs") / config["name"] / datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f"))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ClplatformError(f"update: there is something at {folder} already; give another --output")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        try:
            begin(old, folder, config, settings)
        except OSError as error:
            raise ClplatformError(f"update: {folder} cannot be written ({error})") from None
        show(config, folder, resume=True)
    except BaseException as error:
        if isinstance(error, AnotherStructure) or not (folder / "environment.json").exists():  # nothing was trained
            tidy(folder, made)
        raise
    return folder


def tidy(folder: Path, made: Sequence[Path]) -> None:
    """Take away what an update that was refused has left, and the folders that it has made."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    for path in made:
        if path.is_dir():
            path.rmdir()


def configuration(run: Path) -> dict[str, Any]:
    """The configuration of a completed run, as its model was trained with it.

    Raises:
        ClplatformError: it is none, or has nothing to go on from.
    """
    if not (run / "results.json").is_file() or not (run / "config.yaml").is_file():
        raise ClplatformError(f"{run} is not a run directory (no results.json and config.yaml in it)")
    if read_json(run / "results.json")["status"] != "completed":
        raise ClplatformError(f"{run}: the run is not complete; finish it with `clplatform resume {run}`")
    if not (path := run / "checkpoints" / "experience.ckpt").is_file():
        raise ClplatformError(f"{run} cannot be updated: its last checkpoint is not there ({path})")
    config = read_description(model_folder(run) / "clplatform.json")["config"]
    if (config.get("protocol") or {}).get("name") == "trial":
        raise ClplatformError(f"{run} is a trial of protocol=tune_first: update the run that it was made for")
    return config


def changed(settings: Sequence[str]) -> dict[str, Any]:
    """Settings as they are typed, nested.

    Raises:
        ClplatformError: one is no setting, or one of what must stay as it is.
    """
    settings = [setting.lstrip("+") for setting in settings]
    for setting in settings:
        name, equals, _ = setting.partition("=")
        root, _, key = name.partition(".")
        if not equals:
            raise ClplatformError(
                f"update {setting}: neither data nor a setting=value; give one file or folder of new data"
            )
        if root not in (*MAY_CHANGE, "stream"):
            raise ClplatformError(
                f"update {setting}: the model and its strategy stay what they are; what may be set is "
                f"{', '.join(f'{name}.…' if name in GROUPS else name for name in MAY_CHANGE)}, and stream.… of the new data"
            )
        if (root in GROUPS) == (not key) or "_target_" in key:
            raise ClplatformError(
                f"update {setting}: no other page can be chosen; set {root}.<setting>=<value>"
                if root in GROUPS
                else f"update {setting}: {root} has no settings of its own; set {root}=<value>"
            )
        if root == "stream" and key in GIVEN:
            raise ClplatformError(f"update {setting}: {GIVEN[key]}")
    try:
        nested: Any = OmegaConf.to_container(OmegaConf.from_dotlist(list(settings)))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ClplatformError(f"update {' '.join(settings)}: {str(error).partition(chr(10))[0]}") from None
    return nested


# -- the new data --------------------------------------------------------------------------------------------------------


def new_stream(
    config: dict[str, Any], info: StreamInfo, data: Path, test: Path | None, changes: dict[str, Any]
) -> dict[str, Any]:
    """The node of a stream of the new data: a page for the problem, told how the model reads and, where the run's own stream
    reads files of that kind, by which columns; last, `changes`.

    Raises:
        ClplatformError: there are no such files.
    """
    for path in (data, test):
        if path is not None and not path.exists():
            raise ClplatformError(f"there is no file or folder {path}")
    page, own = PAGES[info.problem] if info.input.modality == "text" else IMAGES
    node = {k: v for k, v in read_page(page).items() if k not in EXTRA["stream"]}
    for earlier in (config["stream"], *config.get("updates", [])):
        if earlier["_target_"] == node["_target_"]:
            node |= {key: earlier[key] for key in COLUMNS if key in node and key in earlier}
    node |= {"name": data.resolve().name.partition(".")[0] or "new data", "seed": config["seed"]}
    for name in ("max_length", "max_target_length"):
        if name in node:
            node[name] = getattr(info.input, name)
    if "paths" in node:
        if test is not None:
            raise ClplatformError(
                f"update --test {test}: of {page.replace('_', ' ')} a part is held out (stream.test_fraction); or give a folder "
                "with files of its own for the splits"
            )
        node["paths"] = [str(data.absolute())]
    else:
        node |= {"train": str(data.absolute()), "test": None if test is None else str(test.absolute())}
        with_test = test is not None or (data.is_dir() and "test" in split_folders(str(data), None, None))
        node["test_fraction"] = None if with_test else HELD_OUT
    if "augment" in node:
        node["augment"] = config["stream"].get("augment", node["augment"])
    node |= own(info)
    if changes.get("experience_column"):
        node["n_experiences"] = None
    if changes.get("validation") is not None:
        changes["validation"] = str(Path(changes["validation"]).absolute())
    return node | changes


def read_page(name: str) -> dict[str, Any]:
    """A stream's page."""
    return yaml.safe_load((conf_dir() / "stream" / f"{name}.yaml").read_text())


# Of a problem of texts: the page of the stream that reads its files, and what that is told of the model's stream.
PAGES: dict[str, Any] = {
    "classification": ("text_files", lambda info: {"n_experiences": 1}),
    "token_classification": ("token_files", lambda info: {"n_experiences": 1, "sentences": "shared"}),
    "question_answering": ("question_answering", lambda info: {}),
    "seq2seq": ("text_to_text", lambda info: {"task_key": None, "metric": info.primary_metric}),
    "causal_lm": ("text_domains", lambda info: {"problem": info.problem}),
    "masked_lm": ("text_domains", lambda info: {"problem": info.problem}),
}
IMAGES: Any = (
    "image_folder",
    lambda info: {"n_experiences": 1, "channels": info.input.shape[0], "image_size": list(info.input.shape[1:])},
)
# Where texts and labels stand in files.
COLUMNS = (
    "text_column",
    "label_column",
    "tokens_key",
    "tags_key",
    "token_column",
    "tag_column",
    "input_key",
    "target_key",
    "stride",
)


# -- the new run ---------------------------------------------------------------------------------------------------------


def begin(old: Path, folder: Path, config: dict[str, Any], settings: Sequence[str]) -> None:
    """Make the new run, as if it had been stopped after the last experience of the old one.

    Raises:
        ClplatformError: the old one's checkpoint is of another experience.
    """
    results = Results.load(old)
    state = checkpoint.load(old / "checkpoints" / "experience.ckpt")
    if state["position"] != [results.stream["n_experiences"], 0]:
        raise ClplatformError(f"{old} cannot be updated: its checkpoint is not of its last experience; run it again")
    typed = f" with {' '.join(settings)}" if settings else ""
    results.notes.append(
        f"experience {results.stream['n_experiences'] + 1} is an update of the run {results.run_id}{typed}"
    )
    results.run_id, results.status, results.references = uuid.uuid4().hex[:12], "running", {}
    results.code = code_state()
    (folder / "checkpoints").mkdir(parents=True)
    atomic_write(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(config)).encode())
    shutil.copyfile(old / "checkpoints" / "experience.ckpt", folder / "checkpoints" / "experience.ckpt")
    for name in KEPT:
        if (old / name).is_dir():
            shutil.copytree(old / name, folder / name)
        elif (old / name).is_file():
            shutil.copyfile(old / name, folder / name)
    results.save(folder)
