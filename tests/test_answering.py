"""Saved models of tags, spans and texts answer as the trained ones did, in words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from composed import configuration
from span_world import NAMES, contexts, run, sentence, squad

import clplatform
from clplatform.cli import main
from clplatform.evaluate import answers, decode
from clplatform.run import assemble, execute
from clplatform.types import ClplatformError

SIZES = ["backbone.size=16", "backbone.n_layers=1", "backbone.n_heads=2", "backbone.inner_size=32"]
LEARN = [
    "trainer.max_epochs=15",
    "trainer.limit_train_batches=1.0",
    "batch_size=8",
    "strategy=finetuning",
    "optimizer.lr=0.01",
]
GPT2 = ["backbone=gpt2_tiny", "backbone.config.n_embd=16", "backbone.config.n_layer=1", "backbone.config.n_head=2"]
BART = ["backbone=bart_tiny", "backbone.config.d_model=16", "backbone.config.encoder_layers=1",
        "backbone.config.decoder_layers=1", "backbone.config.encoder_ffn_dim=32", "backbone.config.decoder_ffn_dim=32"]  # fmt: skip
BERT = ["backbone=bert_tiny", "backbone.config.hidden_size=16", "backbone.config.num_hidden_layers=1",
        "backbone.config.intermediate_size=32"]  # fmt: skip
LINES = "the cat sat on the mat . the dog lay on the rug .\n" * 60


def text_run(folder: Path, problem: str, *overrides: str) -> Path:
    """A run over two tiny domains, or tasks; its folder."""
    data = folder / "data"
    data.mkdir()
    if problem == "seq2seq":
        for split in ("train", "test"):
            rows = [
                {"input": f"{task} {w}", "target": w.upper() if task == "shout" else w, "task": task}
                for w in ("red", "blue", "green", "sand") for task in ("shout", "copy")
            ]  # fmt: skip
            (data / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        stream = ["stream=text_to_text", f"stream.train={data / 'train.jsonl'}", f"stream.test={data / 'test.jsonl'}",
                  "stream.validation_fraction=0", "stream.max_length=16", "stream.max_target_length=12"]  # fmt: skip
    else:
        for name in ("a", "b"):
            (data / f"{name}.txt").write_text(LINES)
        stream = ["stream=text_domains", f"stream.data_dir={data}", "stream.max_length=16", f"stream.problem={problem}"]
    settings = configuration(*stream, "stream.tokenizer_vocab_size=300", *LEARN, *overrides)
    execute(settings, folder / "run", quiet=True)
    return folder / "run"


Get = Callable[[str], Path]
RUNS: dict[str, Callable[[Path], Path]] = {
    "tags": lambda f: (run("token_classification", f, *LEARN), f / "run")[1],
    "answers": lambda f: (run("question_answering", f, *LEARN), f / "run")[1],
    "causal": lambda f: text_run(f, "causal_lm", "backbone=transformer_decoder", *SIZES),
    "gpt2": lambda f: text_run(f, "causal_lm", *GPT2),
    "seq2seq": lambda f: text_run(f, "seq2seq", "backbone=transformer_seq2seq", *SIZES),
    "bart": lambda f: text_run(f, "seq2seq", *BART),
    "bert": lambda f: text_run(f, "masked_lm", *BERT),
    "masked": lambda f: text_run(f, "masked_lm", "backbone=transformer_text", *SIZES),
}


@pytest.fixture(scope="module")
def get(tmp_path_factory: pytest.TempPathFactory) -> Get:
    """The folder of one of `RUNS`, made once."""
    made: dict[str, Path] = {}
    return lambda name: (
        made.setdefault(name, RUNS[name](tmp_path_factory.mktemp("run"))) if name not in made else made[name]
    )


def trained(folder: Path) -> Any:
    """The experiment of a run again, with its stream, and the saved model."""
    from omegaconf import OmegaConf

    config: Any = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    made, _, _ = assemble(config, folder, resume=False, notices=(), quiet=True)
    return made.stream, clplatform.load(folder)


# -- tags and answers -----------------------------------------------------------------------------------------------------


def test_tags_are_those_of_the_model_and_spans_their_words(get: Get) -> None:
    stream, tagger = trained(get("tags"))
    batch = stream[1].test.fetch(torch.arange(len(stream[1].test)))
    expected = tagger.learner(batch).logits.argmax(-1)
    sentences = [sentence(list(NAMES), i)[0] for i in range(100, 112)]
    found = tagger.predict([" ".join(words) for words in sentences], batch_size=5)
    n_spans = 0
    for words, tags, row, labels in zip(sentences, found, expected, batch["labels"], strict=True):
        assert tags.words == words
        assert tags.labels == [stream.info.class_names[k] for k in row[labels >= 0].tolist()]
        for span in tags.spans:
            assert span.text == " ".join(words[span.start : span.end])
            assert {label[2:] for label in tags.labels[span.start : span.end]} == {span.type}
        inside = {i for span in tags.spans for i in range(span.start, span.end)}
        assert inside == {i for i, label in enumerate(tags.labels) if label != "O"}
        n_spans += len(tags.spans)
    assert n_spans > 3
    assert tagger.predict(sentences) == found and tagger.predict([]) == []
    assert tagger.predict(" ".join(sentences[0]))[0] == found[0]
    long = tagger.predict(" ".join(["word"] * 300))[0]
    assert len(long.labels) == 300 and long.labels[-1] is None and long.labels[0] is not None


def test_answers_are_those_of_the_evaluation_and_where_they_stand(get: Get) -> None:
    stream, answerer = trained(get("answers"))
    data = stream[1].test
    expected = [row[2] for row in answers(answerer.learner, stream, data, 7)]
    pairs = [tuple(stream.texts[i][0].split("\n", 1)) for i in data.fetch(torch.arange(len(data)))["index"].tolist()]
    found = answerer.predict(pairs, batch_size=4)
    assert [answer.answer for answer in found] == expected and len(set(expected)) > 3
    for (_, context), answer in zip(pairs, found, strict=True):
        assert context[answer.start : answer.end] == answer.answer
        assert 0 < answer.probability <= 1
    assert answerer.predict([]) == []
    with pytest.raises(ClplatformError, match="sample 0: 'alone' is not a pair of question and context"):
        answerer.predict(["alone"])


def test_a_question_without_an_answer_gets_none(tmp_path: Path) -> None:
    from span_world import SMALL

    (tmp_path / "data").mkdir()
    document = squad("color", contexts("color", 60), impossible=True)
    (tmp_path / "data" / "color.json").write_text(json.dumps(document))
    settings = configuration("stream=question_answering", f"stream.data_dir={tmp_path / 'data'}", "stream.max_length=32",
                             *SMALL, *LEARN, "trainer.max_epochs=25")  # fmt: skip
    results = execute(settings, tmp_path / "run", quiet=True)
    assert results.matrix[-1][0] > 0.7
    found = clplatform.load(tmp_path / "run").predict([("what is nothing ?", contexts("color", 1)[0])])[0]
    assert (found.answer, found.start, found.end) == ("", None, None)


# -- texts ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["seq2seq", "bart"])
def test_what_is_written_is_what_the_model_writes(name: str, get: Get) -> None:
    stream, writer = trained(get(name))
    data = stream[0].test
    batch = data.fetch(torch.arange(len(data)))
    expected = decode(stream.tokenizer, writer.learner.generate(batch))
    sources = [stream.texts[i][0] for i in batch["index"].tolist()]
    assert [w.text for w in writer.predict(sources)] == expected
    assert [w.text for w in writer.predict(sources, batch_size=1)] == expected
    assert writer.predict([]) == []


@pytest.mark.parametrize("name", ["causal", "gpt2"])
def test_a_text_goes_on_as_it_was_learned(name: str, get: Get) -> None:
    continuer = clplatform.load(get(name))
    prompts = ["the cat sat", "the dog lay on the rug . ", "the"]
    found = [w.text for w in continuer.predict(prompts)]
    assert found[0].startswith(" on the")
    assert found == [continuer.predict(prompt)[0].text for prompt in prompts]  # whatever the padding
    tokens = continuer.tokenizer("the cat sat" + found[0], add_special_tokens=False)["input_ids"]
    assert len(tokens) <= 16 and len(found[2]) > 8
    assert continuer.predict("x " * 200 + ". the cat sat")[0].text.startswith(" on the")
    assert continuer.predict([]) == []


@pytest.mark.parametrize("name", ["bert", "masked"])
def test_hidden_tokens_are_found(name: str, get: Get) -> None:
    filler = clplatform.load(get(name))
    mask = filler.tokenizer.mask_token
    found = filler.predict([f"the cat sat on{mask} mat .", f"the{mask} lay{mask} the rug ."], top=5)
    assert [len(f.tokens) for f in found] == [1, 2]
    for answer in found:
        assert mask not in answer.text
        for of_place in answer.tokens:
            assert list(of_place.values()) == sorted(of_place.values(), reverse=True) and len(of_place) <= 5
    assert found[0].text == f"the cat sat on{next(iter(found[0].tokens[0]))} mat ." and " the" in found[0].tokens[0]
    with pytest.raises(
        ClplatformError, match=f"sample 0: 'no mask' hides no token within the model's 16: write {mask}"
    ):
        filler.predict("no mask")
    with pytest.raises(ClplatformError, match="top=0: give 1 or more"):
        filler.predict("x", top=0)
    assert filler.predict([]) == []


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("seq2seq", "1 of 2 texts are cut at the end to 16 tokens"),
        ("causal", "1 of 2 texts are cut at the beginning to 8 tokens"),
        ("masked", "1 of 2 texts are cut at the end to 16 tokens"),
        ("tags", "1 of 2 texts are cut at the end to {longest} tokens"),
    ],
)
def test_texts_that_are_cut_are_counted(name: str, told: str, get: Get, capsys: pytest.CaptureFixture[str]) -> None:
    model = clplatform.load(get(name))
    first = f"the{model.tokenizer.mask_token} sat" if name == "masked" else "the cat sat"
    model.predict([first, first + " on the mat" * 30])
    assert capsys.readouterr().err == f"clplatform: {told.format(longest=model.info.input.max_length)}\n"
    model.predict([first])
    assert capsys.readouterr().err == ""


# -- the command --------------------------------------------------------------------------------------------------------------


def test_the_command_prints_a_line_for_each_sample(
    get: Get, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"question": "what is color ?", "context": c} for c in contexts("color", 3)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "t.txt").write_text("Ada met Bob Ray at noon\n")
    (tmp_path / "c.txt").write_text("the cat sat\n")
    for name, file, keys in (
        ("answers", "q.jsonl", {"input", "answer", "start", "end", "probability"}),
        ("tags", "t.txt", {"input", "spans", "labels"}),
        ("causal", "c.txt", {"input", "text"}),
    ):
        assert main(["predict", str(get(name)), str(tmp_path / file)]) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert len(lines) == (3 if name == "answers" else 1)
        assert all(set(line) == keys for line in lines)
