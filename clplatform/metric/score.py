"""What a model is scored by on one experience: the entries of the matrix. Names, directions, formulas and sources."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """What a reader has to know of an entry of a matrix; `share`: a fraction of 1, shown in percent."""

    name: str
    title: str
    share: bool
    higher_is_better: bool
    formula: str
    source: str


SCORES: dict[str, Score] = {
    score.name: score
    for score in (
        Score("accuracy", "Accuracy", True, True, "share of the samples whose class is predicted", "–"),
        Score(
            "macro_f1", "Macro-F1", True, True, "mean over the classes of the experience of 2PR/(P+R)",
            "scikit-learn's f1_score(average='macro')",
        ),
        Score("token_accuracy", "Token accuracy", True, True, "share of the tokens whose class is predicted", "–"),
        Score(
            "span_f1", "Span F1", True, True, "2PR/(P+R) of whole spans with their type",
            "Tjong Kim Sang & De Meulder 2003 (CoNLL-2003)",
        ),
        Score(
            "perplexity", "Perplexity", False, False, "exp(−1/N · Σ_t ln p(token t | those before it))",
            "Jelinek et al. 1977; depends on the tokenizer",
        ),
        Score("nats_per_token", "Nats per token", False, False, "−1/N · Σ_t ln p(token t | those before it)", "Shannon 1951"),
        Score(
            "bits_per_byte", "Bits per byte", False, False, "−1/bytes · Σ_t log₂ p(token t | those before it)",
            "Graves 2013, for bytes; comparable across tokenizers",
        ),
        Score("bleu", "BLEU", True, True, "of the corpus, 4-grams, 13a tokenization", "Papineni et al. 2002; Post 2018 (sacreBLEU)"),
        Score("chrf", "chrF", True, True, "of the corpus, character 6-grams, β = 2", "Popović 2015 (sacreBLEU)"),
        Score("rouge_l", "ROUGE-L", True, True, "F1 of the longest common subsequence, mean of samples", "Lin 2004 (torchmetrics)"),
        Score("exact_match", "Exact match", True, True, "share of the answers that are a reference, after normalisation",
              "Rajpurkar et al. 2016 (SQuAD)"),
        Score("answer_f1", "Answer F1", True, True, "2PR/(P+R) of the words of answer and reference, mean of samples",
              "Rajpurkar et al. 2016 (SQuAD)"),
    )
}  # fmt: skip


def is_share(name: str) -> bool:
    """Is this score a fraction of 1, to be shown in percent?"""
    return name in SCORES and SCORES[name].share


def full_scale(name: str, best: float) -> float:
    """Where the scale of a share ends, in percent: 100, so that it is the same in every report; for scores of longer texts,
    which come nowhere near it, the next ten above the best.

    Args:
        best: the greatest value to be shown, in percent; NaN: none.
    """
    return max(10.0, 10.0 * math.ceil(best / 10)) if name in ("bleu", "chrf", "rouge_l") and best == best else 100.0


def title(name: str) -> str:
    """As a heading: `BLEU`, `Nats per token`."""
    return SCORES[name].title if name in SCORES else name.replace("_", " ").capitalize()


def word(name: str) -> str:
    """In the middle of a sentence: `BLEU`, `nats per token`."""
    text = title(name)
    return text if text[1:2].isupper() or text == "chrF" else text[0].lower() + text[1:]
