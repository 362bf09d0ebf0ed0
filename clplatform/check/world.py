"""A tiny world: separable synthetic classes, a two-layer backbone, a head that grows, everything built by hand."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clplatform.backbone.huggingface import HuggingFaceImage
from clplatform.data import TensorData
from clplatform.experiment import Experiment
from clplatform.fitting import Fitter
from clplatform.learner import Learner
from clplatform.results import Results
from clplatform.strategy.base import Chain, Strategy
from clplatform.types import Batch, Experience, ExperienceInfo, InputSpec, StreamInfo

DIM = 12


class TinyBackbone(nn.Module):
    """[B, 1, 1, DIM] → tanh features [B, 16], normalised over the batch if `norm`."""

    feature_size = 16
    source = "random"

    def __init__(self, dropout: float = 0.0, norm: bool = False) -> None:
        super().__init__()
        self.layer = nn.Linear(DIM, self.feature_size)
        self.norm = nn.BatchNorm1d(self.feature_size) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)

    def forward(self, batch: Batch) -> Tensor:
        return self.dropout(self.norm(self.layer(batch["pixel_values"].flatten(1)).tanh()))

    def blocks(self) -> list[nn.Module]:
        return [self.layer]

    def save_assets(self, folder: Path) -> None: ...


def tiny_vit() -> nn.Module:
    """A Transformer of one layer over four patches of the same samples, features [B, 16] like `TinyBackbone`'s."""
    torch.manual_seed(0)
    return HuggingFaceImage(
        input=InputSpec("image", shape=(1, 1, DIM), mean=(0.0,), std=(1.0,)), name="tiny", pretrained=None, package=None,
        pooling="cls", image_size=None, dropout=0.0, attention="sdpa", freeze="none", config={
            "model_type": "vit", "hidden_size": TinyBackbone.feature_size, "num_hidden_layers": 2,
            "num_attention_heads": 2, "intermediate_size": 16, "image_size": [1, DIM], "patch_size": [1, 3],
        },
    )  # fmt: skip


class TinyHead(nn.Module):
    """A linear layer that grows."""

    def __init__(self) -> None:
        super().__init__()
        self.linear: nn.Linear | None = None

    def grow(self, info: ExperienceInfo) -> None:
        old = self.linear
        if old is not None and info.n_seen_classes <= old.out_features:
            return
        self.linear = nn.Linear(TinyBackbone.feature_size, info.n_seen_classes)
        if old is not None:
            self.linear.to(old.weight.device)
            with torch.no_grad():
                self.linear.weight[: old.out_features] = old.weight
                self.linear.bias[: old.out_features] = old.bias

    def forward(self, features: Tensor, task_labels: Tensor) -> Tensor:
        assert self.linear is not None
        return self.linear(features)


class TinyStream:
    """Gaussian classes: `n` experiences of two classes, `per_class` training samples each."""

    augments = False
    notes: list[str] = []

    def __init__(self, n: int = 3, *, scenario: str = "class_incremental", per_class: int = 16, noise: float = 0.5):
        g = torch.Generator().manual_seed(7)
        n_classes = 2 if scenario == "domain_incremental" else 2 * n
        self.info = StreamInfo(
            name="tiny",
            scenario=scenario,  # type: ignore[arg-type]
            problem="classification",
            n_experiences=n,
            classes_per_experience=(2,) * n,
            class_names=tuple(f"class {k}" for k in range(n_classes)),
            seed=0,
            input=InputSpec("image", shape=(1, 1, DIM), mean=(0.0,), std=(1.0,)),
            task_ids=scenario == "task_incremental",
        )
        centers = torch.randn(2 * n, DIM, generator=g)
        self.experiences = []
        start = 0
        for i in range(n):
            classes = (0, 1) if scenario == "domain_incremental" else (2 * i, 2 * i + 1)
            task = i if scenario == "task_incremental" else 0
            splits = []
            for size in (per_class, 4, 8):
                labels = torch.tensor(classes).repeat_interleave(size)
                x = centers[2 * i + labels % 2] + noise * torch.randn(len(labels), DIM, generator=g)
                splits.append(
                    TensorData(
                        {
                            "pixel_values": x[:, None, None],
                            "labels": labels,
                            "task_labels": torch.full_like(labels, task),
                            "index": torch.arange(start, start + len(labels)),
                        }
                    )
                )
                start += len(labels)
            train, validation, test = splits
            seen = 2 if scenario == "domain_incremental" else 2 * i + 2
            self.experiences.append(
                Experience(i, f"e{i + 1}", task, classes, seen, train=train, validation=validation, test=test)
            )

    def __len__(self) -> int:
        return len(self.experiences)

    def __getitem__(self, index: int) -> Experience:
        return self.experiences[index]

    def __iter__(self) -> Iterator[Experience]:
        return iter(self.experiences)

    def augment(self, batch: Batch, generator: Any) -> Batch:
        return batch

    def save_assets(self, folder: Path) -> None: ...


def make_learner(
    stream: Any, strategies: dict[str, Strategy], *, dropout: float = 0.0, backbone: nn.Module | None = None,
    **options: Any,
) -> Learner:  # fmt: skip
    """A learner with SGD, from fixed initial weights."""
    torch.manual_seed(0)
    return Learner(
        backbone=TinyBackbone(dropout) if backbone is None else backbone,
        make_head=TinyHead,
        chain=Chain(strategies),
        info=stream.info,
        optimizer=options.pop("optimizer", partial(torch.optim.SGD, lr=0.1, momentum=0.9)),
        **options,
    )


def make_experiment(
    run_dir: Path, strategies: dict[str, Strategy], *, stream: Any = None, trainer: dict[str, Any] | None = None,
    fitter: dict[str, Any] | None = None, seed: int = 0, **options: Any,
) -> Experiment:  # fmt: skip
    """An experiment in the tiny world."""
    stream = stream or TinyStream()
    info = stream.info
    results = Results(
        run_id="tiny",
        seed=seed,
        stream={"name": info.name, "experience_names": [e.name for e in stream], "n_experiences": len(stream)},
        backbone={"name": "tiny"},
        strategy=list(strategies),
        primary_metric={"name": "accuracy", "higher_is_better": True},
        code={},
    )
    settings = {"max_epochs": 2, "accelerator": "cpu", "devices": 1, **(trainer or {})}
    run_dir.mkdir(parents=True, exist_ok=True)
    return Experiment(
        learner=make_learner(stream, strategies, **options),
        stream=stream,
        fitter=Fitter(trainer=settings, batch_size=8, eval_batch_size=32, **(fitter or {})),
        results=results,
        run_dir=run_dir,
        config={"seed": seed},
        seed=seed,
    )


def weights(learner: Learner) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in learner.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
