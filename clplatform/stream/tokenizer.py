"""Tokenizers: Hugging Face's fast ones, a pretrained backbone's or one trained on the first experience."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clplatform.backbone.pretrained import from_hub

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """A tokenizer from a folder, or from the hub by its id.

    Raises:
        ClplatformError: it cannot be had.
    """
    from transformers import AutoTokenizer

    tokenizer = from_hub(
        "the tokenizer", str(source), lambda: AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)
    )
    if tokenizer.pad_token is None:  # GPT-2 and its kin; nobody looks there (`attention_mask`)
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def train_wordpiece(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """A lower-casing WordPiece tokenizer with BERT's special tokens, trained on these texts.

    The same texts give the same tokenizer. Words never seen are cut into known pieces: ASCII's characters are known
    at any place of a word.
    """
    import string

    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    letters = sorted(set(string.ascii_lowercase + string.digits + string.punctuation))
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    vocabulary = tokenizer.get_vocab()
    for character in string.ascii_lowercase + string.digits:
        vocabulary.setdefault(f"##{character}", len(vocabulary))
    tokenizer.model = models.WordPiece(vocabulary, unk_token="[UNK]")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(t, tokenizer.token_to_id(t)) for t in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]",
    )  # fmt: skip


def encode(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str] | Sequence[tuple[str, str]], max_length: int | None
) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask`, int64 [N, T], padded to the longest text.

    Args:
        texts: texts, or pairs of texts.
        max_length: longer ones are cut.
    """
    first = [t if isinstance(t, str) else t[0] for t in texts]
    second = None if not texts or isinstance(texts[0], str) else [t[1] for t in texts]
    out = tokenizer(
        first, second, truncation=max_length is not None, max_length=max_length, padding=True, padding_side="right",
        return_tensors="pt", return_token_type_ids=False,
    ) if texts else {"input_ids": torch.zeros(0, 1), "attention_mask": torch.zeros(0, 1)}  # fmt: skip
    return {name: torch.as_tensor(out[name]).long() for name in ("input_ids", "attention_mask")}
