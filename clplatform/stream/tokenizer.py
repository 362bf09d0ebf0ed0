"""Tokenizers: Hugging Face's fast ones, a pretrained backbone's or one trained on the first experience."""

from __future__ import annotations

import string
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clplatform.backbone.pretrained import from_hub
from clplatform.types import ClplatformError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """A tokenizer from a folder, or from the hub by its id.

    Raises:
        ClplatformError: it cannot be had, or has no padding.
    """
    from transformers import AutoTokenizer

    tokenizer = from_hub(
        "the tokenizer", str(source), lambda: AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)
    )
    if tokenizer.pad_token is None:  # GPT-2 and its kin; nobody looks there (`attention_mask`)
        if tokenizer.eos_token is None:
            raise ClplatformError(
                f"backbone.pretrained={source}: the tokenizer has no token to fill up with (pad_token)"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def train_wordpiece(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """A lower-casing WordPiece tokenizer with BERT's special tokens, trained on these texts.

    The same texts give the same tokenizer, in any process. Words never seen are cut into known pieces: ASCII's letters
    and digits are known at any place of a word. It is larger than `vocab_size` only where there are more characters.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words = {
        word
        for text in texts
        for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text))
    }
    # The trainer numbers the characters within words as it meets them in a hash table, in another order in every
    # process, and breaks ties by these numbers; so they are numbered before it starts.
    within = sorted({c for word in words for c in word[1:]} | {*string.ascii_lowercase, *string.digits})
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=[*SPECIAL, *(f"##{c}" for c in within)], show_progress=False,
        initial_alphabet=sorted({*string.ascii_lowercase, *string.digits, *string.punctuation}),
    )  # fmt: skip
    scratch = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    scratch.normalizer, scratch.pre_tokenizer = tokenizer.normalizer, tokenizer.pre_tokenizer
    scratch.train_from_iterator(texts, trainer)
    tokenizer.model = models.WordPiece(scratch.get_vocab(), unk_token="[UNK]")
    tokenizer.decoder = decoders.WordPiece()
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
    first, second = _parts(texts)
    out = tokenizer(
        first, second, truncation=max_length is not None, max_length=max_length, padding=True, padding_side="right",
        return_tensors="pt", return_token_type_ids=False,
    ) if texts else {"input_ids": torch.zeros(0, 1), "attention_mask": torch.zeros(0, 1)}  # fmt: skip
    return {name: torch.as_tensor(out[name]).long() for name in ("input_ids", "attention_mask")}


def tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str] | Sequence[tuple[str, str]], max_length: int
) -> tuple[dict[str, Tensor], int]:
    """What `encode` gives, and how many of the texts were cut."""
    encoded = encode(tokenizer, texts, max_length)
    full = (encoded["attention_mask"].sum(1) >= max_length).nonzero()[:, 0].tolist()
    if not full:
        return encoded, 0
    first, second = _parts(texts)
    again = [first[i] for i in full], [second[i] for i in full] if second else None
    whole: Any = tokenizer(*again, truncation=False, padding=False, verbose=False)["input_ids"]
    return encoded, sum(len(tokens) > max_length for tokens in whole)


def require_offsets(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer whose tokens do not say where in the text they are."""
    if not tokenizer.is_fast:
        raise ClplatformError(
            f"the backbone's tokenizer ({type(tokenizer).__name__}) is not a fast one, whose tokens say where in the text "
            "they are: choose a backbone that has one"
        )


def unknown(tokenizer: PreTrainedTokenizerBase, input_ids: Tensor, attention_mask: Tensor, what: str) -> list[str]:
    """What the report must say of these rows' tokens that the tokenizer does not know: nothing, if it knows all.

    Args:
        input_ids: int64 [N, T].
        what: the rows, in the plural.
    """
    unk = tokenizer.unk_token_id
    special = [i for i in tokenizer.all_special_ids if i != unk]
    marks = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    words = attention_mask.bool() & ~torch.isin(input_ids, torch.tensor(special, dtype=torch.int64))
    # GPT-2 and its kin write any byte; what they call unknown is their end of a text.
    lost = words & (input_ids == unk) if unk is not None and unk not in marks else torch.zeros_like(words)
    notes = []
    if n := int(lost.any(1).sum()):
        share = 100 * lost.sum().item() / words.sum().item()
        notes.append(
            f"{share:.2g} % of the tokens of the {what} are not known to the tokenizer, in {n} of {len(words)}"
        )
    if empty := int((words.sum(1) == lost.sum(1)).sum()):
        notes.append(f"{empty} of {len(words)} {what} have no token that the tokenizer knows")
    return notes


def _parts(texts: Sequence[str] | Sequence[tuple[str, str]]) -> tuple[list[str], list[str] | None]:
    """Texts, or the first and the second of pairs."""
    first = [t if isinstance(t, str) else t[0] for t in texts]
    return first, None if not texts or isinstance(texts[0], str) else [t[1] for t in texts]
