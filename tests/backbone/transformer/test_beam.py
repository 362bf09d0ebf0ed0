"""Beam search against Hugging Face's, and against looking at every text."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from copied import END, PAD, START, VOCABULARY, bart, gpt2, ids, padded
from torch import Tensor

from clplatform.backbone.transformer.beam import IMPOSSIBLE, beam_search, length_penalty
from clplatform.backbone.transformer.convert import from_bart, from_gpt2
from clplatform.backbone.transformer.generate import greedy
from clplatform.types import ClplatformError

SETTINGS = [(2, 1.0, False), (3, 0.0, False), (4, 2.0, False), (4, -1.0, False), (3, 1.0, True), (6, 0.6, True)]


def compare(found: Any, generated: Any, n_beams: int) -> None:
    """All beams that have ended, and their scores."""
    expected = generated.sequences.view(-1, n_beams, generated.sequences.shape[1])
    scores = generated.sequences_scores.view(-1, n_beams)
    real = scores > IMPOSSIBLE / 2
    assert real[:, 0].all()
    assert torch.equal(found.ids_BKT[real], expected[real])
    torch.testing.assert_close(found.scores_BK[real], scores[real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lengths", [[5, 5, 5], [7, 1, 4]])
@pytest.mark.parametrize(("n_beams", "alpha", "early"), SETTINGS)
@pytest.mark.parametrize("seed", range(3))
def test_gpt2_s_beams_are_hugging_face_s(
    seed: int, n_beams: int, alpha: float, early: bool, lengths: list[int]
) -> None:
    model = gpt2(seed)
    prompt, mask = padded(lengths, left=True, seed=seed)
    generated = model.generate(
        prompt, attention_mask=mask, max_new_tokens=15, do_sample=False, num_beams=n_beams, length_penalty=alpha,
        early_stopping=early, num_return_sequences=n_beams, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    found = beam_search(
        from_gpt2(model).decoding(prompt, mask), n_beams=n_beams, max_new_tokens=15, end=END, pad=PAD, alpha=alpha,
        early_stopping=early,
    )  # fmt: skip
    compare(found, generated, n_beams)


@pytest.mark.parametrize("lengths", [[5, 5, 5], [7, 1, 4]])
@pytest.mark.parametrize(("n_beams", "alpha", "early"), SETTINGS)
@pytest.mark.parametrize("seed", range(3))
def test_bart_s_beams_are_hugging_face_s(
    seed: int, n_beams: int, alpha: float, early: bool, lengths: list[int]
) -> None:
    model = bart(seed)
    source, mask = padded(lengths, seed=seed)
    generated = model.generate(
        source, attention_mask=mask, max_new_tokens=15, do_sample=False, num_beams=n_beams, length_penalty=alpha,
        early_stopping=early, num_return_sequences=n_beams, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    found = beam_search(
        from_bart(model).decoding(source, mask, start=START), n_beams=n_beams, max_new_tokens=15, end=END, pad=PAD,
        alpha=alpha, early_stopping=early,
    )  # fmt: skip
    compare(found, generated, n_beams)


def log_p(model: Any, prompt: list[int], text: tuple[int, ...]) -> float:
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *text]]))[0, len(prompt) - 1 : -1]
    return float(logits.log_softmax(1).gather(1, torch.tensor(text)[:, None]).sum())


@pytest.mark.parametrize("kind", ["power", "gnmt"])
@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.5])
@pytest.mark.parametrize("seed", range(3))
def test_with_enough_beams_it_finds_the_best_of_all_texts(seed: int, alpha: float, kind: Any) -> None:
    """Every text of up to three tokens from five, ended or not."""
    model, end = from_gpt2(gpt2(seed, vocab_size=5, bos_token_id=0, eos_token_id=2, pad_token_id=3)), 2
    prompt = [1, 4, 0]
    texts = [t for n in (1, 2) for t in itertools.product(range(5), repeat=n) if t[-1] == end and end not in t[:-1]]
    texts += [t for t in itertools.product(range(5), repeat=3) if end not in t[:-1]]
    scores = {t: log_p(model, prompt, t) / length_penalty(len(t), alpha, kind) for t in texts}
    best = sorted(scores, key=lambda t: -scores[t])[:3]
    found = beam_search(
        model.decoding(torch.tensor([prompt])), n_beams=30, max_new_tokens=3, end=end, pad=3, alpha=alpha, penalty=kind
    )  # fmt: skip
    for text, row, score in zip(best, found.ids_BKT[0], found.scores_BK[0], strict=False):
        assert tuple(row[3 : 3 + len(text)].tolist()) == text
        assert set(row[3 + len(text) :].tolist()) <= {3}
        assert float(score) == pytest.approx(scores[text], abs=1e-4)


def test_length_penalties_are_their_formulas() -> None:
    assert length_penalty(7, 2.0, "power") == 49
    assert length_penalty(7, 0.0, "power") == length_penalty(7, 0.0, "gnmt") == 1
    assert length_penalty(7, 0.6, "gnmt") == pytest.approx((5 + 7) ** 0.6 / (5 + 1) ** 0.6)
    assert length_penalty(1, 3.0, "gnmt") == 1


def test_one_beam_that_cannot_end_is_greedy_search() -> None:
    for seed in range(3):
        model, prompt = from_gpt2(gpt2(seed)), ids(3, 4, seed=seed)
        found = beam_search(model.decoding(prompt), n_beams=1, max_new_tokens=12)
        assert torch.equal(found.ids_BKT[:, 0], greedy(model.decoding(prompt), max_new_tokens=12))


def test_texts_of_a_batch_do_not_touch_each_other() -> None:
    model, (prompt, mask) = from_gpt2(gpt2()), padded([6, 2, 4], left=True)
    options: dict[str, Any] = {"n_beams": 3, "max_new_tokens": 12, "end": END, "pad": PAD}
    together = beam_search(model.decoding(prompt, mask), **options)
    for row, n in enumerate([6, 2, 4]):
        alone = beam_search(model.decoding(prompt[row : row + 1, -n:]), **options)
        length = alone.ids_BKT.shape[2] - n
        torch.testing.assert_close(together.scores_BK[row], alone.scores_BK[0], rtol=1e-5, atol=1e-5)
        assert torch.equal(together.ids_BKT[row, :, 6 : 6 + length], alone.ids_BKT[0, :, n:])
        assert (together.ids_BKT[row, :, 6 + length :] == PAD).all()


def test_beams_are_different_best_first_and_scored_as_the_model_does() -> None:
    model, prompt = from_gpt2(gpt2()), ids(2, 4)
    found = beam_search(model.decoding(prompt), n_beams=5, max_new_tokens=8, end=END, pad=PAD, alpha=0.5)
    assert (found.scores_BK.diff(dim=1) <= 0).all()
    for b in range(2):
        rows: list[list[int]] = found.ids_BKT[b, :, 4:].tolist()
        texts = [tuple(row[: row.index(END) + 1] if END in row else row) for row in rows]
        assert len(set(texts)) == 5
        for text, score in zip(texts, found.scores_BK[b].tolist(), strict=True):
            assert log_p(model, prompt[b].tolist(), text) / len(text) ** 0.5 == pytest.approx(score, abs=1e-4)


def test_fewer_texts_than_beams_leave_beams_empty() -> None:
    model, prompt = from_gpt2(gpt2()), ids(1, 4)
    found = beam_search(model.decoding(prompt), n_beams=VOCABULARY + 4, max_new_tokens=1, end=END, pad=PAD)
    scores: Tensor = found.scores_BK[0]
    assert (scores[:VOCABULARY] > -100).all() and (scores[VOCABULARY:] == IMPOSSIBLE).all()
    assert sorted(found.ids_BKT[0, :VOCABULARY, 4].tolist()) == list(range(VOCABULARY))
    assert (found.ids_BKT[0, VOCABULARY:, 4] == PAD).all()


@pytest.mark.parametrize("settings", [{"n_beams": 0, "max_new_tokens": 3}, {"n_beams": 2, "max_new_tokens": 0}])
def test_no_beams_and_no_tokens_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ClplatformError, match="give 1 or more"):
        beam_search(from_gpt2(gpt2()).decoding(ids(1, 3)), **settings)


def test_early_stopping_stops_as_soon_as_all_beams_have_ended() -> None:
    """With a penalty under which longer texts are better, the search would go on."""
    model, lengths = from_gpt2(gpt2()), []
    end = int(greedy(model.decoding(ids(1, 4)), max_new_tokens=3)[0, 5])  # of a likely text
    for early in (True, False):
        decoding = model.decoding(ids(1, 4))
        beam_search(decoding, n_beams=2, max_new_tokens=30, end=end, pad=PAD, alpha=4.0, early_stopping=early)
        lengths.append(decoding.ids_BT.shape[1] - 4)  # tokens that were written
    assert 2 <= lengths[0] < lengths[1]
