"""What a training step costs: a hand-written loop, plain Lightning, Avalanche's own strategies and clplatform.

    uv run python benchmarks/speed.py            # prints a table, and writes benchmarks/speed.md

All train the same model on the same number of batches of the same size with the same optimizer and one thread. The
time is that of training the second experience, when a memory, a penalty and a teacher are there; what EWC spends
between experiences is shown apart. Ratios are to the hand-written fine-tuning loop of the same round; the median of
the rounds is shown. Absolute times depend on the machine and are not compared.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from torch import Tensor, nn
from torch.nn import functional as F

from clplatform.backbone.huggingface import HuggingFaceImage
from clplatform.backbone.mlp import MLP
from clplatform.config import conf_dir, resolved
from clplatform.data import TensorData
from clplatform.stream.base import InMemoryStream, make_experiences
from clplatform.types import InputSpec, StreamInfo

METHODS = ("finetuning", "ewc", "replay", "lwf")
N, SIZE, BATCH, EPOCHS, CAPACITY, LR = 1600, 28, 32, 2, 200, 1e-3
SPEC = InputSpec("image", shape=(1, SIZE, SIZE), mean=(0.5,), std=(0.3,))


# -- data and model, the same for all ----------------------------------------------------------------------------


def samples(experience: int) -> tuple[Tensor, Tensor]:
    """Noise with labels: two classes in each of two experiences."""
    g = torch.Generator().manual_seed(experience)
    x = torch.randint(0, 256, (N, 1, SIZE, SIZE), generator=g, dtype=torch.uint8)
    return x, torch.randint(0, 2, (N,), generator=g) + 2 * experience


def synthetic_stream() -> InMemoryStream:
    """The same samples as a stream (named in the configuration by its path)."""
    parts: list[dict[str, Any]] = []
    for i in range(2):
        x, y = samples(i)
        columns = {"pixel_values": x, "labels": y, "task_labels": torch.zeros_like(y), "index": torch.arange(N)}
        data = TensorData(columns)
        parts.append({"train": data, "validation": None, "test": data.select(torch.arange(32))})
    info = StreamInfo(
        name="synthetic", scenario="class_incremental", problem="classification", n_experiences=2,
        classes_per_experience=(2, 2), class_names=("0", "1", "2", "3"), seed=0, input=SPEC, task_ids=False,
    )  # fmt: skip
    return InMemoryStream(info, make_experiences(parts, [(0, 1), (2, 3)], "class_incremental"))


class Model(nn.Module):
    """A backbone and a head over all four classes: pixels [B, 1, H, W] → logits [B, 4]."""

    def __init__(self, backbone: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        page = compose("run", [f"backbone={backbone}", "stream=split_digits"])["backbone"]
        arguments = {k: v for k, v in resolved(page).items() if k != "_target_"}
        kind = MLP if backbone == "mlp" else HuggingFaceImage
        self.backbone = kind(input=SPEC, **arguments)
        self.head = nn.Linear(self.backbone.feature_size, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone({"pixel_values": x}))


# -- the methods' losses, as one writes them by hand ---------------------------------------------------------------


def make_loss(method: str, model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss in the second experience."""
    if method == "ewc":
        old = {n: p.detach().clone() for n, p in model.named_parameters()}
        fisher = {n: torch.rand_like(p) for n, p in old.items()}

        def ewc(x: Tensor, y: Tensor) -> Tensor:
            penalty = sum((fisher[n] * (p - old[n]) ** 2).sum() for n, p in model.named_parameters())
            return F.cross_entropy(model(x), y) + 0.5 * 10 * penalty

        return ewc
    if method == "replay":
        memory_x, memory_y = samples(0)[0][:CAPACITY], samples(0)[1][:CAPACITY]

        def replay(x: Tensor, y: Tensor) -> Tensor:
            rows = torch.randperm(CAPACITY)[:BATCH]
            return F.cross_entropy(model(torch.cat([x, memory_x[rows]])), torch.cat([y, memory_y[rows]]))

        return replay
    if method == "lwf":
        teacher = copy.deepcopy(model).eval()

        def lwf(x: Tensor, y: Tensor) -> Tensor:
            logits = model(x)
            with torch.no_grad():
                target = teacher(x)[:, :2]
            kl = F.kl_div((logits[:, :2] / 2).log_softmax(1), (target / 2).softmax(1), reduction="batchmean")
            return F.cross_entropy(logits, y) + 4 * kl

        return lwf
    return lambda x, y: F.cross_entropy(model(x), y)


# -- four ways to train ----------------------------------------------------------------------------------------------


def hand_written(method: str, backbone: str) -> dict[str, float]:
    model = Model(backbone)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    loss_function = make_loss(method, model)
    x, y = samples(1)
    start = time.perf_counter()
    for _ in range(EPOCHS):
        for rows in torch.randperm(N).split(BATCH):
            optimizer.zero_grad()
            loss_function(x[rows], y[rows]).backward()
            optimizer.step()
    return {"train": time.perf_counter() - start}


def plain_lightning(method: str, backbone: str) -> dict[str, float]:
    import pytorch_lightning as pl
    from torch.utils.data import DataLoader, TensorDataset

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Model(backbone)
            self.loss_function = make_loss(method, self.model)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return self.loss_function(*batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=LR)

    trainer = pl.Trainer(
        max_epochs=EPOCHS, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    module, loader = Module(), DataLoader(TensorDataset(*samples(1)), BATCH, shuffle=True)
    start = time.perf_counter()
    trainer.fit(module, loader)
    return {"train": time.perf_counter() - start}


def avalanche(method: str, backbone: str) -> dict[str, float]:
    from avalanche.training.plugins import EvaluationPlugin
    from avalanche.training.supervised import EWC, LwF, Naive, Replay

    model = Model(backbone)
    arguments: dict[str, Any] = {
        "model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=LR), "criterion": nn.CrossEntropyLoss(),
        "train_mb_size": BATCH, "train_epochs": EPOCHS, "evaluator": EvaluationPlugin(),
    }  # fmt: skip
    strategy = {
        "finetuning": lambda: Naive(**arguments),
        "ewc": lambda: EWC(ewc_lambda=10, **arguments),
        "replay": lambda: Replay(mem_size=CAPACITY, **arguments),
        "lwf": lambda: LwF(alpha=1, temperature=2, **arguments),
    }[method]()
    first, second = synthetic_stream().benchmark.train_stream
    strategy.train(first)
    # The plugins' work after an experience is not a step's: it is taken off.
    between = Between()
    strategy.plugins[:] = [Timed(p, between) for p in strategy.plugins]
    rows: list[int] = []
    model.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])) if module.training else None)
    start = time.perf_counter()
    strategy.train(second)
    seconds = time.perf_counter() - start - between.seconds
    return {"train": seconds, "consolidate": between.seconds, "rows": sum(rows) / len(rows)}


class Between:
    seconds = 0.0


class Timed:
    """A plugin whose `after_training_exp` is timed."""

    def __init__(self, plugin: Any, clock: Between) -> None:
        self._plugin, self._clock = plugin, clock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._plugin, name)

    def after_training_exp(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        if hasattr(self._plugin, "after_training_exp"):
            self._plugin.after_training_exp(*args, **kwargs)
        self._clock.seconds += time.perf_counter() - start


def ours(method: str, backbone: str) -> dict[str, float]:
    """A run as the command line makes it, with its terminal and its local record."""
    from clplatform.run import execute

    overrides = [
        f"strategy={method}", f"backbone={backbone}", "tracking=local", "threads=1", f"batch_size={BATCH}",
        f"optimizer.lr={LR}", f"trainer.max_epochs={EPOCHS}", "trainer.accelerator=cpu",
    ]  # fmt: skip
    config = resolved(compose("run", overrides))
    config["stream"] = {"_target_": "speed.synthetic_stream", "epochs": EPOCHS}
    with tempfile.TemporaryDirectory() as folder:
        return execute(config, Path(folder)).timing[1]


WAYS = {"hand-written": hand_written, "Lightning": plain_lightning, "Avalanche": avalanche, "clplatform": ours}


def rounds(backbone: str, n: int) -> Iterator[dict[tuple[str, str], dict[str, float]]]:
    for _ in range(n):
        yield {(way, method): train(method, backbone) for method in METHODS for way, train in WAYS.items()}


def table(backbone: str, measured: list[dict[tuple[str, str], dict[str, float]]]) -> str:
    """Markdown: the ratio of each way and method to hand-written fine-tuning."""

    def ratio(way: str, method: str, phase: str) -> float:
        base = ("hand-written", "finetuning")
        return statistics.median(m[way, method].get(phase, 0.0) / m[base]["train"] for m in measured)

    lines = [f"| {backbone} | " + " | ".join(METHODS) + " | EWC between experiences |", "|---" * 6 + "|"]
    for way in WAYS:
        between = ratio(way, "ewc", "consolidate")
        cells = [f"{ratio(way, m, 'train'):.2f}" for m in METHODS] + [f"{between:.2f}" if between else "–"]
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    rows = measured[0]["Avalanche", "replay"]["rows"]
    lines.append(
        f"\nReplay trains on {2 * BATCH} rows a step; Avalanche's on {rows:.1f}, since its memory ends in a smaller batch."
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--backbones", nargs="+", default=["mlp", "vit_tiny"])
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"))
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    text = []
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        for backbone in options.backbones:
            measured = list(rounds(backbone, options.rounds))
            text.append(table(backbone, measured))
            seconds = [{"/".join(k): v for k, v in m.items()} for m in measured]
            print(json.dumps(seconds[-1], indent=1), text[-1], sep="\n")
    head = (
        f"Training time relative to a hand-written fine-tuning loop (`benchmarks/speed.py`, {options.rounds} rounds,\n"
    )
    head += f"median; torch {torch.__version__}, one CPU thread, batch {BATCH}, {SIZE}×{SIZE} images).\n"
    options.output.write_text(head + "\n" + "\n\n".join(text) + "\n")


if __name__ == "__main__":
    main()
