"""The saved model: a Hugging Face-style folder that predicts on its own.

`<run>/model/` holds `model.safetensors` (backbone, head and what strategies put into `extras`), the backbone's
`config.json`, the tokenizer if there is one, and `clplatform.json`: the configuration, the stream's metadata and
the experiences from whose metadata the structure is rebuilt before the weights are loaded.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from clplatform.files import atomic_write, read_json, write_json
from clplatform.types import ClplatformError, ExperienceInfo, Stream, StreamInfo

if TYPE_CHECKING:
    from torch import Tensor

    from clplatform.learner import Learner

SCHEMA_VERSION = 1


def save_model(folder: Path, learner: Learner, stream: Stream, config: dict[str, Any]) -> None:
    """Write the model folder."""
    from safetensors.torch import save_model as save_weights

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        save_weights(learner, str(Path(scratch) / "weights"))  # tied weights are stored once
        atomic_write(folder / "model.safetensors", (Path(scratch) / "weights").read_bytes())
    learner.backbone.save_assets(folder)
    stream.save_assets(folder)
    write_json(
        folder / "clplatform.json",
        {
            "schema_version": SCHEMA_VERSION,
            "config": config,
            "stream": learner.info.to_dict(),
            "experiences": [info.to_dict() for info in learner.seen],
        },
    )


class Saved:
    """A trained model, ready to predict. Made by `clplatform.load`.

    Args:
        learner: the model, in eval mode.
        folder: where it was saved.
        tokenizer: of text models.
        settings: of the stream that it has learned.
    """

    columns: ClassVar[list[str]] = ["text"]  # of tables that `clplatform predict` reads
    writes: ClassVar[bool] = False  # does `predict` take a `search`?

    def __init__(
        self, learner: Learner, folder: Path, tokenizer: Any = None, settings: dict[str, Any] | None = None
    ) -> None:
        self.learner, self.folder, self.tokenizer, self.settings = learner, folder, tokenizer, settings or {}
        self.info: StreamInfo = learner.info

    def encode(self, inputs: Any) -> dict[str, Tensor]:
        """Texts, or pairs of texts, as the model reads them: longer ones are cut, and it is said how many."""
        from clplatform.stream.tokenizer import encode, tokenize

        texts, longest = check_texts(inputs), self.info.input.max_length
        if longest is None:
            return encode(self.tokenizer, texts, None)
        columns, cut = tokenize(self.tokenizer, texts, longest)
        self.tell_cut(cut, len(texts), longest)
        return columns

    def tell_cut(self, cut: int, n: int, longest: int, *, at: str = "end") -> None:
        """Say how many of n texts are cut, and where, to the tokens that the model reads."""
        if cut:
            print(f"clplatform: {cut} of {n} texts are cut at the {at} to {longest} tokens", file=sys.stderr)

    def batches(self, columns: dict[str, Tensor], task: int | None, batch_size: int) -> Iterator[dict[str, Tensor]]:
        """Columns [N, …] as batches that the model can be given; none of no samples.

        Raises:
            ClplatformError: a task id is missing or unknown.
        """
        import torch

        from clplatform.data import trim

        tasks = sorted({e.task_label for e in self.learner.seen})
        if self.info.task_ids and task is None:
            raise ClplatformError(f"the model was trained with task ids: say which task, of {tasks}")
        if task is not None and task not in tasks:
            raise ClplatformError(f"task {task}: the model has learned tasks {tasks}")
        if batch_size < 1:
            raise ClplatformError(f"batch_size={batch_size}: give 1 or more")
        n = len(next(iter(columns.values())))
        for rows in torch.arange(n).split(batch_size) if n else ():
            batch = trim({name: column[rows] for name, column in columns.items()})
            batch["task_labels"] = torch.full((len(rows),), task or 0)
            yield {name: column.to(self.learner.device) for name, column in batch.items()}


@dataclass(frozen=True)
class Prediction:
    """One sample's answer."""

    label: str  # the class's name
    class_index: int  # its number, in the order in which the stream showed the classes
    probability: float
    probabilities: dict[str, float]  # of the most likely classes, best first

    def row(self) -> dict[str, Any]:
        """What `clplatform predict` prints."""
        return {"label": self.label, "probability": self.probability, "probabilities": self.probabilities}


class Predictor(Saved):
    """A trained classifier."""

    @property
    def class_names(self) -> list[str]:
        """Names of the classes the model has learned."""
        return list(self.info.class_names[: self.learner.n_classes])

    def logits(self, inputs: Any, *, task: int | None = None, batch_size: int = 256) -> Tensor:
        """Logits [N, K] of what the model reads: texts (or pairs of texts), image files, or arrays [N, H, W] or
        [N, C, H, W].

        Args:
            task: task label of the samples, for models whose stream offered task ids.
            batch_size: samples that go through the model at once.

        Raises:
            ClplatformError: the input does not fit the model, or a task id is missing or unknown.
        """
        import torch

        logits = [torch.zeros(0, self.learner.n_classes)]
        with torch.inference_mode():
            for batch in self.batches(self._columns(inputs), task, batch_size):
                logits.append(self.learner(batch).logits.float().cpu())
        return torch.cat(logits)

    def predict(self, inputs: Any, *, task: int | None = None, top: int = 3, batch_size: int = 256) -> list[Prediction]:
        """One `Prediction` for each sample; `top`: how many probabilities each carries (those of classes that its task
        does not have are left out)."""
        if top < 1:
            raise ClplatformError(f"top={top}: give 1 or more")
        probabilities = self.logits(inputs, task=task, batch_size=batch_size).softmax(1)
        values, classes = probabilities.topk(min(top, probabilities.shape[1]), dim=1)
        names = self.class_names
        return [
            Prediction(names[c[0]], c[0], v[0], {names[k]: p for k, p in zip(c, v, strict=True) if p > 0})
            for c, v in zip(classes.tolist(), values.tolist(), strict=True)
        ]

    def _columns(self, inputs: Any) -> dict[str, Tensor]:
        if self.info.input.modality == "text":
            return self.encode(inputs)
        import torch

        from clplatform.stream.images import images_to_tensor

        assert self.info.input.shape is not None
        if isinstance(inputs, list | tuple) and not inputs:
            return {"pixel_values": torch.zeros(0, *self.info.input.shape)}
        return {"pixel_values": images_to_tensor(inputs, self.info.input)}


def check_texts(inputs: Any) -> list[Any]:
    """Texts, or pairs of texts, as they are given: one or several.

    Raises:
        ClplatformError: a sample is something else.
    """
    samples = [inputs] if isinstance(inputs, str) else list(inputs)
    pairs = bool(samples) and not isinstance(samples[0], str)
    for i, sample in enumerate(samples):
        texts = sample if isinstance(sample, list | tuple) else [sample]
        if len(texts) != 1 + pairs or not all(isinstance(text, str) and text.strip() for text in texts):
            raise ClplatformError(f"sample {i}: {sample!r} is not a {'pair of texts' if pairs else 'text'}")
    return [tuple(sample) for sample in samples] if pairs else samples


def model_folder(path: Path) -> Path:
    """The model folder of a run directory (or the folder itself).

    Raises:
        ClplatformError: there is none.
    """
    for folder in (path / "model", path):
        if (folder / "clplatform.json").is_file():
            return folder
    if (path / "results.json").is_file():
        raise ClplatformError(f"{path}: the run has no saved model yet; finish it with `clplatform resume {path}`")
    raise ClplatformError(f"{path} is neither a run directory nor a saved model")


def load(path: str | Path, *, device: str = "cpu", trust: tuple[str, ...] | str = ()) -> Any:
    """Load the model of a run: a `Predictor`, or what `clplatform.answering` and `clplatform.writing` have for the problem.

    Args:
        path: a run directory, or its `model` folder.
        device: where it runs.
        trust: prefixes of classes outside clplatform that the run's configuration may build.

    Raises:
        ClplatformError: no model there, its configuration builds what is not trusted, or it is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_model as load_weights

    from clplatform.build import build_learner, build_strategies
    from clplatform.config import check_trust

    folder = model_folder(Path(path))
    saved = read_description(folder / "clplatform.json")
    check_trust(saved["config"], (trust,) if isinstance(trust, str) else trust)
    info = StreamInfo.from_dict(saved["stream"])
    learner = build_learner(saved["config"], info, build_strategies(saved["config"]), assets=folder)
    for values in saved["experiences"]:
        learner.build(ExperienceInfo.from_dict(values))
    try:
        load_weights(learner, str(folder / "model.safetensors"))
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ClplatformError(f"{folder / 'model.safetensors'} is not the model's or is damaged ({reason})") from None
    tokenizer = None
    if info.input.modality == "text":
        from clplatform.stream.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(folder)
    try:
        return predictor_of(info.problem)(learner.eval().to(device), folder, tokenizer, saved["config"]["stream"])
    except (RuntimeError, AssertionError) as error:
        raise ClplatformError(f"device={device}: {str(error).partition(chr(10))[0]}") from None


def predictor_of(problem: str) -> Any:
    """The class of what `load` gives for this problem."""
    if problem == "classification":
        return Predictor
    from clplatform.answering import Answerer, Tagger
    from clplatform.writing import Continuer, Filler, Writer

    by_problem = {
        "token_classification": Tagger,
        "question_answering": Answerer,
        "seq2seq": Writer,
        "causal_lm": Continuer,
    }
    return {**by_problem, "masked_lm": Filler}[problem]


def read_description(path: Path) -> dict[str, Any]:
    """`clplatform.json` of a model folder.

    Raises:
        ClplatformError: it is damaged, or of another version.
    """
    try:
        saved = read_json(path)
    except ValueError as error:
        raise ClplatformError(f"{path} is damaged ({error})") from None
    version = saved.get("schema_version") if isinstance(saved, dict) else None
    if version != SCHEMA_VERSION:
        raise ClplatformError(f"{path} is of version {version}; this clplatform reads version {SCHEMA_VERSION}")
    return saved
