"""What a saved language model writes, goes on with, or fills in. Made by `clplatform.load`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clplatform.backbone.search import Search
from clplatform.data import predicted
from clplatform.evaluate import decode
from clplatform.saved import Saved, check_texts
from clplatform.types import IGNORED, ClplatformError

BATCH = 64


@dataclass(frozen=True)
class Written:
    """A text that was written."""

    text: str

    def row(self) -> dict[str, Any]:
        """What `clplatform predict` prints."""
        return {"text": self.text}


class Writer(Saved):
    """A model that reads a text and writes another."""

    writes = True

    def predict(
        self, inputs: Any, *, task: int | None = None, top: int = 1, batch_size: int = BATCH,
        search: Search | None = None,
    ) -> list[Written]:  # fmt: skip
        """What is written for texts.

        Args:
            top: not used.
            search: how tokens are chosen; None: as the backbone's page says.
        """
        columns = self.encode(inputs)
        with torch.inference_mode():
            batches = self.batches(columns, task, batch_size)
            return [Written(t) for b in batches for t in decode(self.tokenizer, self.learner.generate(b, search))]


class Continuer(Saved):
    """A model that goes on with a text."""

    writes = True

    def predict(
        self, inputs: Any, *, task: int | None = None, top: int = 1, batch_size: int = BATCH,
        search: Search | None = None,
    ) -> list[Written]:  # fmt: skip
        """How the model goes on with texts, without these. It reads at most as many of their last tokens, and writes at most
        as many, as half of a block of the stream has.

        Args:
            top: not used.
            search: how tokens are chosen; None: as the backbone's page says.
        """
        texts = check_texts(inputs)
        longest = max(1, (self.info.input.max_length or 2) // 2)
        whole = (
            self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
            if texts
            else []
        )
        rows = [ids[-longest:] for ids in whole]
        for i, row in enumerate(rows):
            if not row:
                raise ClplatformError(f"sample {i}: {texts[i]!r} has no token that the model knows")
        self.tell_cut(sum(len(ids) > longest for ids in whole), len(texts), longest, at="beginning")
        width, pad = max(map(len, rows), default=1), self.info.input.pad_token_id
        columns = {
            "input_ids": torch.tensor([[pad] * (width - len(r)) + r for r in rows]).view(-1, width),
            "padding": torch.tensor([width - len(r) for r in rows]),
        }
        found: list[Written] = []
        with torch.inference_mode():
            for batch in self.batches(columns, task, batch_size):
                shortest = int(batch["padding"].min())  # what no prompt of the batch has
                ids = batch["input_ids"][:, shortest:]
                mask = torch.arange(ids.shape[1], device=ids.device) >= (batch.pop("padding") - shortest)[:, None]
                tokens = self.learner.generate({**batch, "input_ids": ids, "attention_mask": mask.long()}, search)
                found += map(Written, self.tokenizer.batch_decode(tokens.cpu().tolist(), skip_special_tokens=True))
        return found


# -- masked language models ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Filled:
    """A text with its most likely tokens, and for each hidden place the probabilities of the most likely ones, best first."""

    text: str
    tokens: list[dict[str, float]]

    def row(self) -> dict[str, Any]:
        """What `clplatform predict` prints."""
        return {"text": self.text, "tokens": self.tokens}


class Filler(Saved):
    """A model that finds hidden tokens."""

    def predict(self, inputs: Any, *, task: int | None = None, top: int = 3, batch_size: int = BATCH) -> list[Filled]:
        """Fill in the tokens of texts that are hidden behind the mask token (BERT's is `[MASK]`, of tokenizers that were
        trained here `<mask>`).

        Args:
            top: tokens of each place.
        """
        if top < 1:
            raise ClplatformError(f"top={top}: give 1 or more")
        texts, mask = check_texts(inputs), self.tokenizer.mask_token
        if not texts:
            return []
        out = self.tokenizer(
            texts, truncation=True, max_length=self.info.input.max_length, padding=True, padding_side="right",
            split_special_tokens=False, return_token_type_ids=False, return_tensors="pt",
        )  # fmt: skip
        columns = {name: out[name] for name in ("input_ids", "attention_mask")}
        hidden = columns["input_ids"] == self.tokenizer.mask_token_id
        for i, any_hidden in enumerate(hidden.any(1).tolist()):
            if not any_hidden:
                raise ClplatformError(
                    f"sample {i}: {texts[i]!r} hides no token within the model's {self.info.input.max_length}: write {mask} for "
                    "what is to be found"
                )
        if (longest := self.info.input.max_length) is not None:
            whole: Any = self.tokenizer(texts, split_special_tokens=False, verbose=False)["input_ids"]
            self.tell_cut(sum(len(ids) > longest for ids in whole), len(texts), longest)
        columns["labels"] = columns["input_ids"].where(hidden, IGNORED)
        found: list[Filled] = []
        with torch.inference_mode():
            for batch in self.batches(columns, task, batch_size):
                logits = self.learner(batch).logits[:, :, : len(self.tokenizer)]
                values, ids = predicted(batch, logits).float().softmax(1).topk(top, dim=1)
                sizes = (batch["labels"] != IGNORED).sum(1).tolist()
                parts = zip(values.split(sizes), ids.split(sizes), batch["input_ids"], strict=True)
                found += [self._filled(row, v, k) for v, k, row in parts]
        return found

    def _filled(self, row: Tensor, values: Tensor, ids: Tensor) -> Filled:
        """A text [T], and of its hidden places probabilities and tokens [n, top]."""
        row = row.masked_scatter(row == self.tokenizer.mask_token_id, ids[:, 0])
        tokens = [
            {self.tokenizer.decode([k]): p for k, p in zip(of_place, own, strict=True)}
            for of_place, own in zip(ids.tolist(), values.tolist(), strict=True)
        ]
        return Filled(self.tokenizer.decode(row.tolist(), skip_special_tokens=True).strip(), tokens)
