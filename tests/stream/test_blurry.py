"""Streams without boundaries: who gets which sample, and what stays as it was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command import refused
from composed import configuration, trained
from torch import Tensor

from clplatform.build import build_stream
from clplatform.config import identity
from clplatform.protocol.references import derive
from clplatform.stream.blurry import blurry, deal
from clplatform.types import ClplatformError, Data

Capture = pytest.CaptureFixture[str]
N = 5  # experiences of two digits


def stream(*overrides: str) -> Any:
    return build_stream(configuration(*overrides))


def rows(data: Data) -> dict[str, Tensor]:
    return data.fetch(torch.arange(len(data)))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3])
def test_every_other_experience_gets_as_many_of_each_class(share: float) -> None:
    clear, blurred = stream(), stream(f"stream.blurry={share}")
    for own, experience in enumerate(clear):
        for c in experience.classes:
            n = int((experience.train.labels == c).sum())
            found = [int((e.train.labels == c).sum()) for e in blurred]
            gone = round(share * n)
            assert found.pop(own) == n - gone
            assert sum(found) == gone
            assert max(found) - min(found) <= 1


def test_every_sample_is_in_one_experience_with_its_label() -> None:
    clear, blurred = stream(), stream("stream.blurry=0.3")

    def by_index(s: Any) -> dict[int, tuple[int, int]]:
        batches = [rows(e.train) for e in s]
        index, labels, sums = (
            torch.cat([b[name] if name != "pixel_values" else b[name].flatten(1).sum(1) for b in batches])
            for name in ("index", "labels", "pixel_values")
        )
        assert len(index.unique()) == len(index)
        return dict(zip(index.tolist(), zip(labels.tolist(), sums.tolist(), strict=True), strict=True))

    assert by_index(clear) == by_index(blurred)
    for a, b in zip(clear, blurred, strict=True):
        for split in ("validation", "test"):
            assert torch.equal(getattr(a, split).labels, getattr(b, split).labels)


def test_classes_are_those_that_are_shown() -> None:
    blurred = stream("stream.blurry=0.1")
    assert blurred.info.boundaries is False
    for e in blurred:
        assert e.is_boundary is False
        assert e.classes == tuple(e.train.labels.unique().tolist()) == tuple(range(10))
        assert e.n_seen_classes == 10
    hidden = stream("stream.blurry=0")  # at once, and nobody is told
    assert [e.classes for e in hidden] == [e.classes for e in stream()]
    assert [e.n_seen_classes for e in hidden] == [2, 4, 6, 8, 10]
    assert hidden.info.boundaries is False


def test_the_seed_of_the_stream_decides_who_gets_what() -> None:
    first, again, other = (stream("stream.blurry=0.1", f"stream.seed={s}") for s in (1, 1, 2))
    index = [rows(s[0].train)["index"] for s in (first, again, other)]
    assert torch.equal(index[0], index[1])
    assert not torch.equal(index[0], index[2])


def test_a_sample_keeps_the_transform_of_its_domain() -> None:
    settings = ("stream=permuted_digits", "stream.n_experiences=3")
    clear, blurred = stream(*settings), stream(*settings, "stream.blurry=0.5")
    shown = [rows(e.train) for e in clear]  # a sample has the same number in every domain, and other pixels
    place = {int(i): n for n, i in enumerate(shown[0]["index"])}
    assert all(torch.equal(batch["index"], shown[0]["index"]) for batch in shown)
    for own, e in enumerate(blurred):
        mixed = rows(e.train)
        at = [place[int(i)] for i in mixed["index"]]
        found = [sum(map(torch.equal, batch["pixel_values"][at], mixed["pixel_values"])) for batch in shown]
        n = sum(int(c) - round(0.5 * int(c)) for c in shown[own]["labels"].bincount())
        assert found[own] == n
        assert sum(found) == len(e.train)


def test_what_is_left_over_is_not_always_the_first_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    had_two = torch.zeros(4)
    for _ in range(200):  # four samples for the three others: one gets two
        counts = torch.tensor([len(r) for r in deal(torch.zeros(12), 1 / 3, 0, 4, generator)])
        assert counts.tolist() in ([8, 2, 1, 1], [8, 1, 2, 1], [8, 1, 1, 2])
        had_two += counts == 2
    assert had_two[1:].min() > 40


def test_texts_and_language_models_mix_too() -> None:
    settings = ("stream=stdlib_text", "backbone=transformer_decoder")
    clear, blurred = stream(*settings), stream(*settings, "stream.blurry=0.2")
    assert sum(len(e.train) for e in clear) == sum(len(e.train) for e in blurred)
    for a, b in zip(clear, blurred, strict=True):
        assert (b.classes, b.n_seen_classes) == (a.classes, a.n_seen_classes)
        kept = torch.isin(rows(b.train)["index"], rows(a.train)["index"]).float().sum()
        assert kept == len(a.train) - round(0.2 * len(a.train))


def test_a_run_fills_every_row_of_the_matrix(tmp_path: Path) -> None:
    run = trained(tmp_path, "stream.blurry=0.1", "strategy=[replay,l2_init]", "backbone=mlp")
    assert len(run.results.matrix) == N + 1
    assert all(v is not None for row in run.results.matrix for v in row)  # all classes are there from the start
    assert any("no boundaries: 10% of each class's" in note for note in run.stream.notes)


def test_what_is_evaluated_is_what_a_stray_sample_cannot_hide(tmp_path: Path) -> None:
    """With a few strays an experience shows classes that are not its own, and is evaluated on its own alone."""
    run = trained(tmp_path, "stream.blurry=0.02", "strategy=finetuning", "backbone=mlp")
    shown = [set(e.classes) for e in run.stream]
    own = [set(e.test.labels.tolist()) for e in run.stream]
    assert any(a > b for a, b in zip(shown, own, strict=True))
    for i, row in enumerate(run.results.matrix[1:]):
        seen = set().union(*shown[: i + 1])
        assert [v is not None for v in row] == [tested <= seen for tested in own]


def test_null_is_a_run_of_before() -> None:
    config = configuration()
    before = {**config, "stream": {k: v for k, v in config["stream"].items() if k != "blurry"}}
    assert identity(before) == identity(config)
    assert identity(configuration("stream.blurry=0")) != identity(config)


def test_the_independent_reference_has_boundaries() -> None:
    config = configuration("stream.blurry=0.1")
    independent, joint = derive(config, "independent"), derive(config, "joint")
    assert independent is not None
    assert joint is not None
    assert build_stream(independent).info.boundaries is True
    assert build_stream(joint).info.boundaries is False


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["strategy=ewc", "stream.blurry=0.1"],
            "strategy=ewc needs task boundaries, but stream=split_digits (class_incremental) has none; leave "
            "stream.blurry=null",
        ),
        (
            ["stream.scenario=task_incremental", "stream.blurry=0"],
            "stream.blurry=0: stream=split_digits is task_incremental, and task ids are boundaries; choose "
            "class_incremental",
        ),
        (
            ["stream.n_experiences=1", "stream.blurry=0.1"],
            "stream.blurry=0.1: stream=split_digits has one experience, so there are no boundaries to take away; leave it "
            "null",
        ),
        (["stream.blurry=1"], "stream.blurry=1: input should be less than 1"),
        (["stream.blurry=much"], "stream.blurry=much: input should be a valid number"),
    ],
)
def test_what_has_no_boundaries_to_lose_is_refused(settings: list[str], message: str, capsys: Capture) -> None:
    assert refused(capsys, "backbone=mlp", *settings) == message


def test_own_annotations_are_not_mixed() -> None:
    made = stream()
    made.info = replace(made.info, problem="token_classification")
    with pytest.raises(ClplatformError, match="own classes only"):
        blurry(made, 0.1, 0)
