"""The few types that everything shares. Importing this file imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, get_args

if TYPE_CHECKING:
    from torch import Tensor

Scenario = Literal["class_incremental", "task_incremental", "domain_incremental"]
Problem = Literal["classification", "token_classification", "question_answering", "causal_lm", "masked_lm", "seq2seq"]
Modality = Literal["image", "text"]

# Problems whose answers are tokens of the vocabulary.
LANGUAGE: frozenset[str] = frozenset({"causal_lm", "masked_lm", "seq2seq"})
PROBLEMS: frozenset[str] = frozenset(get_args(Problem))
# Problems whose answers are classes, of which later experiences may bring more.
CLASSES: frozenset[str] = frozenset({"classification", "token_classification"})

# A batch is a dict of tensors whose first dimension is the batch, with Hugging Face names
# (`pixel_values`, `input_ids`, `attention_mask`, `labels`) plus `task_labels` [B], `index` [B]
# (stable sample ids of the stream) and `source` [B] (0: the stream, n > 0: the n-th memory).
# `labels` are classes [B]; where every token has one, [B, T] and `IGNORED` for those that have none. They
# stand where they are predicted: of a language model the label is the token that follows. Where a span answers,
# they are the places [B, 2] of its first and its last token, and `answerable` [B, T] says where it may be.
# An encoder-decoder's batch also has `decoder_input_ids` and `decoder_attention_mask` [B, T].
Batch: TypeAlias = "dict[str, Tensor]"

# Value of a logit whose class is not available (another task's class, a class not seen yet).
# Finite, so that softmax gives an exact zero and differences of two masked logits are zero, not nan.
MASKED = -1e4

# The label of a token that is not predicted, as in PyTorch's cross-entropy.
IGNORED = -100


class ClplatformError(Exception):
    """A user's mistake: the message says what is wrong, where, and what to do. Shown without a traceback."""


class Data(Protocol):
    """Samples that are fetched a batch at a time (`clplatform.stream.data` has the implementations)."""

    def __len__(self) -> int: ...
    def fetch(self, rows: Tensor) -> Batch:
        """The rows [B] (positions in this data) as one batch."""
        ...

    def select(self, rows: Tensor) -> Data:
        """The same samples restricted to `rows`, sharing memory."""
        ...

    def __add__(self, other: Any) -> Data:
        """Concatenation."""
        ...

    @property
    def labels(self) -> Tensor:
        """Class of every sample, int64 [N]."""
        ...


@dataclass(frozen=True)
class ExperienceInfo:
    """What is known of an experience without its data: all that a structure may be built from.

    Classes are numbered in the order in which the stream shows them, so after this experience the
    classes 0 … n_seen_classes−1 exist.
    """

    index: int  # 0 is the first
    name: str
    task_label: int
    classes: tuple[int, ...]  # the classes of this experience, sorted
    n_seen_classes: int
    is_boundary: bool = True  # does a task end here? False in streams without boundaries

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ExperienceInfo:
        return cls(**{**values, "classes": tuple(values["classes"])})


@dataclass(frozen=True)
class Experience(ExperienceInfo):
    """One experience with its data. Train, validation and test never overlap."""

    train: Data = field(kw_only=True, repr=False)
    validation: Data | None = field(kw_only=True, repr=False)  # None: the stream has no validation split
    test: Data = field(kw_only=True, repr=False)

    @property
    def info(self) -> ExperienceInfo:
        return ExperienceInfo(**{name: getattr(self, name) for name in ExperienceInfo.__dataclass_fields__})


@dataclass(frozen=True)
class InputSpec:
    """What a sample looks like: a backbone is built to fit it."""

    modality: Modality
    # images: channels, height, width of `pixel_values` [B, C, H, W] (uint8 0…255 or float), and the
    # per-channel mean and standard deviation of pixels scaled to 0…1
    shape: tuple[int, int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    # text: `input_ids` and `attention_mask` [B, T]
    vocab_size: int | None = None
    pad_token_id: int | None = None
    max_length: int | None = None
    # text that is written (generation): the first token, the last one, and the most tokens of a target
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    max_target_length: int | None = None
    mask_token_id: int | None = None  # masked language models: what hides a token

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> InputSpec:
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**plain)


@dataclass(frozen=True)
class StreamInfo:
    """What is known of a stream without its data (JSON-serialisable; saved with every model)."""

    name: str
    scenario: Scenario
    problem: Problem
    n_experiences: int
    classes_per_experience: tuple[int, ...]
    class_names: tuple[str, ...]  # by class number, i.e. in the order of appearance
    seed: int
    input: InputSpec
    task_ids: bool  # may the task id be used at inference?
    primary_metric: str = "accuracy"
    higher_is_better: bool = True
    boundaries: bool = True  # does it mark where a task ends?

    @property
    def predicts_text(self) -> bool:
        """Are the classes the tokens of a vocabulary?"""
        return self.problem in LANGUAGE

    @property
    def has_classes(self) -> bool:
        """Does an experience bring classes of its own? Not where tokens of a vocabulary or places in a text are predicted."""
        return self.problem in CLASSES

    @property
    def several_labels(self) -> bool:
        """Has a sample several labels (of its tokens, of a span's ends)?"""
        return self.problem != "classification"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> StreamInfo:
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**{**values, "input": InputSpec.from_dict(values["input"])})


class Backbone(Protocol):
    """What a backbone module (an `nn.Module`) offers beside `__call__(batch) -> features [B, feature_size]`.

    A language model's features are [B, T, feature_size]; it also has `projection`, the module that makes logits
    [B, T, V] of them, and, if it writes, `generate(batch) -> tokens [B, T]`.
    """

    feature_size: int
    n_tokens: int  # positions that a sample has inside the model: its work per sample

    def __call__(self, batch: Batch) -> Tensor: ...
    def blocks(self) -> list[Any]:
        """Its parts from input to output (embeddings first): what `freeze` counts in."""
        ...


class Head(Protocol):
    """What a head module (an `nn.Module`) offers."""

    def grow(self, info: ExperienceInfo) -> None:
        """Make room for the classes of this experience; idempotent; old weights are kept."""
        ...

    def __call__(self, features: Tensor, task_labels: Tensor) -> Tensor:
        """features [B, D], task_labels [B] → logits [B, K]; a class that the head of a sample's task lacks
        gets the logit `MASKED`."""
        ...


class Stream(Protocol):
    """A sequence of experiences over an Avalanche benchmark."""

    info: StreamInfo
    notes: list[str]  # facts for the report (texts that were cut, samples that were left out)

    @property
    def augments(self) -> bool:
        """Does `augment` change anything?"""
        ...

    @property
    def benchmark(self) -> Any:
        """The Avalanche benchmark: streams `train`, `validation` (if there is one) and `test`."""
        ...

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Experience: ...
    def __iter__(self) -> Iterator[Experience]: ...
    def augment(self, batch: Batch, generator: Any) -> Batch:
        """Random augmentation of a training batch (identity if the stream has none)."""
        ...

    def save_assets(self, folder: Any) -> None:
        """Write what prediction needs beside the weights (the tokenizer) into `folder`."""
        ...


@dataclass(frozen=True)
class Stage:
    """One gradient-training phase of an experience; most strategies have exactly one."""

    name: str = "main"
    data: Data | None = None  # None: the experience's training data
    max_epochs: int | None = None  # None: the trainer's
    trainable: str | None = None  # regular expression over parameter names; None: what is trainable now


@dataclass
class Output:
    """What a forward pass gives: logits [B, K] (K: classes seen so far) and features [B, D].

    Where every token is predicted, logits [B, T, K] and features [B, T, D]. When a model writes (generation), `tokens`
    [B, T] are what it has written, and the others are empty.
    """

    logits: Tensor
    features: Tensor
    tokens: Tensor | None = None
