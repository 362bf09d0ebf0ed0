"""What evaluation costs strategies whose backbone is frozen, with and without the features that are kept between evaluations.

    uv run python benchmarks/evaluation.py       # prints a table, and writes benchmarks/evaluation.md

Ten experiences of one digit, learned by a small Vision Transformer that a run on the digits has trained before. The time is that
of all evaluations of a run; each ratio is of two runs in a row, one after the other, and the median of the rounds is shown.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
from hydra import compose, initialize_config_dir

from clplatform.config import conf_dir, resolved
from clplatform.learner import Learner
from clplatform.run import execute

STRATEGIES = ("ranpac", "coda_prompt", "l2p", "lora_experts", "finetuning")
COMMON = ["stream=split_digits", "backbone=vit_tiny", "tracking=local", "threads=1", "trainer.accelerator=cpu"]


def without() -> AbstractContextManager[object]:
    """Inside, every evaluation computes all features."""
    return patch.object(Learner, "frozen_features", lambda self, batch: self.backbone(batch))


def seconds(strategy: str, pretrained: Path, way: AbstractContextManager[object]) -> float:
    """Of all evaluations of a run."""
    own = ["strategy.coda_prompt.layers=[1,2]"] if strategy == "coda_prompt" else []
    own += ["strategy.lora_experts.first=adapter"] if strategy == "lora_experts" else []
    overrides = [f"strategy={strategy}", f"backbone.pretrained={pretrained}", "stream.n_experiences=10"]
    config = resolved(compose("run", [*COMMON, *overrides, *own, "trainer.max_epochs=1"]))
    with tempfile.TemporaryDirectory() as folder, way:
        return sum(times["evaluate"] for times in execute(config, Path(folder), quiet=True).timing)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"))
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    lines = ["| strategy | kept / not kept |", "|---|--:|"]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"), tempfile.TemporaryDirectory() as folder:
        execute(resolved(compose("run", [*COMMON, "strategy=joint"])), Path(folder), quiet=True)
        for strategy in STRATEGIES:
            rounds = [
                seconds(strategy, Path(folder), nullcontext()) / seconds(strategy, Path(folder), without())
                for _ in range(options.rounds)
            ]
            lines.append(f"| {strategy} | {statistics.median(rounds):.2f} |")
    text = "\n".join(lines)
    print(text)
    head = (
        f"Time of all evaluations of a run over ten experiences (`benchmarks/evaluation.py`, {options.rounds} rounds, median; "
        f"torch {torch.__version__},\none CPU thread). Fine-tuning keeps nothing; its row shows what noise does.\n\n"
    )
    options.output.write_text(head + text + "\n")


if __name__ == "__main__":
    main()
