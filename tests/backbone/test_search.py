"""How tokens are chosen: the same settings for our Transformer and Hugging Face's, from code and from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command import call
from composed import configuration, pair_stream, text_stream, trained
from encoders import texts
from writers import SPEC, pairs, writer

from clplatform.backbone.search import Search
from clplatform.backbone.transformer.beam import beam_search
from clplatform.backbone.transformer.generate import sample
from clplatform.build import make
from clplatform.saved import load
from clplatform.types import ClplatformError

Capture = pytest.CaptureFixture[str]
KINDS = ["transformer_decoder", "transformer_seq2seq", "gpt2", "bart"]
SIZES = {"size": 16, "n_layers": 2, "n_heads": 2, "inner_size": 24, "dropout": 0.0}


def model(kind: str) -> tuple[Any, Any]:
    """A small language model whose most likely token is not always the same, and a batch for it."""
    read = pairs() if kind in ("bart", "transformer_seq2seq") else texts((6, 6))
    if kind in ("gpt2", "bart"):
        made = writer(kind)
    else:
        page = {k: v for k, v in configuration(f"backbone={kind}")["backbone"].items() if k != "lr"}
        torch.manual_seed(0)
        made = make({**page, **SIZES}, input=SPEC).eval()
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(3)
    return made, {name: read[name] for name in ("input_ids", "attention_mask")}


def drawn(seed: int = 0, **options: Any) -> Search:
    return Search(temperature=options.pop("temperature", 1.0), generator=torch.Generator().manual_seed(seed), **options)


@pytest.mark.parametrize("kind", KINDS)
def test_one_token_to_choose_from_is_the_most_likely_one(kind: str) -> None:
    backbone, batch = model(kind)
    greedy = backbone.generate(batch)
    assert torch.equal(backbone.generate(batch, Search()), greedy)
    assert torch.equal(backbone.generate(batch, drawn(top_k=1)), greedy)
    assert torch.equal(backbone.generate(batch, drawn(top_p=1e-6)), greedy)
    assert torch.equal(backbone.generate(batch, drawn(temperature=1e-4)), greedy)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_drawn_comes_from_the_generator_and_from_nowhere_else(kind: str) -> None:
    backbone, batch = model(kind)
    state = torch.random.get_rng_state()
    first, again, other = (backbone.generate(batch, drawn(seed, temperature=2.0)) for seed in (1, 1, 2))
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(first, again)
    assert first.shape != other.shape or not torch.equal(first, other)
    one = drawn(1, temperature=2.0)
    two = [backbone.generate(batch, one) for _ in range(2)]  # batch after batch
    assert two[0].shape != two[1].shape or not torch.equal(*two)


@pytest.mark.parametrize("kind", KINDS)
def test_a_beam_search_is_that_of_a_page(kind: str) -> None:
    backbone, batch = model(kind)
    found = backbone.generate(batch, Search(beams=4, length_penalty=0.5))
    if kind == "transformer_decoder":  # whose page has none
        decoding = backbone.decoding(batch["input_ids"], batch["attention_mask"])
        beams = beam_search(decoding, n_beams=4, max_new_tokens=found.shape[1], end=2, pad=0, alpha=0.5)
        expected = beams.ids_BKT[:, 0, batch["input_ids"].shape[1] :]
    else:
        backbone.beams, backbone.length_penalty = 4, 0.5
        expected = backbone.generate(batch)
    assert torch.equal(found, expected)


def test_temperature_top_k_and_top_p_are_handed_on() -> None:
    backbone, batch = model("transformer_decoder")
    found = backbone.generate(batch, drawn(3, temperature=0.7, top_k=5, top_p=0.9))
    expected = sample(
        backbone.decoding(batch["input_ids"], batch["attention_mask"]), max_new_tokens=found.shape[1], end=2, pad=0,
        temperature=0.7, top_k=5, top_p=0.9, generator=torch.Generator().manual_seed(3),
    )  # fmt: skip
    assert torch.equal(expected[:, batch["input_ids"].shape[1] :], found)
    assert drawn(temperature=0.7, top_k=5, top_p=0.9).hugging_face() == {
        "do_sample": True, "num_beams": 1, "temperature": 0.7, "top_k": 5, "top_p": 0.9,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beams": 0}, "beams=0: give 1 or more"),
        ({"beams": 2, "temperature": 1.0}, "beams=2 and temperature=1: a beam search draws nothing"),
        ({"temperature": 0.0}, "temperature=0: give a number above 0, or none for the most likely"),
        ({"temperature": float("nan")}, "temperature=nan: give a number above 0, or none for the most likely"),
        ({"length_penalty": float("nan"), "beams": 2}, "length_penalty=nan: give a number, such as 1"),
        ({"temperature": 1.0, "top_k": 0}, "top_k=0: give 1 or more"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p=1.5: give a number above 0, up to 1"),
        ({"top_k": 3}, "top_k and top_p are of tokens that are drawn: give a temperature too, such as 1"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ClplatformError) as caught:
        Search(**options)
    assert str(caught.value) == message


def test_the_command_line_writes_as_it_is_told(tmp_path: Path, capsys: Capture) -> None:
    settings = [*pair_stream(tmp_path / "data"), "backbone=transformer_seq2seq"]
    trained(tmp_path / "run", *settings, *(f"backbone.{k}={v}" for k, v in SIZES.items()))
    (tmp_path / "in.txt").write_text("say sun 1\nsing moon 2\n")
    predict = ["predict", str(tmp_path / "run"), str(tmp_path / "in.txt")]

    def written(*options: str) -> list[str]:
        done = call(capsys, *predict, *options)
        assert done.code == 0, done.err
        return [json.loads(line)["text"] for line in done.out.splitlines()]

    model = load(tmp_path / "run")
    lines = ["say sun 1", "sing moon 2"]
    assert written() == [w.text for w in model.predict(lines)]
    hot = written("--temperature", "5", "--seed", "3")
    assert hot == written("--temperature", "5", "--seed", "3")
    assert hot == [w.text for w in model.predict(lines, search=drawn(3, temperature=5.0))]
    assert hot != written("--temperature", "5", "--seed", "4")
    assert written("--temperature", "5", "--top-k", "1") == written()
    assert written("--beams", "3", "--length-penalty", "0.5") == [
        w.text for w in model.predict(lines, search=Search(beams=3, length_penalty=0.5))
    ]
    for options, reason in (
        (["--seed", "1"], "predict --seed: it has no effect without --temperature"),
        (["--length-penalty", "1"], "predict --length-penalty: it has no effect without --beams of 2 or more"),
        (
            ["--length-penalty", "1", "--beams", "1"],
            "predict --length-penalty: it has no effect without --beams of 2 or more",
        ),
        (["--beams", "0"], "beams=0: give 1 or more"),
    ):
        done = call(capsys, *predict, *options)
        assert done.code == 2
        assert done.err == f"clplatform: {reason}\n"


def test_a_classifier_writes_nothing(tmp_path: Path, capsys: Capture) -> None:
    trained(tmp_path / "run", *text_stream(tmp_path / "data"), "backbone=transformer_text",
            *(f"backbone.{k}={v}" for k, v in SIZES.items()))  # fmt: skip
    done = call(capsys, "predict", str(tmp_path / "run"), str(tmp_path / "data" / "test.csv"), "--temperature", "1")
    assert (done.code, done.err) == (2, "clplatform: predict --temperature: this model does not write texts\n")
