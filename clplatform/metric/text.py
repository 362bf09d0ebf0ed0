"""Scores of texts that a model has written against references, by the libraries that papers use; all in 0 … 1."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

Reference = str | Sequence[str]  # one text, or several that are as good

ARTICLES = re.compile(r"\b(a|an|the)\b")


def bleu(written: Sequence[str], references: Sequence[Reference]) -> float:
    """BLEU of the corpus (Papineni et al. 2002) by sacreBLEU (Post 2018): 4-grams, brevity penalty, 13a tokenization,
    exponential smoothing."""
    from sacrebleu import corpus_bleu

    return corpus_bleu(list(written), _columns(references)).score / 100


def chrf(written: Sequence[str], references: Sequence[Reference]) -> float:
    """chrF of the corpus (Popović 2015) by sacreBLEU: character n-grams up to 6, β = 2."""
    from sacrebleu import corpus_chrf

    return corpus_chrf(list(written), _columns(references)).score / 100


def rouge_l(written: Sequence[str], references: Sequence[Reference]) -> float:
    """ROUGE-L (Lin 2004, Section 3) by torchmetrics: F1 of the longest common subsequence of words, the best reference's,
    mean over the samples."""
    from torchmetrics.functional.text import rouge_score

    several = [_several(reference) for reference in references]
    return float(rouge_score(list(written), several, accumulate="best", rouge_keys="rougeL")["rougeL_fmeasure"])


def exact_match(written: Sequence[str], references: Sequence[Reference]) -> float:
    """Share of the answers that are one of their references, both normalised (Rajpurkar et al. 2016)."""
    hits = [normalise(w) in {normalise(r) for r in _several(ref)} for w, ref in zip(written, references, strict=True)]
    return sum(hits) / len(hits)


def answer_f1(written: Sequence[str], references: Sequence[Reference]) -> float:
    """F1 of the words that answer and reference share, the best reference's, mean over the samples (Rajpurkar et al. 2016)."""
    best = [max(word_f1(w, r) for r in _several(ref)) for w, ref in zip(written, references, strict=True)]
    return sum(best) / len(best)


def normalise(text: str) -> str:
    """In lower case, without punctuation, English articles and more than one space: as SQuAD's own script has it."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(ARTICLES.sub(" ", text).split())


def word_f1(written: str, reference: str) -> float:
    """2PR/(P+R) of the words of two normalised texts; of two empty ones 1."""
    a, b = normalise(written).split(), normalise(reference).split()
    if not a or not b:
        return float(a == b)
    shared = sum((Counter(a) & Counter(b)).values())
    return 2 * shared / (len(a) + len(b))


def _several(reference: Reference) -> list[str]:
    return [reference] if isinstance(reference, str) else list(reference)


def _columns(references: Sequence[Reference]) -> list[list[str]]:
    """References as sacreBLEU takes them: the first of every sample, then the second …; the last one again where a sample
    has fewer."""
    several = [_several(reference) for reference in references]
    n = max(map(len, several), default=1)
    return [[of_one[min(i, len(of_one) - 1)] for of_one in several] for i in range(n)]


TEXT_SCORES: dict[str, Callable[[Sequence[str], Sequence[Reference]], float]] = {
    "bleu": bleu, "chrf": chrf, "rouge_l": rouge_l, "exact_match": exact_match, "answer_f1": answer_f1,
}  # fmt: skip
