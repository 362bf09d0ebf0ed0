"""LAMOL: the loss against a loop over samples, what is written and by whom, and what is left where λ and γ are zero."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from command import refused
from composed import SMALL, pair_stream, trained
from language_world import BOS, EOS, INPUT, SYMBOLS, make_language_experiment, tiny_stream
from strategies import from_page
from world import same, weights
from writers import writer

from clplatform.backbone.pseudo import Again, Form, draw
from clplatform.backbone.transformer.language import TransformerDecoder
from clplatform.check.guard import Guard
from clplatform.data import ConcatData, concat
from clplatform.experiment import Experiment
from clplatform.module.more_tokens import more_tokens
from clplatform.saved import load
from clplatform.types import IGNORED, ClplatformError

TOKENS = ["task", "one"]


def decoder(dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    return TransformerDecoder(
        input=INPUT, name="tiny", pretrained=None, size=16, n_layers=1, n_heads=2, inner_size=32, activation="gelu",
        norm="pre", positions="rotary", tied=True, dropout=dropout, freeze="none", problem="seq2seq",
    )  # fmt: skip


def made(folder: Path, strategies: dict[str, Any], **options: Any) -> Experiment:
    dropout = options.pop("dropout", 0.0)
    return make_language_experiment(folder, "seq2seq", strategies, backbone=decoder(dropout), **options)


def ready(**changes: Any) -> tuple[Any, Any, Any]:
    """A learner in the second experience, its stream, and its strategy."""
    strategy: Any = from_page("lamol", **changes)
    experiment = made(Path("unused"), {"lamol": strategy})
    learner, stream = experiment.learner, experiment.stream
    for i in range(2):
        learner.build(stream[i].info)
    learner.experience = stream[1]
    return learner.eval(), stream, strategy


def text(batch: Any, i: int) -> tuple[list[int], list[int]]:
    """Source, and target with its end, without padding."""
    return batch["input_ids"][i][batch["attention_mask"][i].bool()].tolist(), [
        t for t in batch["labels"][i].tolist() if t != IGNORED
    ]


# -- the loss -----------------------------------------------------------------------------------------------------------


def log_probabilities(learner: Any, vector: torch.Tensor, rest: list[int]) -> torch.Tensor:
    """log p of each of `rest` after a vector that stands for a token, from the layers themselves."""
    own = learner.backbone.model.decoder
    embedded = torch.cat([vector[None], own.embeddings.token.weight[rest[:-1]]])[None]
    rotation = own.embeddings.rotary(torch.arange(len(rest))[None])
    for layer in own.layers:
        embedded = layer(embedded, None, mask=None, causal=True, rotation=rotation)
    logits = learner.backbone.projection(own.norm(embedded))[0]
    return logits.log_softmax(-1).gather(1, torch.tensor(rest)[:, None])[:, 0]


@pytest.mark.parametrize("token", TOKENS)
def test_the_loss_is_that_of_whole_samples_after_a_generation_token(token: str) -> None:
    learner, stream, strategy = ready(token=token, language_model=0.3, ratio=0.5)
    data = strategy.train_data(learner, stream[1], stream[1].train)
    strategy.task_of = torch.zeros(2, dtype=torch.int64)  # as if two samples of the first experience had been written
    batch = stream[1].train.fetch(torch.arange(6))
    pseudo = {**stream[0].train.fetch(torch.arange(2)), "index": torch.tensor([-1, -2]), "source": torch.tensor([1, 1])}
    batch = concat([batch, pseudo])
    found = strategy.loss(learner, batch, learner(batch))["language_model"]
    vectors = learner.extras["lamol"]
    assert len(vectors) == (2 if token == "task" else 1)
    nats, n = torch.zeros(()), 0
    for i in range(8):
        source, target = text(batch, i)
        vector = vectors[0 if token == "one" else int(i < 6)]
        log_p = log_probabilities(learner, vector, [*source, BOS, *target])
        nats, n = nats - log_p.sum(), n + len(log_p)
    torch.testing.assert_close(found, 0.3 * nats / n, rtol=1e-4, atol=1e-5)
    assert len(data) >= len(stream[1].train)


def test_generation_tokens_are_learned_each_by_its_own_experience(tmp_path: Path) -> None:
    experiment = made(tmp_path, {"lamol": from_page("lamol", ratio=0.0)}, epochs=1)
    seen: list[list[torch.Tensor]] = []
    evaluate = experiment._evaluate
    experiment._evaluate = lambda: (seen.append([p.detach().clone() for p in experiment.learner.extras["lamol"]]),
                                    evaluate())[1]  # type: ignore[index]  # fmt: skip
    experiment.run()
    assert [len(tokens) for tokens in seen] == [1, 1, 2, 3]
    assert not torch.equal(seen[0][0], seen[1][0])
    assert torch.equal(seen[1][0], seen[3][0]) and torch.equal(seen[2][1], seen[3][1])  # no sample is of an earlier one


def test_rows_of_another_memory_are_answered_and_not_written() -> None:
    learner, stream, strategy = ready(ratio=0.0)
    batch = stream[1].train.fetch(torch.arange(4))
    other = {**stream[0].train.fetch(torch.arange(3)), "source": torch.full((3,), 2)}
    alone = strategy.loss(learner, batch, learner(batch))["language_model"]
    both = concat([batch, other])
    torch.testing.assert_close(strategy.loss(learner, both, learner(both))["language_model"], alone)


def test_without_both_it_is_finetuning_to_the_bit(tmp_path: Path) -> None:
    own = made(tmp_path / "own", {"lamol": from_page("lamol", language_model=0.0, ratio=0.0)}, dropout=0.1)
    plain = made(tmp_path / "plain", {"finetuning": from_page("finetuning")}, dropout=0.1)
    own.run(), plain.run()
    a, b = weights(own.learner), weights(plain.learner)
    assert same({n: w for n, w in a.items() if not n.startswith("extras.")}, b)
    assert own.results.matrix == plain.results.matrix


# -- what is written ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_texts_are_drawn_with_a_cache_as_without_one() -> None:
    learner, stream, strategy = ready()
    form = Form.of(stream[1].train.fetch(torch.arange(1)), INPUT)
    first = embedding_numbers(learner, [0, 1, 0, 1, 1])
    with more_tokens(learner.backbone, strategy.vectors(learner)):
        cached, again = (
            draw(backbone, first, form, 20, 1.0, torch.Generator().manual_seed(3))
            for backbone in (learner.backbone, Without(learner.backbone))
        )
    assert cached == again
    assert len({tuple(t) for t in cached}) > 1


class Without:
    """A backbone that offers what the protocol asks for, and no cache."""

    def __init__(self, backbone: Any) -> None:
        self.forward, self.projection = backbone.forward, backbone.projection


def embedding_numbers(learner: Any, tasks: list[int]) -> torch.Tensor:
    return learner.info.input.vocab_size + torch.tensor(tasks)


@torch.no_grad()
def test_tokens_are_the_k_likeliest_ones_of_the_model() -> None:
    learner, stream, strategy = ready()
    form = Form.of(stream[1].train.fetch(torch.arange(1)), INPUT)
    with more_tokens(learner.backbone, strategy.vectors(learner)):
        greedy = draw(learner.backbone, embedding_numbers(learner, [0, 1]), form, 1, 1.0, torch.Generator())
        for task, written in enumerate(greedy):
            writing = Again(learner.backbone, embedding_numbers(learner, [task])[None])
            for found in written:
                assert int(writing.logits().argmax()) == found
                writing.append(torch.tensor([found]))


@pytest.mark.parametrize("token", TOKENS)
def test_it_writes_samples_of_what_it_has_learned_as_many_as_it_should(token: str, tmp_path: Path) -> None:
    strategy: Any = from_page("lamol", token=token, ratio=0.75, top_k=3, language_model=0.5)
    experiment = made(tmp_path / "own", {"lamol": strategy}, epochs=60)
    given: list[Any] = []
    fit = experiment.fitter.fit
    experiment.fitter.fit = lambda learner, experience, stage, data, **how: (given.append(data),  # type: ignore[method-assign]
                                                                            fit(learner, experience, stage, data, **how))[1]  # fmt: skip
    experiment.run()
    assert [drawn for drawn, _ in strategy.written] == [0, 24, 24]  # 0.75 of 32 samples
    assert all(kept >= 15 for _, kept in strategy.written[1:])  # it writes samples, not noise
    assert given[0] is experiment.stream[0].train
    for i, data in enumerate(given[1:], start=1):
        assert isinstance(data, ConcatData) and len(data) == 32 + strategy.written[i][1]
        batch = data.fetch(torch.arange(32, len(data)))
        assert batch["source"].tolist() == [1] * len(batch["index"])
        assert batch["index"].tolist() == [-1 - k for k in range(len(batch["index"]))]
        right = 0
        for k in range(len(batch["index"])):
            source, target = text(batch, k)
            domain = (source[0] - 4) // SYMBOLS
            right += domain < i and target == [t + 3 * SYMBOLS for t in source] + [EOS]
        assert right > 0.6 * len(batch["index"])  # of an earlier domain, and rightly translated
    assert experiment.results.cost["generated_samples"] == 48
    assert experiment.results.cost["extra_parameters"] == 16 * (3 if token == "task" else 1)
    assert strategy.state_dict() == {"written": strategy.written}
    if token == "task":
        plain = made(tmp_path / "plain", {"finetuning": from_page("finetuning")}, epochs=60).run()
        a, b = (r.metrics["average_forgetting"] for r in (plain, experiment.results))
        assert a is not None and b is not None and b < a / 2


def test_each_earlier_experience_has_its_share() -> None:
    learner, stream, strategy = ready(ratio=1.0)
    learner.build(stream[2].info)
    found: list[torch.Tensor] = []
    strategy.write = lambda learner, form, which: (found.append(which), ({}, torch.zeros(0, dtype=torch.int64)))[1]
    assert (
        strategy.train_data(learner, stream[2], stream[2].train) is stream[2].train
    )  # nothing that was written had a form
    assert found[0].bincount().tolist() == [16, 16]
    assert strategy.written[-1] == [32, 0]


def test_no_sample_of_an_earlier_experience_is_read_or_kept(tmp_path: Path) -> None:
    stream, guard = tiny_stream("seq2seq"), Guard()
    stream.experiences = [guard.over(e) for e in stream.experiences]
    strategy: Any = from_page("lamol", ratio=0.5)
    experiment = made(tmp_path, {"lamol": strategy}, stream=stream, epochs=1)
    learn, evaluate = experiment._learn, experiment._evaluate

    def guarded(experience: Any, **how: Any) -> None:
        with guard.only({(experience.index, "train"), (experience.index, "validation")}):
            learn(experience, **how)

    def freely() -> None:
        with guard.only(None):
            evaluate()

    experiment._learn, experiment._evaluate = guarded, freely
    experiment.run()
    assert not guard.violations
    assert not [value for value in vars(strategy).values() if isinstance(value, dict) and value]


# -- the form of a sample -----------------------------------------------------------------------------------------------------


def test_a_text_is_a_pair_if_it_has_the_form_of_one() -> None:
    plain = Form(1, 1, BOS, EOS, 0, 4, 4)
    assert plain.pair([7, 8, BOS, 9, EOS]) == ([7, 8], [9, EOS])
    for wrong in (
        [7, BOS, EOS],
        [BOS, 9, EOS],
        [7, BOS, 9],
        [7, 9, EOS],
        [7, BOS, 8, BOS, 9, EOS],
        [5] * 5 + [BOS, 9, EOS],
    ):
        assert plain.pair(wrong) is None
    framed = Form(2, 2, BOS, EOS, 0, 8, 4)  # <s> source </s> <s> target </s>
    assert framed.pair([BOS, 7, EOS, BOS, 9, EOS]) == ([BOS, 7, EOS], [9, EOS])
    assert framed.pair([BOS, 7, 8, BOS, 9, EOS]) is None
    one = Form(2, 2, EOS, EOS, 0, 8, 4)  # GPT-2: one token for all
    assert one.pair([7, 8, EOS, 9, 10, EOS]) == ([7, 8], [9, 10, EOS])


def test_the_form_is_that_of_the_stream_s_samples() -> None:
    form = Form.of(tiny_stream("seq2seq")[0].train.fetch(torch.arange(3)), INPUT)
    assert (form.n_starts, form.n_ends, form.start, form.end) == (1, 1, BOS, EOS)


# -- stopping, loading, and what is refused -------------------------------------------------------------------------------------


class Killed(Exception):
    pass


def gpt2() -> Any:
    """Of Hugging Face; its vocabulary gets a token for each task."""
    settings = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "resid_pdrop": 0.01}
    return writer(config=settings, input=INPUT, problem="seq2seq")


@pytest.mark.parametrize(("make", "epochs"), [(partial(decoder, 0.01), 45), (gpt2, 30)], ids=["own", "gpt2"])
def test_resumes_to_the_same_bits(make: Callable[[], Any], epochs: int, tmp_path: Path) -> None:
    def new(folder: str) -> Experiment:
        strategies = {"lamol": from_page("lamol", ratio=0.5, top_k=3), "replay": from_page("replay")}
        options: dict[str, Any] = {"backbone": make(), "stream": tiny_stream("seq2seq", n=2), "epochs": epochs,
                                   "fitter": {"checkpoint_every": 10}}  # fmt: skip
        return make_language_experiment(tmp_path / folder, "seq2seq", strategies, **options)

    whole = new("whole")
    whole.run()
    broken, count = new("broken"), 0

    def kill(*_: object) -> None:
        nonlocal count
        count += 1
        if count == 4 * epochs + 29:  # in the second experience
            raise Killed

    broken.fitter.after_batch = kill
    with pytest.raises(Killed):
        broken.run()
    again = new("broken")
    again.results = type(again.results).load(tmp_path / "broken")
    again.run(resume=True)
    assert same(weights(whole.learner), weights(again.learner))
    assert whole.results.matrix == again.results.matrix
    assert whole.learner.chain.state_dict()["lamol"] == again.learner.chain.state_dict()["lamol"]
    n_written, n_kept = whole.learner.chain.strategies["lamol"].written[1]  # type: ignore[attr-defined]
    assert 0 < n_kept <= n_written


def test_one_token_for_all_does_not_say_of_which_task_a_sample_is() -> None:
    info = tiny_stream("seq2seq", task_ids=True).info
    with pytest.raises(ClplatformError, match=r"strategy\.lamol\.token=one: nobody knows of which task"):
        from_page("lamol", token="one").check(info)
    from_page("lamol").check(info)


def test_numbers_beside_the_vocabulary_stand_for_vectors_while_it_lasts() -> None:
    embedding = decoder().model.decoder.embeddings.token
    backbone = decoder()
    vectors = torch.randn(2, 16)
    size = INPUT.vocab_size
    with more_tokens(backbone, vectors):
        found = backbone.model.decoder.embeddings.token(torch.tensor([[size + 1, 5, size]]))
    assert torch.equal(found[0], torch.stack([vectors[1], embedding.weight[5], vectors[0]]))
    with pytest.raises(IndexError):
        backbone.model.decoder.embeddings.token(torch.tensor([[size]]))


def test_written_texts_are_counted_among_the_operations() -> None:
    learner, stream, strategy = ready(ratio=0.5)
    learner.counts()
    before = learner.counts()["flops"]
    strategy.train_data(learner, stream[1], stream[1].train)
    assert learner.counts()["flops"] > before


# -- from its page to its report ------------------------------------------------------------------------------------------------


DECODER = ["backbone=transformer_decoder", "backbone.size=16", "backbone.n_layers=1", "backbone.n_heads=2",
           "backbone.inner_size=32"]  # fmt: skip


def test_a_run_from_files_and_its_saved_model(tmp_path: Path) -> None:
    experiment = trained(
        tmp_path / "run", *pair_stream(tmp_path), *DECODER, "strategy=lamol", "strategy.lamol.ratio=1.0"
    )
    form = Form.of(experiment.stream[0].train.fetch(torch.arange(1)), experiment.stream.info.input)
    assert (form.n_starts, form.n_ends) == (2, 2)  # <s> source </s> <s> target </s>
    assert experiment.learner.chain.strategies["lamol"].written[1][0] == len(experiment.stream[1].train)  # type: ignore[attr-defined]
    loaded = load(tmp_path / "run").learner
    assert same(weights(loaded), weights(experiment.learner))
    batch = experiment.stream[1].test.fetch(torch.arange(4))
    assert torch.equal(loaded.generate(batch), experiment.learner.generate(batch))


def test_needs_a_decoder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = refused(capsys, *SMALL, *pair_stream(tmp_path), "backbone=transformer_seq2seq", "strategy=lamol")
    assert found == ("strategy=lamol needs a decoder, but backbone=transformer_seq2seq is none; choose a causal language "
                     "model, such as transformer_decoder")  # fmt: skip
