"""Starting from the backbone of an earlier run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from composed import TOPICS, experiment, text_stream, trained
from torch import nn

from clplatform.backbone.from_run import run_model
from clplatform.backbone.huggingface import HuggingFaceImage, HuggingFaceText
from clplatform.backbone.huggingface_language import HuggingFaceCausal
from clplatform.backbone.pretrained import tokenizer_source
from clplatform.backbone.transformer.language import TransformerDecoder
from clplatform.backbone.transformer.text import TransformerText
from clplatform.files import write_json
from clplatform.saved import load
from clplatform.types import ClplatformError, InputSpec
from tests.language_world import INPUT

SETTINGS: dict[str, Any] = {
    "name": "mine", "pretrained": None, "size": 16, "n_layers": 2, "n_heads": 2, "inner_size": 32, "activation": "gelu",
    "norm": "pre", "positions": "learned", "dropout": 0.0, "freeze": "none",
}  # fmt: skip


def encoder(input: InputSpec = INPUT, **changes: Any) -> TransformerText:
    return TransformerText(input=input, **{**SETTINGS, "pooling": "mean", "problem": "classification", **changes})


def decoder(input: InputSpec = INPUT, **changes: Any) -> TransformerDecoder:
    return TransformerDecoder(input=input, **{**SETTINGS, "tied": True, **changes})


def saved(backbone: nn.Module, folder: Path, input: InputSpec = INPUT, **settings: Any) -> Path:
    """A run's folder, as far as it is read."""
    from safetensors.torch import save_model

    (folder / "model").mkdir(parents=True)
    save_model(nn.ModuleDict({"backbone": backbone}), str(folder / "model" / "model.safetensors"))
    config = {"backbone": {**SETTINGS, "tied": True, "pooling": "mean", **settings}}
    write_json(folder / "model" / "clplatform.json", {"config": config, "stream": {"input": input.to_dict()}})
    return folder


def same_encoder(a: Any, b: Any) -> bool:
    ours, theirs = a.encoder.state_dict(), b.encoder.state_dict()
    return all(torch.equal(v[: len(ours[n])], ours[n]) for n, v in theirs.items())


def test_a_decoder_goes_on_from_a_run(tmp_path: Path) -> None:
    torch.manual_seed(1)
    first = decoder()
    run = saved(first, tmp_path / "run")
    torch.manual_seed(2)
    fresh, again = decoder(), decoder(pretrained=str(run))
    assert not torch.equal(next(fresh.parameters()), next(first.parameters()))
    for name, value in first.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert again.model.head.weight is again.model.decoder.embeddings.token.weight  # still tied
    assert again.source == str(run)


def test_an_encoder_pretrained_by_hiding_tokens_classifies_and_the_other_way_round(tmp_path: Path) -> None:
    torch.manual_seed(1)
    masked, plain = encoder(problem="masked_lm"), encoder()
    torch.manual_seed(2)
    assert same_encoder(encoder(pretrained=str(saved(masked, tmp_path / "masked"))), masked)
    back = encoder(problem="masked_lm", pretrained=str(saved(plain, tmp_path / "plain")))
    assert same_encoder(back, plain)
    assert torch.equal(back.projection.weight, plain.encoder.embeddings.token.weight)  # tied to what was loaded


def test_shorter_texts_need_fewer_positions_and_longer_ones_are_refused(tmp_path: Path) -> None:
    long = replace(INPUT, max_length=40)
    first = encoder(long)
    run = str(saved(first, tmp_path / "run", long))
    assert same_encoder(encoder(replace(INPUT, max_length=20), pretrained=run), first)
    with pytest.raises(ClplatformError, match=r"shape \[40, 16\] there and \[60, 16\] here.*stream\.max_length"):
        encoder(replace(INPUT, max_length=60), pretrained=run)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 32}, r"backbone\.size=32: the backbone of .* has 16; give backbone\.size=16"),
        ({"n_heads": 4}, r"backbone\.n_heads=4"),
        ({"norm": "post"}, r"backbone\.norm=post"),
        ({"positions": "rotary"}, r"backbone\.positions=rotary"),
        ({"input": replace(INPUT, vocab_size=99)}, r"the run's tokenizer has 40 tokens and the stream's 99"),
    ],
)
def test_another_backbone_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    run = saved(encoder(), tmp_path / "run")
    with pytest.raises(ClplatformError, match=message):
        encoder(**{"pretrained": str(run), **changes})


def test_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    run = saved(encoder(), tmp_path / "run")
    with pytest.raises(ClplatformError, match="lacks model"):
        decoder(pretrained=str(run))


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ClplatformError, match="this is no finished run"):
        encoder(pretrained=str(tmp_path))


def test_a_saved_model_needs_its_run_no_more(tmp_path: Path) -> None:
    encoder(pretrained=str(tmp_path / "gone"), load_weights=False)


def test_the_tokenizer_is_the_runs(tmp_path: Path) -> None:
    run = saved(encoder(), tmp_path / "run")
    assert run_model(str(run)) == run / "model" == run_model(str(run / "model"))
    assert tokenizer_source({"pretrained": str(run)}) == str(run / "model")
    assert run_model("sentence-transformers/all-MiniLM-L6-v2") is None and run_model(None) is None


def test_tasks_are_learned_from_what_was_read_domain_by_domain(tmp_path: Path) -> None:
    """Pre-training on unlabelled domains, then each domain's task by itself from the model kept after any of them."""
    (tmp_path / "texts").mkdir()
    for topic, texts in TOPICS.items():
        (tmp_path / "texts" / f"{topic}.txt").write_text("\n".join(texts * 20))
    small = [
        "backbone=transformer_text",
        "backbone.size=16",
        "backbone.inner_size=16",
        "backbone.pooling=mean",
        "threads=1",
    ]
    read = trained(
        tmp_path / "read", *small, "stream=text_domains", f"stream.data_dir={tmp_path / 'texts'}", "stream.problem=masked_lm",
        "stream.domains=[travel,banking]", "stream.max_length=16", "stream.tokenizer_vocab_size=280", "strategy=finetuning",
        "keep_models=true",
    )  # fmt: skip
    tasks = [
        *text_stream(tmp_path / "tasks"),
        "stream.scenario=task_incremental",
        "stream.max_length=16",
        "strategy=independent",
    ]
    began = []
    for i in (1, 2):
        kept = read.run_dir / "models" / f"after_{i}"
        task = experiment(tmp_path / f"tasks_{i}", *small, *tasks, f"backbone.pretrained={kept}")
        began.append({n: v.clone() for n, v in task.learner.backbone.encoder.state_dict().items()})  # type: ignore[attr-defined]
        theirs = load(kept).learner.backbone.encoder.state_dict()
        assert all(torch.equal(v[: len(began[-1][n])], began[-1][n]) for n, v in theirs.items())
        task.run()
        assert task.results.matrix[-1][1] is not None
    assert not all(torch.equal(v, began[1][n]) for n, v in began[0].items())


# -- Hugging Face's -------------------------------------------------------------------------------------------------------------

BERT = {
    "model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
    "max_position_embeddings": 16,
}  # fmt: skip


def bert(problem: str, pretrained: str | None = None, **changes: Any) -> HuggingFaceText:
    return HuggingFaceText(
        input=INPUT, name="bert", pretrained=pretrained, package=None, pooling="mean", dropout=0.0, attention="sdpa",
        freeze="none", config=None if pretrained else BERT, problem=problem, **changes,
    )  # fmt: skip


@pytest.mark.parametrize("before", ["masked_lm", "classification"])
@pytest.mark.parametrize("after", ["masked_lm", "classification"])
def test_a_hugging_face_encoder_goes_on_from_a_run(before: str, after: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    first = bert(before)
    run = saved(first, tmp_path / "run")
    first.save_assets(run / "model")
    torch.manual_seed(2)
    again = bert(after, str(run))
    theirs = first.model.base_model.state_dict()
    for name, value in again.model.base_model.state_dict().items():
        if "pooler" not in name:
            assert torch.equal(value, theirs[name]), name
    if before == after == "masked_lm":
        assert all(torch.equal(v, first.state_dict()[n]) for n, v in again.state_dict().items())


def test_a_hugging_face_writer_goes_on_from_a_run(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "input": INPUT, "name": "gpt2", "package": None, "dropout": 0.0, "attention": "sdpa", "freeze": "none", "beams": 1,
        "length_penalty": 1.0,
    }  # fmt: skip
    config = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    torch.manual_seed(1)
    first = HuggingFaceCausal(config=config, pretrained=None, **options)
    run = saved(first, tmp_path / "run")
    first.save_assets(run / "model")
    again = HuggingFaceCausal(config=None, pretrained=str(run), **options)
    assert all(torch.equal(v, first.state_dict()[n]) for n, v in again.state_dict().items())


IMAGES = InputSpec("image", shape=(1, 8, 8), mean=(0.3,), std=(0.2,))
VIT: dict[str, Any] = {
    "model_type": "vit", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
}  # fmt: skip


def vit(pretrained: str | None = None, input: InputSpec = IMAGES) -> HuggingFaceImage:
    return HuggingFaceImage(
        input=input, name="vit_tiny", pretrained=pretrained, package=None, config=None if pretrained else VIT, pooling="cls",
        image_size=None, dropout=None, attention="sdpa", freeze="none",
    )  # fmt: skip


def test_an_image_encoder_goes_on_from_a_run(tmp_path: Path) -> None:
    """With the run's pixels: its weights have learned from images that were normalised so."""
    torch.manual_seed(1)
    first = vit()
    run = saved(first, tmp_path / "run", IMAGES)
    first.save_assets(run / "model")
    torch.manual_seed(2)
    again = vit(str(run), replace(IMAGES, mean=(0.6,), std=(0.5,))).eval()
    assert all(torch.equal(v, first.state_dict()[n]) for n, v in again.state_dict().items())
    batch = {"pixel_values": torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)}
    with torch.no_grad():
        assert torch.equal(again(batch), first.eval()(batch))


def test_a_run_of_texts_is_no_beginning_for_images_and_the_other_way_round(tmp_path: Path) -> None:
    texts, images = bert("classification"), vit()
    for backbone, name, input in ((texts, "texts", INPUT), (images, "images", IMAGES)):
        backbone.save_assets(saved(backbone, tmp_path / name, input) / "model")
    with pytest.raises(ClplatformError, match="image"):
        vit(str(tmp_path / "texts"))
    with pytest.raises(ClplatformError, match="vit is no model that reads text"):
        bert("classification", str(tmp_path / "images"))
    with pytest.raises(ClplatformError, match="has learned from images, and the stream is of texts"):
        encoder(pretrained=str(tmp_path / "images"))
