"""Hugging Face's causal models learn pairs of texts: their loss is that of the whole text behind its source, padding changes
nothing, and what is written with kept keys and values is what whole passes write."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from composed import configuration, pair_stream, trained
from writers import CAUSAL, CONFIGS, SPEC, writer

from clplatform import build
from clplatform.backbone import prefix_lm
from clplatform.backbone.pseudo import Again
from clplatform.saved import load
from clplatform.stream.text_pairs import START
from clplatform.types import IGNORED, ClplatformError
from tests.world import same, weights

PAIRS = replace(SPEC, max_length=7)  # with targets of 8 and the counted lengths, 32 places


def causal(model_type: str = "gpt2", **changes: Any) -> Any:
    """With room for pairs, and weights that all matter."""
    config = {"model_type": model_type, **CONFIGS[model_type]}
    for name in {"n_positions", "max_position_embeddings"} & set(config):
        config[name] = 32
    backbone = writer(model_type, **{"input": PAIRS, "problem": "seq2seq", "config": config, **changes})
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in backbone.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return backbone


def rows() -> tuple[dict[str, torch.Tensor], list[list[int]], list[list[int]]]:
    """A batch of pairs, and its sources and targets (with their ends) without padding."""
    generator = torch.Generator().manual_seed(4)
    sources, targets = ([torch.randint(3, 50, (n,), generator=generator).tolist() for n in sizes]
                        for sizes in ((7, 2, 5, 1), (1, 6, 3, 6)))  # fmt: skip
    targets = [[*target, SPEC.eos_token_id] for target in targets]
    batch = {name: torch.zeros(4, 7, dtype=torch.int64) for name in ("input_ids", "attention_mask", "decoder_input_ids",
                                                                     "decoder_attention_mask")}  # fmt: skip
    batch["labels"] = torch.full((4, 7), IGNORED)
    for i, (source, target) in enumerate(zip(sources, targets, strict=True)):
        batch["input_ids"][i, : len(source)], batch["attention_mask"][i, : len(source)] = torch.tensor(source), 1
        begun = torch.tensor([SPEC.bos_token_id, *target[:-1]])
        batch["decoder_input_ids"][i, : len(begun)], batch["decoder_attention_mask"][i, : len(begun)] = begun, 1
        batch["labels"][i, : len(target)] = torch.tensor(target)
    return batch, sources, targets


# -- the loss -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", CAUSAL)
def test_the_loss_is_hugging_face_s_of_the_text_with_the_source_left_out(model_type: str) -> None:
    """−Σ log p(target, end | source, start), text by text without any padding; and its gradient."""
    backbone, (batch, sources, targets) = causal(model_type), rows()
    logits = backbone.projection(backbone(batch))
    found = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")
    expected = torch.zeros(())
    for source, target in zip(sources, targets, strict=True):
        text = torch.tensor([[*source, SPEC.bos_token_id, *target]])
        labels = text.clone()
        labels[:, : len(source) + 1] = IGNORED
        expected = expected + backbone.model(input_ids=text, labels=labels).loss * len(target)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    trained_ = [p for p in backbone.parameters() if p.requires_grad]
    for a, b in zip(torch.autograd.grad(found, trained_), torch.autograd.grad(expected, trained_), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("model_type", CAUSAL)
def test_what_padding_holds_and_how_much_there_is_changes_nothing(model_type: str) -> None:
    backbone, (batch, _, _) = causal(model_type), rows()
    found = backbone(batch)
    other = {name: column.clone() for name, column in batch.items()}
    for ids, mask in (("input_ids", "attention_mask"), ("decoder_input_ids", "decoder_attention_mask")):
        other[ids][other[mask] == 0] = 17
    shown = batch["decoder_attention_mask"].bool()
    torch.testing.assert_close(backbone(other)[shown], found[shown])
    for i in range(4):
        row = {name: column[i : i + 1] for name, column in batch.items()}
        n, m = int(row["attention_mask"].sum()), int(row["decoder_attention_mask"].sum())
        row = {name: column[:, : m if "decoder" in name else n] for name, column in row.items()}
        torch.testing.assert_close(backbone(row)[0], found[i, :m], rtol=1e-4, atol=1e-5)
    written = backbone.generate(batch)
    assert torch.equal(written, backbone.generate(other))


def test_a_pair_is_one_text_with_its_padding_behind_it() -> None:
    batch = {
        "input_ids": torch.tensor([[5, 6, 9], [7, 9, 9]]), "attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]]),
        "decoder_input_ids": torch.tensor([[1, 8], [1, 9]]), "decoder_attention_mask": torch.tensor([[1, 1], [1, 0]]),
    }  # fmt: skip
    ids, mask, places = prefix_lm.joined(batch)
    assert (ids * mask).tolist() == [[5, 6, 1, 8, 0], [7, 1, 0, 0, 0]]
    assert mask.tolist() == [[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]
    assert places.tolist() == [[2, 3], [1, 4]]


# -- writing ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("model_type", CAUSAL)
def test_what_is_written_is_what_whole_passes_over_one_text_write(model_type: str) -> None:
    backbone, (batch, sources, _) = causal(model_type), rows()
    written = backbone.generate(batch)
    assert written.shape[1] <= PAIRS.max_target_length
    for i, source in enumerate(sources):
        text = [*source, SPEC.bos_token_id]
        for _ in range(written.shape[1]):
            text.append(int(backbone.model(torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
            if text[-1] == SPEC.eos_token_id:
                break
        own = text[len(source) + 1 :]
        assert written[i].tolist() == own + [SPEC.pad_token_id] * (written.shape[1] - len(own))


@torch.no_grad()
@pytest.mark.parametrize("model_type", CAUSAL)
def test_logits_with_what_was_kept_are_those_of_all_read_again(model_type: str) -> None:
    backbone = causal(model_type)
    prompts = torch.tensor([[5, 6], [7, 8], [9, 9]])
    kept, again = backbone.decoding(prompts), Again(backbone, prompts)
    for _ in range(6):
        found = kept.logits()
        torch.testing.assert_close(found, again.logits(), rtol=1e-4, atol=1e-4)
        for writing in (kept, again):
            writing.append(found.argmax(1))
    assert kept.kept is not None


# -- from its page to its saved model -----------------------------------------------------------------------------------


GPT2 = ["backbone=gpt2_tiny", "backbone.config.n_embd=16", "backbone.config.n_layer=1", "backbone.config.n_head=2",
        "backbone.config.n_positions=64"]  # fmt: skip


def pretrained(folder: Path) -> Path:
    """A GPT-2 with its tokenizer, as the hub has them: one special token for everything."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(["say sun moon sing"] * 3, trainers.BpeTrainer(vocab_size=280, show_progress=False, initial_alphabet=alphabet))  # fmt: skip
    model = json.loads(bpe.to_str())["model"]
    tokenizer = GPT2Tokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])
    tokenizer.save_pretrained(folder)
    torch.manual_seed(5)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=64,
                        bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id)  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def test_a_pretrained_vocabulary_gets_a_token_from_which_targets_start(tmp_path: Path) -> None:
    source = pretrained(tmp_path / "hub")
    overrides = [*pair_stream(tmp_path), "backbone=gpt2", f"backbone.pretrained={source}", "strategy=replay"]
    config = configuration(*overrides)
    stream: Any = build.build_stream(config, build.build_tokenizer(config))
    spec, n = stream.info.input, stream.info.input.vocab_size - 1
    assert (spec.bos_token_id, spec.eos_token_id) == (n, n - 1) and stream.tokenizer.convert_ids_to_tokens(n) == START
    assert f"the token {START}, from which a target starts, is added to the {n} of the backbone" in stream.notes
    batch = stream[0].train.fetch(torch.arange(2))
    assert batch["decoder_input_ids"][:, 0].tolist() == [n, n] and n not in batch["input_ids"]
    learner: Any = build.build_learner(config, stream.info, build.build_strategies(config))
    from transformers import AutoModelForCausalLM

    plain: Any = AutoModelForCausalLM.from_pretrained(source)
    vectors, old = (m.get_input_embeddings().weight for m in (learner.backbone.model, plain))
    assert torch.equal(vectors[:n], old) and torch.allclose(vectors[n], old.mean(0), atol=1e-3)
    assert learner.backbone.model.get_output_embeddings().weight is vectors

    experiment = trained(tmp_path / "run", *overrides)
    shutil.rmtree(source)
    loaded = load(tmp_path / "run")
    assert same(weights(loaded.learner), weights(experiment.learner))
    assert len(loaded.tokenizer) == n + 1 and loaded.tokenizer.bos_token == START
    batch = experiment.stream[1].test.fetch(torch.arange(4))
    assert torch.equal(loaded.learner.generate(batch), experiment.learner.generate(batch))
    texts = [experiment.stream.texts[i][0] for i in batch["index"].tolist()]  # type: ignore[attr-defined]
    assert [row.text for row in loaded.predict(texts)] == [
        text.strip() for text in loaded.tokenizer.batch_decode(experiment.learner.generate(batch), skip_special_tokens=True)
    ]  # fmt: skip


def test_a_run_of_a_language_model_goes_on_with_pairs(tmp_path: Path) -> None:
    """With the same vocabulary, and with a token more where it was a pretrained one."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("say sun moon sing and say it again\n" * 60)
    language = ["stream=text_domains", f"stream.data_dir={tmp_path / 'texts'}", "stream.max_length=16",
                "stream.tokenizer_vocab_size=280", "strategy=finetuning"]  # fmt: skip
    first = trained(tmp_path / "own", *language, *GPT2)
    hub = pretrained(tmp_path / "hub")
    second = trained(tmp_path / "grown", *language, "backbone=gpt2", f"backbone.pretrained={hub}")
    for before, n_added in ((first, 0), (second, 1)):
        run = before.run_dir
        config = configuration(
            *pair_stream(tmp_path), "backbone=gpt2", f"backbone.pretrained={run}", "strategy=finetuning"
        )
        stream = build.build_stream(config, build.build_tokenizer(config))
        learner: Any = build.build_learner(config, stream.info, build.build_strategies(config))
        old = before.learner.backbone.model.get_input_embeddings().weight
        assert torch.equal(learner.backbone.model.get_input_embeddings().weight[: len(old)], old)
        assert stream.info.input.vocab_size == len(old) + n_added


# -- what is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_length": 24}, r"max_length=24 and stream\.max_target_length=8: backbone=small takes at most 32 tokens, "
                             "and reads source and target as one text of up to 33"),
        ({"vocab_size": 52}, "knows 50 tokens, the stream's tokenizer has 52"),
    ],
)  # fmt: skip
def test_what_does_not_fit(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    causal().model.save_pretrained(tmp_path)
    with pytest.raises(ClplatformError, match=message):
        writer(input=replace(PAIRS, **changes), problem="seq2seq", config=None, pretrained=str(tmp_path))


def test_a_language_model_s_vocabulary_is_never_made_larger(tmp_path: Path) -> None:
    causal().model.save_pretrained(tmp_path)
    with pytest.raises(ClplatformError, match="knows 50 tokens, the stream's tokenizer has 51"):
        writer(input=replace(PAIRS, vocab_size=51), problem="causal_lm", config=None, pretrained=str(tmp_path))
