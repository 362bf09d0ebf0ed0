"""Batches, loaders and experiences in Avalanche's shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from text_world import INPUT, LENGTH, TinyTextStream
from world import TinyStream, same

from clplatform.types import InputSpec

pytestmark = pytest.mark.filterwarnings("ignore")  # Avalanche's own

IMAGE = InputSpec("image", shape=(1, 2, 2), mean=(0.0,), std=(1.0,))


def test_images_are_scaled_as_in_the_benchmark() -> None:
    from clplatform.avalanche_host.data import pack

    pixels = torch.tensor([[[[0, 51], [102, 255]]]], dtype=torch.uint8)
    assert torch.equal(pack({"pixel_values": pixels}, IMAGE), pixels.float() / 255)
    already = torch.rand(1, 1, 2, 2)
    assert pack({"pixel_values": already}, IMAGE) is already


def test_texts_there_and_back() -> None:
    from clplatform.avalanche_host.data import pack, unpack

    batch = TinyTextStream()[0].train.fetch(torch.tensor([4, 0, 7]))
    x = pack(batch, INPUT)
    assert x.shape == (3, 2, LENGTH)
    back = unpack(x, INPUT)
    assert same(back, {name: batch[name] for name in ("input_ids", "attention_mask")})
    assert back["input_ids"].dtype == torch.int64


def test_the_largest_vocabularies_are_exact() -> None:
    from clplatform.avalanche_host.data import pack, unpack

    ids = torch.tensor([[1, 250_001, 2**24]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(unpack(pack(batch, INPUT), INPUT)["input_ids"], ids)


def test_rows_that_a_plugin_adds_are_told_from_the_stream_s() -> None:
    from clplatform.avalanche_host.data import to_batch, to_minibatch

    before = TinyStream()[0].train.fetch(torch.arange(3))
    x, y, t = to_minibatch(before, IMAGE)
    more = to_batch([torch.cat([x, x]), torch.cat([y, y]), torch.cat([t.float(), t.float()])], IMAGE, 5, before)
    assert more["index"].tolist() == [*before["index"].tolist(), -1, -1, -1]
    assert more["source"].tolist() == [0, 0, 0, 5, 5, 5]
    assert more["task_labels"].dtype == torch.int64


class Drawing:
    """A loader that draws from the global generator with every batch, as Avalanche's do."""

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Any:
        for _ in range(4):
            yield [torch.rand(2, 1, 2, 2), torch.tensor([0, 1]), torch.tensor([0, 0])]


def test_a_plugin_s_loader_draws_apart_and_goes_on_anywhere() -> None:
    from clplatform.avalanche_host.data import Batches

    torch.manual_seed(1)
    before = torch.get_rng_state()
    whole, epochs = Batches(Drawing(), IMAGE, 1, seed=3), []
    for _ in range(2):
        epochs.append([b["pixel_values"] for b in whole])
        assert torch.equal(torch.get_rng_state(), before)
        torch.rand(1)  # what a model draws between epochs changes nothing
        before = torch.get_rng_state()
    assert not torch.equal(epochs[0][0], epochs[1][0])

    broken = Batches(Drawing(), IMAGE, 1, seed=3)
    list(broken)
    iterator = iter(broken)
    taken = [next(iterator)["pixel_values"] for _ in range(2)]
    again = Batches(Drawing(), IMAGE, 1, seed=3)
    again.load_state_dict(broken.state_dict())
    rest = [b["pixel_values"] for b in again]
    assert all(torch.equal(a, b) for a, b in zip([*taken, *rest], epochs[1], strict=True))
    assert again.state_dict() == {"epoch": 2, "offset": 0}


@pytest.mark.parametrize("scenario", ["class_incremental", "task_incremental", "domain_incremental"])
def test_an_experience_is_that_of_the_benchmark(scenario: str) -> None:
    from clplatform.avalanche_host.data import HostedExperience
    from clplatform.stream.avalanche import to_benchmark

    stream = TinyStream(scenario=scenario)
    infos = [e.info for e in stream]
    for i, theirs in enumerate(to_benchmark(stream).train_stream):
        ours = HostedExperience(stream.info, infos[: i + 1], stream[i].train, "train")
        for name in ("current_experience", "classes_in_this_experience", "previous_classes", "classes_seen_so_far",
                     "future_classes", "task_label", "task_labels"):  # fmt: skip
            assert getattr(ours, name) == getattr(theirs, name), name
        assert ours.origin_stream.name == theirs.origin_stream.name
        assert ours.logging().current_experience == i
        assert list(ours.dataset.targets) == list(theirs.dataset.targets)
        assert list(ours.dataset.targets_task_labels) == list(theirs.dataset.targets_task_labels)
        assert torch.equal(ours.dataset[3][0], theirs.dataset[3][0])
        assert ours.dataset[3][1:] == theirs.dataset[3][1:]
