"""`clplatform update`: the new experience is learned as if it had been in the stream, to the same bits; what is refused leaves
nothing behind."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from command import call, everything, refused
from composed import BERT
from PIL import Image
from small_streams import STREAMS

import clplatform
from clplatform.checkpoint import load as load_checkpoint
from clplatform.cli import main
from clplatform.experiment import Experiment
from clplatform.files import read_json
from clplatform.report.grouping import settings as groups_of
from clplatform.report.run import load_run
from clplatform.strategy.seq_star import SEQStar
from clplatform.stream.image_files import digits
from clplatform.types import ClplatformError

MONTHS = {
    "may": {"travel": "book a flight", "banking": "what is my balance"},
    "june": {"weather": "will it rain", "music": "play some jazz"},
    "july": {"sports": "who won the match", "travel": "a hotel please"},
}
TRAINED = ["trainer.max_epochs=1", "trainer.accelerator=cpu", "tracking=local", "threads=1"]
SIZES = [
    "backbone.size=16", "backbone.n_layers=1", "backbone.n_heads=2", "backbone.inner_size=16", "strategy=replay",
    "strategy.replay.policy=reservoir", "strategy.replay.capacity=20",
]  # fmt: skip
REPLAY = "strategy.replay.capacity=12"


def write(path: Path, months: tuple[str, ...], n: int, start: int = 0) -> Path:
    """`n` texts of each intent of these months, which are in a column."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "month"])
        for month in months:
            for i in range(start, start + n):
                writer.writerows([f"{text} {i}", intent, month] for intent, text in MONTHS[month].items())
    return path


def settings(folder: Path, months: str, *more: str) -> list[str]:
    return [
        "stream=text_files", f"stream.train={folder}/{months}_train.csv", f"stream.test={folder}/{months}_test.csv",
        "stream.experience_column=month", "stream.tokenizer_vocab_size=200", "stream.epochs=2", *BERT, "batch_size=8",
        "trainer.accelerator=cpu", "tracking=local", "threads=1", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of two months, of three and of the third alone; a run over each of the first two."""
    root = tmp_path_factory.mktemp("months")
    for name, months in (("two", ("may", "june")), ("three", ("may", "june", "july")), ("july", ("july",))):
        for split, n, start in (("train", 12, 0), ("test", 5, 100)):
            write(root / f"{name}_{split}.csv", months, n, start)
    for name in ("two", "three"):
        assert main([*settings(root, name, REPLAY), f"hydra.run.dir={root}/{name}"]) == 0
    return root


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(run / "checkpoints" / "experience.ckpt")["weights"]


def same(a: Path, b: Path) -> bool:
    ours, theirs = weights(a), weights(b)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def update(capsys: pytest.CaptureFixture[str], *arguments: Any) -> Path:
    """Where the updated model is."""
    done = call(capsys, "update", *map(str, arguments))
    assert done.code == 0, done.err
    return Path(done.out.splitlines()[-1].removeprefix("The updated model: "))


def test_learns_what_it_would_have_learned_in_the_stream(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in (folder / "two").rglob("*") if path.is_file()}
    new = update(capsys, folder / "two", folder / "july_train.csv", "--test", folder / "july_test.csv", "-o", "new")
    assert {path: path.read_bytes() for path in (folder / "two").rglob("*") if path.is_file()} == before
    assert same(new, folder / "three")
    ours, theirs = (read_json(run / "results.json") for run in (new, folder / "three"))
    assert ours["matrix"][3] == theirs["matrix"][3]
    assert ours["confusion"] == theirs["confusion"]
    old = read_json(folder / "two" / "results.json")
    assert [row[:2] for row in ours["matrix"][:3]] == old["matrix"]
    assert [row[2] for row in ours["matrix"][:3]] == [None] * 3  # sports was not known
    assert ours["stream"]["experience_names"] == ["may", "june", "july_train"]
    assert ours["stream"]["class_names"] == theirs["stream"]["class_names"] == [
        "travel", "banking", "weather", "music", "sports",
    ]  # fmt: skip
    assert ours["stream"]["samples"] == theirs["stream"]["samples"]
    assert ours["run_id"] != old["run_id"] and any(old["run_id"] in note for note in ours["notes"])
    assert "3 experiences, seed 0, updated with july_train\n" in (new / "report.md").read_text()
    experiences = [json.loads(line)["experience"] for line in (new / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(experiences)) == [0, 1, 2, 3] and experiences == sorted(experiences)
    labels = {p.label for p in clplatform.load(new).predict(["who won the match 3", "will it rain 4"])}
    assert labels <= set(ours["stream"]["class_names"])


class Killed(BaseException):
    pass


def test_a_killed_update_goes_on_and_an_update_can_be_updated(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(self: Experiment, *_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Experiment, "_record", kill)
        with pytest.raises(Killed):
            main(
                [
                    "update",
                    str(folder / "two"),
                    str(folder / "july_train.csv"),
                    "--test",
                    f"{folder}/july_test.csv",
                    "-o",
                    "new",
                ]
            )
    assert main(["resume", "new"]) == 0
    assert same(Path("new"), folder / "three")
    # Known classes only: the model can be asked before it learns.
    write(Path("again.csv"), ("may", "june"), 10, 200)
    newer = update(capsys, "new", "again.csv", "stream.test_fraction=0.5", "trainer.max_epochs=1", "optimizer.lr=1e-4")
    results = read_json(newer / "results.json")
    assert newer.parent == Path("outputs/default")
    assert results["stream"]["experience_names"] == ["may", "june", "july_train", "again"]
    assert results["stream"]["classes_per_experience"] == [2, 2, 2, 4]
    assert results["stream"]["samples"]["test"][3] == 20
    assert isinstance(results["matrix"][3][3], float)  # before the update
    assert [row[3] for row in results["matrix"][:3]] == [None] * 3
    assert any("trainer.max_epochs=1 optimizer.lr=1e-4" in note for note in results["notes"])
    assert [len(row) for row in results["scores"]["macro_f1"]] == [4] * 5
    assert isinstance(results["scores"]["macro_f1"][3][3], float)
    logged = [json.loads(line) for line in (newer / "metrics.jsonl").read_text().splitlines()]
    assert {row["train/lr"] for row in logged if row["experience"] == 4 and "train/lr" in row} <= {1e-4}


def test_without_the_data_of_earlier_experiences(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    here = tmp_path / "data"
    here.mkdir()
    for split, n in (("train", 12), ("test", 5)):
        write(here / f"two_{split}.csv", ("may", "june"), n, 0 if split == "train" else 100)
    assert main([*settings(here, "two", REPLAY), "hydra.run.dir=old"]) == 0
    for path in here.iterdir():
        path.unlink()
    given = ["update", "old", str(folder / "july_train.csv"), "--test", str(folder / "july_test.csv")]
    told = refused(capsys, *given, "-o", "new")
    assert "two_train.csv" in told and told.endswith("`clplatform update --without-earlier-data`)")
    new = update(capsys, *given[1:], "-o", "new", "--without-earlier-data")
    assert same(new, folder / "three")
    results = read_json(new / "results.json")
    complete = read_json(folder / "three" / "results.json")
    assert results["matrix"][3] == [None, None, complete["matrix"][3][2]]
    assert results["stream"]["samples"] == complete["stream"]["samples"]
    report = (new / "report.md").read_text()
    assert "updated with july_train, the only data evaluated since" in report and "clplatform diagnose" not in report
    assert "an experience has no test" in refused(capsys, "diagnose", str(new))
    assert any("earlier experiences are not there" in note for note in results["notes"])
    newer = update(capsys, new, folder / "july_test.csv")  # the same past
    assert read_json(newer / "results.json")["matrix"][4][:2] == [None, None]
    newest = update(capsys, newer, folder / "july_test.csv", "--without-earlier-data")
    assert read_json(newest / "results.json")["matrix"][5][:4] == [None] * 4
    # What keeps nothing but all data cannot go on without.
    assert main([*settings(folder, "two", "strategy=cumulative"), "hydra.run.dir=bound"]) == 0
    assert refused(capsys, "update", "bound", str(folder / "july_train.csv"), "--without-earlier-data") == (
        "strategy=cumulative needs the data of all earlier experiences, but the run was updated without them"
    )


@pytest.mark.parametrize("with_test", [True, False])
def test_images_in_folders(with_test: bool, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["stream.class_order=[3,4,5,6]", "stream.n_experiences=2", "backbone=mlp", "backbone.hidden=[16]"]
    assert main([*given, "trainer.max_epochs=1", "trainer.accelerator=cpu", "tracking=local", "hydra.run.dir=old"]) == 0
    (x, y), (test_x, test_y), _ = digits()
    parts = {"train": (x, y), "test": (test_x, test_y)} if with_test else {".": (x, y)}
    for split, (images, labels) in parts.items():
        for image, label in list(zip(images, labels.tolist(), strict=True))[:300]:
            if label in (4, 8):
                place = Path("new") / split / str(label)
                place.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image[0].numpy()).save(place / f"{len(list(place.iterdir()))}.png")
    results = read_json(update(capsys, "old", "new", "trainer.max_epochs=8") / "results.json")
    assert results["stream"]["class_names"] == ["3", "4", "5", "6", "8"]
    n_train = sum(int(label) in (4, 8) for label in y[:300])
    n_test = sum(int(label) in (4, 8) for label in test_y[:300]) if with_test else round(0.2 * n_train)
    assert results["stream"]["samples"]["test"][2] == pytest.approx(n_test, abs=1)
    assert results["matrix"][3][2] > 0.5


@pytest.mark.parametrize("kind", ["tags", "questions", "pairs", "domains"])
def test_every_problem_of_texts(kind: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The second experience's data again, as new data: asked before they are learned, then learned."""
    backbone, new = {
        "tags": ("transformer_text", "train.conll"),
        "questions": ("transformer_text", "place.json"),
        "pairs": ("transformer_seq2seq", "test.jsonl"),
        "domains": ("transformer_decoder", "land.txt"),
    }[kind]
    given = [*STREAMS[kind](tmp_path / "data"), f"backbone={backbone}", *SIZES, *TRAINED]
    assert main([*given, "hydra.run.dir=old"]) == 0
    new_data = [tmp_path / "data" / new, "stream.test_fraction=0.3"]
    first = update(capsys, "old", *new_data)
    results = read_json(first / "results.json")
    assert results["stream"]["n_experiences"] == 3
    without = update(capsys, "old", *new_data, "--without-earlier-data")
    assert same(first, without)
    assert read_json(without / "results.json")["matrix"][3] == [None, None, results["matrix"][3][2]]
    assert isinstance(results["matrix"][2][2], float) and isinstance(results["matrix"][3][2], float)
    if kind in ("questions", "pairs"):  # what is read and written belongs to the new samples
        written = [s for s in results["samples"][3] if s["experience"] == 2]
        assert written and all(any(word in s["source"] for word in ("place", "say", "sing")) for s in written)


def test_what_cannot_be_updated_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, new = str(folder / "two"), str(folder / "july_train.csv")
    assert (
        refused(capsys, "update", "nowhere", new)
        == "nowhere is not a run directory (no results.json and config.yaml in it)"
    )
    assert refused(capsys, "update", run, "july.csv") == "there is no file or folder july.csv"
    assert "stay what they are" in refused(capsys, "update", run, new, "strategy.replay.capacity=3")
    assert "stay what they are" in refused(capsys, "update", run, new, "backbone=minilm")
    assert "no other page can be chosen" in refused(capsys, "update", run, new, "optimizer=sgd")
    assert "neither data nor a setting" in refused(capsys, "update", run, new, new)
    assert "no other page can be chosen" in refused(capsys, "update", run, new, "optimizer._target_=torch.optim.SGD")
    assert "has no settings of its own" in refused(capsys, "update", run, new, "early_stopping.patience=1")
    assert refused(capsys, "update", run, new, "optimizer.lr=[1").startswith("update optimizer.lr=[1: ")
    for setting, reason in (
        ("stream.train=x", "the data come after the run"),
        ("stream.test=x", "give --test"),
        ("stream.epochs=3", "give trainer.max_epochs"),
        ("stream.scenario=domain_incremental", "it is that of the model"),
    ):
        assert refused(capsys, "update", run, new, setting) == f"update {setting}: {reason}" + (
            ", which stays what it is"
            if "scenario" in setting
            else ": clplatform update RUN DATA"
            if "train" in setting
            else ""
        )
    Path("file").touch()
    assert "file/x cannot be written" in refused(capsys, "update", run, new, "-o", "file/x")
    Path("empty").mkdir()
    assert "batch_size=0" in refused(capsys, "update", run, new, "-o", "empty", "batch_size=0")
    assert Path("empty").is_dir()
    assert "did you mean max_epochs" in refused(capsys, "update", run, new, "trainer.max_epoch=3")
    assert "there is no column 'intent'" in refused(capsys, "update", run, new, "stream.label_column=intent")
    assert "label_colum" in refused(capsys, "update", run, new, "stream.label_colum=intent")
    Path("taken").mkdir()
    Path("taken/x").touch()
    assert "there is something at taken already" in refused(capsys, "update", run, new, "-o", "taken")
    write(Path("one.csv"), ("july",), 1)
    assert "leaves no sample to test on" in refused(capsys, "update", run, "one.csv")
    assert main([*settings(folder, "two", "strategy.replay.capacity=4"), "hydra.run.dir=small"]) == 0
    assert "capacity=4 is smaller than the 5 classes" in refused(capsys, "update", "small", new)
    results = read_json(Path("small/results.json"))
    Path("small/results.json").write_text(json.dumps({**results, "status": "running"}))
    assert "the run is not complete; finish it with `clplatform resume small`" in refused(
        capsys, "update", "small", new
    )
    Path("small/results.json").write_text(json.dumps(results))
    Path("small/checkpoints/experience.ckpt").unlink()
    assert "its last checkpoint is not there" in refused(capsys, "update", "small", new)


def test_a_model_made_for_a_number_of_classes_says_so(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SEQ* has classifiers of all classes from the start: what it has for those of the stream does not fit a longer one."""
    monkeypatch.setattr(SEQStar, "needs", SEQStar.needs - {"pretrained"})
    given = settings(folder, "two", "strategy=seq_star", "strategy.seq_star.warm_up=1")
    assert main([*given, "hydra.run.dir=old"]) == 0
    before = everything()
    done = call(capsys, "update", "old", str(folder / "july_train.csv"))
    assert done.code == 2
    assert "strategy=seq_star: the model's structure is not that of its checkpoint" in done.err
    assert everything() == before
    assert main([*given, "strategy.seq_star.preallocate=false", "hydra.run.dir=without"]) == 0
    update(capsys, "without", folder / "july_train.csv")


def test_what_an_update_has_learned_is_not_lost(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One that fails keeps its folder; one that is interrupted before it begins leaves none."""
    assert main([*settings(folder, "two", "strategy.replay.capacity=5", "keep_models=true"), "hydra.run.dir=old"]) == 0
    write(Path("both.csv"), ("july", "may"), 12, 0)
    given = ["update", "old", "both.csv", "stream.experience_column=month", "-o", "new"]
    record, calls = Experiment._record, []

    def refuse(self: Experiment, *arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 2:
            raise ClplatformError("too much")
        record(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Experiment, "_record", refuse)
        assert call(capsys, *given).code == 2
    assert read_json(Path("new/results.json"))["status"] == "failed"
    assert load_checkpoint(Path("new/checkpoints/experience.ckpt"))["position"] == [3, 0]
    assert main(["resume", "new"]) == 0
    assert read_json(Path("new/results.json"))["stream"]["experience_names"][2:] == ["both: july", "both: may"]
    assert sorted(p.name for p in Path("new/models").iterdir()) == [f"after_{i}" for i in (1, 2, 3, 4)]
    before = everything()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clplatform.build.extend", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert call(capsys, *given[:-1], "other").code == 130
    assert everything() == before


def test_the_new_data_are_augmented_as_the_run_s_were(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    augment = "stream.augment={deletion: 0.3, swap: 0.3}"
    assert main([*settings(folder, "two", augment), "hydra.run.dir=old"]) == 0
    new = [folder / "july_train.csv", "--test", folder / "july_test.csv"]
    runs = [update(capsys, "old", *new), update(capsys, "old", *new, "--without-earlier-data")]
    assert same(*runs)
    assert not same(runs[0], update(capsys, "old", *new, "stream.augment=null"))


def test_seeds_of_updated_runs_are_averaged(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = [str(folder / "july_train.csv"), "--test", str(folder / "july_test.csv")]
    for seed in (0, 1):
        assert main([*settings(folder, "two", f"seed={seed}"), f"hydra.run.dir=run{seed}"]) == 0
        update(capsys, f"run{seed}", *new, "-o", f"updated/{seed}", *(["--without-earlier-data"] if seed else []))
    update(capsys, "run1", *new, "-o", "updated/2", "--without-earlier-data")
    runs = [load_run(Path("updated") / name) for name in ("0", "1", "2")]
    (setting,) = groups_of(runs)
    assert [len(group.runs) for group in setting.groups] == [1, 2]
    assert {"remembered=True"} <= {word for g in setting.groups for word in re.findall(r"[^( ]+=True", g.label)}
    assert "_target_" not in "".join(g.label for g in setting.groups)


def test_from_python(folder: Path) -> None:
    with pytest.raises(ClplatformError, match="is not a run directory"):
        clplatform.update("nowhere", "data")
    new = clplatform.update(folder / "two", folder / "july_train.csv", test=folder / "july_test.csv", output="new")
    assert new == Path("new")
    assert same(new, folder / "three")
