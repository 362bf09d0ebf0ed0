"""Tokenizers for language modelling and translation, and what such a problem needs of a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from clplatform.stream.tokenizer import train_wordpiece
from clplatform.types import ClplatformError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Kind = Literal["bpe", "wordpiece"]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
N_BYTES = 256
TITLES = {"bpe": "byte-level BPE", "wordpiece": "WordPiece"}


def train_bpe(
    texts: Sequence[str], vocab_size: int, *, frame: bool = False, tags: Sequence[str] = ()
) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer (Sennrich et al. 2016; Radford et al. 2019) trained on these texts.

    Every byte is a token, so any text is encoded and comes back exactly from `decode`. The same texts give the same
    tokenizer in any process: all 256 bytes are numbered before the training, and ties go to the pair of lower numbers.
    Special tokens that are spelt out in a text (`</s>`) are text; tags are recognised everywhere.

    Args:
        vocab_size: tokens with the special ones and the tags; there are fewer where the texts hold no more pairs.
        frame: texts are encoded as `<s> … </s>` (BERT, BART); otherwise without any special token (GPT-2).
        tags: tokens that are never cut, such as `<de>`; they are not among the special ones that `decode` leaves out.

    Raises:
        ClplatformError: `vocab_size` has no room for the bytes.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    least = len(SPECIAL) + N_BYTES + len(tags)
    if vocab_size < least:
        raise ClplatformError(
            f"stream.tokenizer_vocab_size={vocab_size}: byte-level BPE needs {least} or more (the {N_BYTES} bytes and "
            f"{least - N_BYTES} special tokens)"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(tags), special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
    if frame:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        mask_token="<mask>", split_special_tokens=True, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def train_tokenizer(
    kind: Kind, texts: Sequence[str], vocab_size: int, *, problem: Problem, tags: Sequence[str] = ()
) -> PreTrainedTokenizerBase:
    """A tokenizer of this kind for this problem, trained on these texts."""
    if kind == "bpe":
        return train_bpe(texts, vocab_size, frame=problem != "causal_lm", tags=tags)
    assert not tags  # WordPiece is for reading: it lower-cases, and would write so
    return train_wordpiece(texts, vocab_size)


@dataclass(frozen=True)
class Specials:
    """The special tokens of a tokenizer that a problem uses, by number."""

    pad: int
    bos: int  # begins what is written, and a block of a masked language model
    eos: int  # ends a document, and what is written
    mask: int | None


def specials(tokenizer: PreTrainedTokenizerBase, problem: Problem) -> Specials:
    """The special tokens, by the names that model families give them.

    `eos` is BERT's `[SEP]` where there is no token of that name, `bos` its `[CLS]`. A causal model without `bos` begins
    with `eos` (GPT-2), an encoder-decoder with `pad` (T5).

    Raises:
        ClplatformError: the tokenizer lacks one.
    """
    has: Any = tokenizer
    eos = _first(has.eos_token_id, has.sep_token_id)
    bos = _first(has.bos_token_id, has.cls_token_id)
    if problem == "causal_lm":
        bos = _first(bos, eos)
    elif problem == "seq2seq":
        bos = _first(bos, has.pad_token_id)
    else:
        bos, eos = _first(has.cls_token_id, bos), _first(has.sep_token_id, eos)
    needed = {"eos_token": eos, "bos_token": bos, "pad_token": has.pad_token_id}
    if problem == "masked_lm":
        needed["mask_token"] = has.mask_token_id
    lacking = [name for name, value in needed.items() if value is None]
    if lacking:
        raise ClplatformError(
            f"stream.problem={problem}: the backbone's tokenizer has no {' and no '.join(lacking)}; choose a model that "
            f"was made for {problem}, or backbone.pretrained=null"
        )
    return Specials(has.pad_token_id, bos, eos, has.mask_token_id)


def _first(*values: int | None) -> Any:
    return next((v for v in values if v is not None), None)


def special_table(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Which tokens are special, bool [vocabulary]."""
    table = torch.zeros(len(tokenizer), dtype=torch.bool)
    table[tokenizer.all_special_ids] = True
    return table
