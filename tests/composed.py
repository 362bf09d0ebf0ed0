"""Experiments built from the pages of `conf/`, as a run builds them, and small enough for tests."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir

from clplatform import build
from clplatform.config import conf_dir, resolved
from clplatform.experiment import Experiment
from clplatform.results import Results

# A few steps of a model of a few thousand weights.
SMALL = [
    "trainer.max_epochs=1", "+trainer.limit_train_batches=3", "trainer.accelerator=cpu", "batch_size=16",
    "tracking=local",
]  # fmt: skip
VIT = [
    "backbone.config.hidden_size=16", "backbone.config.num_hidden_layers=2", "backbone.config.num_attention_heads=2",
    "backbone.config.intermediate_size=16",
]  # fmt: skip
BERT = ["backbone=bert_tiny", *VIT]


def configuration(*overrides: str) -> dict[str, Any]:
    """What `clplatform <overrides>` would run."""
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        return resolved(compose("run", [*SMALL, *overrides]))


def experiment(folder: Path, *overrides: str) -> Experiment:
    """The experiment of this configuration, not yet run."""
    config = configuration(*overrides)
    chain = build.build_strategies(config)
    stream = build.build_stream(config, build.build_tokenizer(config))
    build.check_needs(chain, stream.info, config)
    results = Results(
        run_id="composed", seed=0, stream={"experience_names": [e.name for e in stream]}, backbone={},
        strategy=list(config["strategy"]), primary_metric={"name": "accuracy", "higher_is_better": True}, code={},
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    return Experiment(
        learner=build.build_learner(config, stream.info, chain), stream=stream, fitter=build.build_fitter(config),
        results=results, run_dir=folder, config=config, seed=config["seed"],
    )  # fmt: skip


def trained(folder: Path, *overrides: str) -> Experiment:
    """The experiment after its run; its model is in `<folder>/model`."""
    made = experiment(folder, *overrides)
    made.run()
    made.learner.eval()
    return made


# -- texts --------------------------------------------------------------------------------------------------------------

TOPICS = {
    "travel": ["book a flight to paris", "is my flight late, do you know?", "I need a hotel room", "visa for japan"],
    "banking": ["what is my balance", "transfer money to Zoë", "my card was stolen!", "open a savings account"],
    "weather": ["will it rain today", "how cold is it in oslo", "is there \"snow\" on the road", "sunny weekend?"],
    "music": ["play some jazz", "next song please", "turn the volume up", "who sings this"],
}  # fmt: skip


def text_stream(folder: Path, *, pairs: bool = False, n_experiences: int = 2) -> list[str]:
    """Overrides for a stream of labelled texts (or pairs of them) in CSV files of this folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        with (folder / f"{split}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "second", "label"])
            for topic, texts in TOPICS.items():
                for i in range(12):
                    writer.writerow([f"{texts[i % 4]} {i}", texts[(i + 1) % 4], topic])
    columns = "[text,second]" if pairs else "text"
    return [
        "stream=text_files", f"stream.train={folder / 'train.csv'}", f"stream.test={folder / 'test.csv'}",
        f"stream.text_column={columns}", f"stream.n_experiences={n_experiences}", "stream.tokenizer_vocab_size=200",
    ]  # fmt: skip


def pair_stream(folder: Path) -> list[str]:
    """Overrides for a stream of pairs of texts in JSONL files of this folder, two tasks."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        rows = [{"input": f"{task} {word} {i}", "target": f"{word} {task}", "task": task}
                for task in ("say", "sing") for i in range(10) for word in ("sun", "moon")]  # fmt: skip
        (folder / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return [
        "stream=text_to_text", f"stream.train={folder / 'train.jsonl'}", f"stream.test={folder / 'test.jsonl'}",
        "stream.max_length=16", "stream.max_target_length=8", "stream.tokenizer_vocab_size=300", "threads=1",
    ]  # fmt: skip
