"""Our streams as Avalanche benchmarks and Avalanche's benchmarks as our streams, checked against Avalanche itself."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset
from world import TinyStream

from clplatform.config import check_node
from clplatform.data import TensorData
from clplatform.metric.matrix import summarize
from clplatform.stream.images import split_images
from clplatform.stream.lazy import LazyImages
from clplatform.types import ClplatformError

pytestmark = pytest.mark.filterwarnings("ignore")  # Avalanche's own


def digits(scenario: str = "class_incremental", n_experiences: int = 5, validation_fraction: float = 0.1):
    return split_images(
        name="split_digits", dataset="digits", scenario=scenario, n_experiences=n_experiences, class_order=None, seed=1,  # type: ignore[arg-type]
        data_dir=None, validation_fraction=validation_fraction, augment="none",
    )  # fmt: skip


@pytest.mark.parametrize("scenario", ["class_incremental", "task_incremental", "domain_incremental"])
def test_a_benchmark_shows_the_same_samples_classes_and_tasks(scenario: str) -> None:
    stream = digits(scenario)
    benchmark = stream.benchmark
    assert set(benchmark.streams) == {"train", "validation", "test"}
    for ours, theirs in zip(stream, benchmark.train_stream, strict=True):
        assert theirs.classes_in_this_experience == set(ours.classes)
        assert theirs.task_labels == [ours.task_label]
        batch = ours.train.fetch(torch.arange(3))
        for i in range(3):
            x, y, t = theirs.dataset[i]
            assert torch.equal(x, batch["pixel_values"][i].float() / 255)
            assert (y, t) == (batch["labels"][i], ours.task_label)
    assert len(benchmark.test_stream) == 5


def test_without_a_validation_split_there_is_no_such_stream() -> None:
    assert set(digits(validation_fraction=0).benchmark.streams) == {"train", "test"}


@pytest.mark.parametrize("scenario", ["class_incremental", "task_incremental", "domain_incremental"])
def test_there_and_back(scenario: str) -> None:
    from clplatform.stream.avalanche import from_benchmark

    stream = digits(scenario)
    back = from_benchmark(benchmark=stream.benchmark)
    assert back.info.scenario == scenario
    assert back.info.task_ids == stream.info.task_ids
    for a, b in zip(stream, back, strict=True):
        assert (a.classes, a.n_seen_classes, a.task_label) == (b.classes, b.n_seen_classes, b.task_label)
        for split in ("train", "validation", "test"):
            one, other = getattr(a, split), getattr(b, split)
            x, y = one.fetch(torch.arange(len(one))), other.fetch(torch.arange(len(other)))
            assert torch.equal(x["labels"], y["labels"])
            assert torch.equal(x["task_labels"], y["task_labels"])
            assert torch.equal(x["pixel_values"].float() / 255, y["pixel_values"])


def test_text_becomes_padded_dictionaries() -> None:
    from clplatform.stream.avalanche import to_benchmark

    class Text(TinyStream):
        def __init__(self) -> None:
            super().__init__(n=1)
            columns = {
                "input_ids": torch.tensor([[5, 6, 0, 0], [7, 8, 9, 1]]),
                "attention_mask": torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]),
                "labels": torch.tensor([0, 1]), "task_labels": torch.zeros(2, dtype=torch.int64), "index": torch.arange(2),
            }  # fmt: skip
            data = TensorData(columns)
            object.__setattr__(self.info.input, "modality", "text")
            for name in ("train", "validation", "test"):
                object.__setattr__(self[0], name, data)

    from avalanche.benchmarks.utils.data_loader import TaskBalancedDataLoader

    dataset = to_benchmark(Text()).train_stream[0].dataset
    assert dataset[0][0]["input_ids"].tolist() == [5, 6]
    x, y, t = next(iter(TaskBalancedDataLoader(dataset, batch_size=2, shuffle=False)))
    assert x["input_ids"].tolist() == [[5, 6, 0, 0], [7, 8, 9, 1]]
    assert (y.tolist(), t.tolist()) == ([0, 1], [0, 0])


def test_avalanche_trains_on_it_and_measures_what_we_measure() -> None:
    """Accuracy and forgetting of the same predictions, by Avalanche's plugin and by ours.

    Avalanche's stream forgetting compares with the accuracy right after an experience was learned, so it is our
    backward transfer with the sign changed; it is Chaudhry's forgetting where that accuracy was the best.
    """
    from avalanche.evaluation.metrics import accuracy_metrics, forgetting_metrics
    from avalanche.training.plugins import EvaluationPlugin
    from avalanche.training.supervised import Naive

    stream = TinyStream(n=3, noise=1.0)
    benchmark = stream_benchmark(stream)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 6))
    evaluator = EvaluationPlugin(accuracy_metrics(experience=True, stream=True), forgetting_metrics(stream=True))
    naive = Naive(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), criterion=nn.CrossEntropyLoss(),
        train_mb_size=8, train_epochs=3, evaluator=evaluator,
    )  # fmt: skip
    matrix: list[list[float | None]] = [[None] * 3]
    theirs: dict[str, float] = {}
    for i, experience in enumerate(benchmark.train_stream):
        naive.train(experience)
        # A test experience whose classes were not seen has no meaning in a class-incremental stream.
        theirs = naive.eval(benchmark.test_stream[: i + 1])
        row: list[float | None] = [None] * 3
        for j in range(i + 1):
            batch = stream[j].test.fetch(torch.arange(len(stream[j].test)))
            row[j] = (model.eval()(batch["pixel_values"]).argmax(1) == batch["labels"]).float().mean().item()
            name = next(k for k in theirs if k.startswith("Top1_Acc_Exp") and k.endswith(f"Exp{j:03d}"))
            assert theirs[name] == pytest.approx(row[j])
        matrix.append(row)
    ours = summarize(matrix, higher_is_better=True)
    stream_accuracy = next(v for k, v in theirs.items() if k.startswith("Top1_Acc_Stream"))
    forgetting = next(v for k, v in theirs.items() if k.startswith("StreamForgetting"))
    assert ours["average_accuracy"] == pytest.approx(stream_accuracy)
    assert ours["backward_transfer"] == pytest.approx(-forgetting)
    assert ours["average_forgetting"] == pytest.approx(forgetting)
    assert forgetting > 0.1


def stream_benchmark(stream: TinyStream):
    from clplatform.stream.avalanche import to_benchmark

    return to_benchmark(stream)


def tensors(labels: list[int], size: int = 6) -> TensorDataset:
    y = torch.tensor(labels)
    dataset = TensorDataset(torch.rand(len(y), 3, size, size), y)
    dataset.targets = y  # type: ignore[attr-defined]
    return dataset


def test_a_class_incremental_benchmark_is_numbered_in_the_order_of_appearance() -> None:
    from avalanche.benchmarks.scenarios.deprecated.generators import nc_benchmark

    from clplatform.stream.avalanche import from_benchmark

    labels = [0, 1, 2, 3, 4, 5] * 4
    benchmark = nc_benchmark(
        tensors(labels), tensors(labels), n_experiences=3, task_labels=False, fixed_class_order=[4, 2, 0, 5, 1, 3]
    )
    stream = from_benchmark(benchmark=benchmark, validation_fraction=0.25)
    assert [e.classes for e in stream] == [(0, 1), (2, 3), (4, 5)]
    assert stream.info.class_names == ("2", "4", "0", "5", "1", "3")  # sorted within an experience
    assert [len(e.train) for e in stream] == [6] * 3
    assert [len(e.validation) for e in stream if e.validation is not None] == [2] * 3


def test_labels_from_zero_in_each_task_become_classes_of_their_own() -> None:
    from avalanche.benchmarks.scenarios.deprecated.generators import nc_benchmark

    from clplatform.stream.avalanche import from_benchmark

    labels = [0, 1, 2, 3] * 4
    benchmark = nc_benchmark(
        tensors(labels), tensors(labels), n_experiences=2, task_labels=True, class_ids_from_zero_in_each_exp=True
    )
    stream = from_benchmark(benchmark=benchmark)
    assert stream.info.scenario == "task_incremental"
    assert [e.classes for e in stream] == [(0, 1), (2, 3)]
    assert [e.task_label for e in stream] == [0, 1]
    assert stream[1].test.labels.unique().tolist() == [2, 3]
    assert stream.info.class_names == ("task 0: 0", "task 0: 1", "task 1: 0", "task 1: 1")


def write_core50(root: Path) -> None:
    """CORe50's published layout with 20 images: two classes in each of the first nine runs' batches."""
    images, lists = root / "core50_32x32" / "s1", root / "batches_filelists" / "NC_inc" / "run0"
    images.mkdir(parents=True)
    lists.mkdir(parents=True)
    (root / "NIC_v2_79_cat").mkdir()
    rng, test = np.random.default_rng(0), []
    for batch in range(9):
        lines = []
        for label in (2 * batch, 2 * batch + 1):
            for copy, target in (("a", lines), ("b", lines), ("c", test)):
                path = images / f"{label}{copy}.png"
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
                target.append(f"s1/{path.name} {label}\n")
        (lists / f"train_batch_{batch:02d}_filelist.txt").write_text("".join(lines))
    (lists / "test_filelist.txt").write_text("".join(test))
    empty = {"ni": [[[]] * 9]}
    for name, value in (("paths", []), ("labels", empty), ("LUP", empty), ("labels2names", {})):
        (root / f"{name}.pkl").write_bytes(pickle.dumps(value))


def test_core50_from_its_published_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from omegaconf import OmegaConf

    from clplatform.build import build_stream
    from clplatform.config import conf_dir

    write_core50(tmp_path)
    node = OmegaConf.to_container(OmegaConf.load(conf_dir() / "stream" / "core50.yaml"))
    assert isinstance(node, dict)
    node |= {"data_dir": str(tmp_path), "validation_fraction": 0.0}
    check_node("stream", node, extra={"epochs"})
    stream = build_stream({"stream": node})
    assert stream.info.classes_per_experience == (2,) * 9
    assert stream.info.input.shape == (3, 32, 32)
    assert [e.test.labels.tolist() for e in stream] == [[2 * i, 2 * i + 1] for i in range(9)]  # the one test set, dealt
    pixels = stream[4].train.fetch(torch.tensor([1]))["pixel_values"][0]
    expected = np.array(Image.open(tmp_path / "core50_32x32" / "s1" / "8b.png"))
    assert pixels.dtype == torch.uint8
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), expected)


def test_lazy_reading_gives_the_same_batches(tmp_path: Path) -> None:
    from clplatform.stream.avalanche import from_benchmark

    benchmark = digits().benchmark
    memory, lazy = (from_benchmark(benchmark=benchmark, in_memory=flag, seed=3) for flag in (True, False))
    assert isinstance(lazy[1].train, LazyImages)
    rows = torch.tensor([5, 0, 3])
    a, b = memory[1].train.fetch(rows), lazy[1].train.fetch(rows)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_refusals_say_what_and_where() -> None:
    from avalanche.benchmarks import benchmark_from_datasets
    from avalanche.benchmarks.scenarios.deprecated.generators import nc_benchmark

    from clplatform.stream.avalanche import from_benchmark

    def broken(**arguments: object) -> None:
        raise ValueError("n_experiences is zero")

    with pytest.raises(ClplatformError, match=r"stream\.benchmark: .*n_experiences is zero"):
        from_benchmark(benchmark=broken)
    with pytest.raises(ClplatformError, match="train and test streams"):
        from_benchmark(benchmark=object())
    train = nc_benchmark(
        tensors([0, 1, 2, 3] * 2), tensors([0, 1, 2, 3]), n_experiences=2, task_labels=False, shuffle=False
    )
    other = nc_benchmark(
        tensors([0, 1, 5, 6] * 2), tensors([0, 1, 5, 6]), n_experiences=2, task_labels=False, shuffle=False
    )

    def mixed(test):
        return benchmark_from_datasets(train=[e.dataset for e in train.train_stream], test=[e.dataset for e in test])

    with pytest.raises(ClplatformError, match=r"never trained: \[5"):
        from_benchmark(benchmark=mixed(other.test_stream), scenario="class_incremental")
    with pytest.raises(ClplatformError, match="2 training experiences but 3 test"):
        from_benchmark(benchmark=mixed([*train.test_stream, train.test_stream[0]]))
