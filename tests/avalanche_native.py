"""Avalanche's own loop over the tiny world: its templates, its plugins, a plain PyTorch model; nothing of the host.

It starts from the same weights, sees the same batches in the same order, and has its random generators seeded where a
run of ours seeds its own. New rows of a head are a function of their class, so that growing draws nothing.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from avalanche.benchmarks import benchmark_from_datasets, with_classes_timeline, with_task_labels
from avalanche.benchmarks.utils.classification_dataset import TaskAwareSupervisedClassificationDataset
from avalanche.benchmarks.utils.data_attribute import DataAttribute
from avalanche.benchmarks.utils.flat_data import ConstantSequence
from avalanche.core import SupervisedPlugin
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.logging import BaseLogger
from avalanche.models import MultiTaskModule
from avalanche.models.base_model import BaseModel
from avalanche.models.dynamic_modules import DynamicModule
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.templates import SupervisedTemplate
from avalanche_cases import SHAPE, TEXT_SHAPE
from text_world import LENGTH
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate
from world import TinyBackbone

from clplatform.data import Loader, derive_seed
from clplatform.stream.avalanche import to_benchmark
from clplatform.types import MASKED, ExperienceInfo

SEED, BATCH_SIZE, EPOCHS = 0, 8, 2
SHAPES = {False: SHAPE, True: TEXT_SHAPE}  # of x, by: is it of texts?
Made = list[Any]


class KeyedHead(nn.Module):
    """A linear layer that grows; the weights of class k are a function of k."""

    def __init__(self) -> None:
        super().__init__()
        self.linear: nn.Linear | None = None

    def grow(self, info: ExperienceInfo) -> None:
        self.grow_to(info.n_seen_classes)

    def grow_to(self, n: int) -> None:
        old = self.linear
        if old is not None and n <= old.out_features:
            return
        self.linear = nn.utils.skip_init(nn.Linear, TinyBackbone.feature_size, n)
        with torch.no_grad():
            self.linear.weight.copy_(torch.stack([row(k)[:-1] for k in range(n)]))
            self.linear.bias.copy_(torch.stack([row(k)[-1] for k in range(n)]))
            if old is not None:
                self.linear.weight[: old.out_features] = old.weight
                self.linear.bias[: old.out_features] = old.bias

    def forward(self, features: Tensor, task_labels: Tensor | None = None) -> Tensor:
        assert self.linear is not None
        return self.linear(features)


def row(k: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + k)
    return torch.randn(TinyBackbone.feature_size + 1, generator=generator) / 4


class NativeModel(DynamicModule, BaseModel):
    """x → logits, written for Avalanche: it grows when it is adapted to an experience. x is [B, 1, 1, 12], or of texts
    [B, 2, L].

    Args:
        backbone: of the same weights as the run's.
        eval_classifier: classifies features in eval mode, as Avalanche's `TrainEvalModel`.
    """

    def __init__(self, backbone: nn.Module, eval_classifier: nn.Module | None = None, *, keep: bool = False) -> None:
        super().__init__()
        self.backbone, self.head = backbone, KeyedHead()
        self.head.grow_to(2)
        self.eval_classifier, self.keep = eval_classifier, keep
        self.features: Tensor | None = None

    def adaptation(self, experience: Any) -> None:
        self.head.grow_to(1 + max(experience.classes_seen_so_far))

    def get_features(self, x: Tensor) -> Tensor:
        return self.backbone(inputs(x))

    feature_extractor = get_features

    def forward(self, x: Tensor) -> Tensor:
        features = self.get_features(x)
        if self.keep:
            self.features = features
        if not self.training and self.eval_classifier is not None:
            return self.eval_classifier(features)
        return self.classify(features)

    def classify(self, features: Tensor) -> Tensor:
        return self.head(features)

    def load_state_dict(self, state_dict: Any, *args: Any, **settings: Any) -> Any:
        self.head.grow_to(len(state_dict["head.linear.bias"]))  # of a model that has grown since it was copied
        return super().load_state_dict(state_dict, *args, **settings)


class FlatModel(NativeModel):
    """With the last layer as an attribute of the model, as plugins that replace it need it."""

    def __init__(self, backbone: nn.Module, *args: Any, **settings: Any) -> None:
        super().__init__(backbone, *args, **settings)
        self.classifier: nn.Module = self.head.linear  # type: ignore[assignment]
        del self.head

    def adaptation(self, experience: Any) -> None: ...

    def classify(self, features: Tensor) -> Tensor:
        return self.classifier(features)


class NativeTaskModel(MultiTaskModule):
    """The same where task ids are known: of each sample only its own task's two classes are available."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, KeyedHead()
        self.head.grow_to(2)

    def adaptation(self, experience: Any) -> None:
        super().adaptation(experience)
        if self.training:
            self.head.grow_to(1 + max(experience.classes_seen_so_far))

    def forward(self, x: Tensor, task_labels: Tensor | None) -> Any:
        if task_labels is None:
            return {t: self(x, torch.full((len(x),), t)) for t in self.known_train_tasks_labels}
        logits = self.head(self.backbone(inputs(x)))
        own = torch.arange(logits.shape[1])[None] // 2 == task_labels.long()[:, None]
        return logits.masked_fill(~own, MASKED)


def inputs(x: Tensor) -> dict[str, Tensor]:
    """What the backbone takes."""
    if not isinstance(x, Tensor) or x.ndim == 4:  # (a symbolic trace is of images)
        return {"pixel_values": x}
    x = x[:, :, : int(x[:, 1].sum(1).max())].long()
    return {"input_ids": x[:, 0], "attention_mask": x[:, 1]}


def packed(batch: dict[str, Tensor]) -> Tensor:
    """Inverse of `inputs`."""
    if "pixel_values" in batch:
        return batch["pixel_values"]
    x = torch.zeros(len(batch["labels"]), 2, LENGTH)
    x[:, 0, : batch["input_ids"].shape[1]], x[:, 1, : batch["input_ids"].shape[1]] = (
        batch["input_ids"], batch["attention_mask"],
    )  # fmt: skip
    return x


class Texts(Dataset):
    """Texts as Avalanche reads them: (x, y)."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        batch = self.data.fetch(torch.tensor([i]))
        return packed(batch)[0], int(batch["labels"])


def text_benchmark(stream: Any) -> Any:
    """`stream.benchmark` with tensors for texts: 0.6.0 knows no dict mini-batches."""

    def dataset(data: Any, task: int) -> Any:
        tasks = ConstantSequence(task, len(data))
        attributes = [DataAttribute(data.labels.tolist(), "targets"),
                      DataAttribute(tasks, "targets_task_labels", use_in_getitem=True)]  # fmt: skip
        return TaskAwareSupervisedClassificationDataset(
            [Texts(data)], data_attributes=attributes, collate_fn=default_collate
        )

    streams = {s: [dataset(getattr(e, s), e.task_label) for e in stream] for s in ("train", "validation", "test")}
    return with_task_labels(with_classes_timeline(benchmark_from_datasets(**streams)))


def seed_all(index: int, phase: str) -> None:
    """As `Experiment._seed`."""
    seed = derive_seed(SEED, index, phase)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class Ours:
    """The batches of a run of ours as [x, y, t]."""

    def __init__(self, experience: Any) -> None:
        order = derive_seed(SEED, experience.index, "order", 0)
        self.loader = Loader(experience.train, BATCH_SIZE, shuffle=True, seed=order)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[list[Tensor]]:
        for batch in self.loader:
            yield [packed(batch), batch["labels"], batch["task_labels"]]


class Apart:
    """A data loader whose draws are apart from the model's: every epoch of it has a seed."""

    def __init__(self, minibatches: Any, index: int) -> None:
        self.minibatches, self.index, self.epoch = minibatches, index, 0

    def __len__(self) -> int:
        return len(self.minibatches)

    def __iter__(self) -> Iterator[Any]:
        inside = torch.Generator().manual_seed(
            derive_seed(derive_seed(SEED, self.index, "order", 0), "epoch", self.epoch)
        )
        self.epoch += 1
        state, items = inside.get_state(), None
        while True:
            outside = torch.get_rng_state()
            torch.set_rng_state(state)
            items = iter(self.minibatches) if items is None else items
            item = next(items, None)
            state = torch.get_rng_state()
            torch.set_rng_state(outside)
            if item is None:
                return
            yield item


class First(SupervisedPlugin):
    """Comes first: gives the batches of ours, unless another plugin has changed the data, and seeds."""

    def __init__(self, stream: Any) -> None:
        super().__init__()
        self.stream, self.data = stream, None

    def before_train_dataset_adaptation(self, strategy: Any, **_: Any) -> None:
        self.data = strategy.experience.dataset

    def after_train_dataset_adaptation(self, strategy: Any, **_: Any) -> None:
        self.adapted = strategy.adapted_dataset

    def before_training_exp(self, strategy: Any, **_: Any) -> None:
        if strategy.adapted_dataset is self.adapted and strategy.experience.dataset is self.data:
            strategy.dataloader = Ours(self.stream[strategy.experience.current_experience])

    def after_training_exp(self, strategy: Any, **_: Any) -> None:
        seed_all(strategy.experience.current_experience, "after")


class Last(SupervisedPlugin):
    """Comes last: keeps the draws of data loaders that plugins have brought apart."""

    def before_training_exp(self, strategy: Any, **_: Any) -> None:
        if not isinstance(strategy.dataloader, Ours):
            strategy.dataloader = Apart(strategy.dataloader, strategy.experience.current_experience)


def run_native(
    stream: Any,
    backbone: nn.Module,
    make_plugins: Callable[[nn.Module, torch.optim.Optimizer], Made],
    *,
    flat: bool = False,
    criterion: Any = None,
    eval_classifier: nn.Module | None = None,
    evaluate_every: int | None = None,
    keep: bool = False,
    reset_optimizer: bool = True,
    epochs: int = EPOCHS,
    metrics: tuple[Any, ...] = (),
) -> tuple[SupervisedTemplate, list[float]]:
    """Avalanche's strategy after it has learned the stream, and its test accuracy on every experience.

    Args:
        backbone: with its initial weights; it is trained.
        make_plugins: (model, optimizer) → plugins.
        keep: does the model keep the features of its last pass?
        flat: see `FlatModel`.
    """
    task_ids = stream.info.task_ids
    kind: Any = FlatModel if flat else NativeModel
    model = NativeTaskModel(backbone) if task_ids else kind(backbone, eval_classifier, keep=keep)
    seed_all(0, "before")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    plugins = [First(stream), *make_plugins(model, optimizer), Last()]
    strategy = SupervisedTemplate(
        model=model,
        optimizer=optimizer,
        criterion=criterion or nn.CrossEntropyLoss(),
        train_mb_size=BATCH_SIZE,
        eval_mb_size=64,
        train_epochs=epochs,
        plugins=plugins,
        evaluator=EvaluationPlugin(*metrics, accuracy_metrics(experience=True), loggers=[BaseLogger()]),
        eval_every=evaluate_every or -1,
    )
    benchmark = text_benchmark(stream) if stream.info.input.modality == "text" else to_benchmark(stream)
    n = stream.info.classes_per_experience
    facts = SimpleNamespace(n_classes_per_exp=list(n), classes_order=list(range(sum(n))))  # what iCaRL reads
    validation = benchmark.streams["validation"]
    with warnings.catch_warnings(record=True):  # Avalanche's filters would show its own remarks
        for i, experience in enumerate(benchmark.train_stream):
            experience.benchmark = facts
            seed_all(i, "stage 0")
            strategy.train(
                experience, eval_streams=[validation[i]], **({"reset_optimizer_state": True} if reset_optimizer else {})
            )
    found = strategy.eval(benchmark.test_stream)
    accuracies = [v for name, v in sorted(found.items()) if name.startswith("Top1_Acc_Exp/eval_phase/test_stream")]
    return strategy, accuracies


def native_weights(strategy: SupervisedTemplate) -> dict[str, Tensor]:
    """The model's, under the names of a run's."""
    found = {n.replace("classifier.0", "head.linear"): t.detach() for n, t in strategy.model.state_dict().items()}
    return {n: t for n, t in found.items() if n.startswith(("backbone.", "head."))}


def held(strategy: Any) -> dict[str, Tensor]:
    """What plugins hold for predictions: class means and covariances, a bias correction, prototypes."""
    classifier = getattr(strategy.model, "eval_classifier", None)
    tensors = dict(getattr(classifier, "_buffers", {}))
    for plugin in strategy.plugins:
        if getattr(plugin, "bias_layer", None) is not None:
            tensors |= plugin.bias_layer.state_dict()
        tensors |= {f"prototype {c}": p for c, p in getattr(plugin, "p_mem", {}).items()}
    return tensors
