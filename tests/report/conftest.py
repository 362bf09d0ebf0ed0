"""A small generator of realistic run directories: forgetting, losses and times as a strategy would leave them."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

MakeRun = Callable[..., Path]


def build(
    folder: Path,
    *,
    strategy: str = "replay",
    seed: int = 0,
    n: int = 5,
    learned: int | None = None,
    scenario: str = "class_incremental",
    keep: float = 0.9,
    status: str = "completed",
    classes: int = 2,
    metric: str = "accuracy",
    settings: dict[str, Any] | None = None,
    change: Callable[[dict[str, Any]], None] | None = None,
) -> Path:
    """Write a run directory: `keep` is the share of accuracy that survives each later experience."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, n, *strategy.encode()])
    learned = n if learned is None else learned
    matrix: list[list[float | None]] = [[None] * n]
    for i in range(learned):
        fresh = 0.97 - 0.02 * rng.random(n)
        row = np.clip(fresh * keep ** np.maximum(i - np.arange(n), 0) + 0.02 * rng.standard_normal(n), 0, 1)
        matrix.append([round(float(v), 4) if j <= i else None for j, v in enumerate(row)])
    if metric == "perplexity":
        matrix = [[None if v is None else 5 / max(v, 0.05) for v in row] for row in matrix]
    k = n * classes
    results = {
        "schema_version": 1,
        "run_id": f"{seed:012x}",
        "seed": seed,
        "stream": {
            "name": "split_digits", "scenario": scenario, "problem": "classification", "n_experiences": n,
            "classes_per_experience": [classes] * n, "class_names": [f"digit {i}" for i in range(k)],
            "experience_names": [f"digits {classes * i}–{classes * i + classes - 1}" for i in range(n)], "seed": None,
            "samples": {"train": [259] * n, "validation": [28] * n, "test": [72] * n},
        },
        "backbone": {
            "name": "vit_tiny", "pretrained": None, "source": "random", "parameters": 104_512,
            "trainable_parameters": 104_512,
        },
        "strategy": [strategy],
        "primary_metric": {"name": metric, "higher_is_better": metric != "perplexity"},
        "code": {"version": "0.1.0", "git_commit": "0123abcd", "dirty": False},
        "status": status,
        "error": {"type": "RuntimeError", "message": "loss is <nan>"} if status == "failed" else None,
        "matrix": matrix,
        "validation_matrix": matrix,
        "timing": [
            {"train": 2.0 + 0.3 * i, "consolidate": 0.2, "evaluate": 0.1 * (i + 1)} for i in range(learned)
        ],
        "cost": {
            "seconds": 12.5 + seed, "steps": 90 * learned, "samples": 5760 * learned, "peak_memory_bytes": 734_003_200,
            "stored_samples": 200, "buffer_bytes": 51_200,
        },
        "confusion": confusion(rng, k, classes) if status == "completed" else None,
        "notes": ["PyTorch threads: 1"],
        "metrics": {"intransigence": None},
    }  # fmt: skip
    if change is not None:
        change(results)
    (folder / "results.json").write_text(json.dumps(results))
    with (folder / "accuracy_matrix.csv").open("w") as file:
        csv.writer(file).writerows([["after", *range(n)], *([i, *row] for i, row in enumerate(matrix))])
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log(rng, learned)))
    (folder / "environment.json").write_text(json.dumps(environment(strategy, seed)))
    (folder / "config.yaml").write_text(yaml.safe_dump(config(strategy, seed, settings or {})))
    return folder


def confusion(rng: np.random.Generator, k: int, classes: int) -> list[list[int]]:
    counts = np.zeros((k, k), dtype=int)
    for true in range(k):
        wrong = int(rng.integers(0, 12)) if true < k - classes else 1
        counts[true, true] = 36 - wrong
        counts[true, k - 1 - int(rng.integers(0, classes))] += wrong
    return counts.tolist()


def log(rng: np.random.Generator, learned: int) -> list[dict[str, Any]]:
    rows = []
    for step in range(90 * learned):
        task, extra = float(np.exp(-(step % 90) / 30) + 0.05 * rng.random()), float(0.3 * rng.random())
        rows.append({
            "time": 1.7e9 + step / 10, "step": step, "experience": step // 90 + 1, "epoch": step % 90 // 9,
            "stage": "main", "train/loss": task + extra, "train/task": task, "train/distillation": extra,
            "train/lr": 1e-3,
        })  # fmt: skip
    return rows


def environment(strategy: str, seed: int) -> dict[str, Any]:
    return {
        "time": "2026-01-02T03:04:05+00:00", "python": "3.12.3", "platform": "Linux", "gpus": [], "cuda": None,
        "cpu": {"model": "a processor", "count": 2}, "packages": {"torch": "2.15.0", "numpy": "2.4.0"},
        "command": ["clplatform", f"strategy={strategy}", f"seed={seed}", "name=two words"],
    }  # fmt: skip


def config(strategy: str, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {
        "seed": seed, "name": "default", "batch_size": 32, "optimizer": {"lr": 0.001},
        "stream": {"name": "split_digits", "seed": None, "data_dir": None},
        "strategy": {strategy: {"_target_": f"clplatform.strategy.{strategy}.It", "strength": 1.0}},
    }  # fmt: skip
    for path, value in settings.items():
        *parents, last = path.split(".")
        node = values
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = value
    return values


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """`make_run(name, **options)` → the run directory `tmp_path/name`."""
    return lambda name="run", **options: build(tmp_path / name, **options)
