"""What a model makes of samples, layer by layer: one vector for each sample and layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from clplatform.data import derive_seed
from clplatform.learner import Learner
from clplatform.module.hidden import first_input, first_output, linear_blocks
from clplatform.module.mode import eval_mode
from clplatform.types import Batch, Data

FEATURES = "features"  # what the head reads: the last of all layers


@dataclass
class Reading:
    """Of N samples.

    Args:
        layers: name → [N, D]: the output of each part of the backbone, mean over the tokens, and `features`. Only the
            latter where the model does not pass its samples through the backbone as a whole.
        labels, task_labels: int64 [N] (labels of tokens: [N, T], not kept).
        logits: [N, K]; of language models none.
    """

    layers: dict[str, Tensor]
    labels: Tensor
    task_labels: Tensor
    logits: Tensor | None = None

    @property
    def features(self) -> Tensor:
        return self.layers[FEATURES]

    def without_layers(self) -> Reading:
        """The features alone."""
        return Reading({FEATURES: self.features}, self.labels, self.task_labels, self.logits)


@dataclass
class Hooks:
    """The last output of every block, as a forward pass leaves them."""

    names: list[str]
    decoder: set[int]
    states: dict[int, Tensor] = field(default_factory=dict)

    def keep(self, i: int, state: Any) -> None:
        if isinstance(state, Tensor) and state.is_floating_point():
            self.states[i] = state


def layer_names(backbone: Any, decoder: set[int]) -> list[str]:
    """Of a backbone's blocks, from input to output; those in `decoder` are the second half of an encoder-decoder."""
    n = len(backbone.blocks())
    if n == 1 or linear_blocks(backbone) is not None:
        return [f"layer {i + 1}" for i in range(n)]
    half = n - len(decoder) if len(decoder) < n else n
    names = ["embeddings", *(f"block {i}" for i in range(1, max(half, n - half)))]
    return [*names[:half], *(f"decoder {name}" for name in names[: n - half])]


@contextmanager
def watch(backbone: Any) -> Iterator[Hooks]:
    """Inside, forward passes leave the states of the backbone's blocks.

    (The first block of a Transformer may be a list of embeddings that is never called as a whole: its output is what the
    second is given.)
    """
    blocks: list[nn.Module] = backbone.blocks()
    part = getattr(getattr(backbone, "model", None), "decoder", None)
    inside = {id(m) for m in part.modules()} if isinstance(part, nn.Module) else set()
    decoder = {i for i, block in enumerate(blocks) if id(block) in inside}
    found = Hooks(layer_names(backbone, decoder), decoder)
    hooks = [
        block.register_forward_hook(lambda module, args, output, i=i: found.keep(i, first_output(output)))
        for i, block in enumerate(blocks)
    ]
    if len(blocks) > 1 and isinstance(blocks[0], nn.ModuleList):
        hooks.append(
            blocks[1].register_forward_pre_hook(
                lambda module, args, kwargs: found.keep(0, first_input(args, kwargs)), with_kwargs=True
            )
        )
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def read(learner: Learner, data: Data, batch_size: int) -> Reading:
    """All of `data` (at least one sample) through the model as its strategies wrap it, in eval mode, on the CPU."""
    columns: dict[str, list[Tensor]] = {}
    logits, tasks = [], []
    with torch.no_grad(), eval_mode(learner), learner.precision_context(), watch(learner.backbone) as hooks:
        for batch in learner.batches(data, batch_size=batch_size):
            hooks.states.clear()
            output = learner(batch)
            n = len(batch["labels"])
            for i, state in sorted(hooks.states.items()):
                if len(state) == n:  # else a strategy has split the batch
                    columns.setdefault(hooks.names[i], []).append(pooled(state, batch, decoder=i in hooks.decoder))
            written = "decoder_attention_mask" in batch
            columns.setdefault(FEATURES, []).append(pooled(output.features, batch, decoder=written))
            tasks.append(batch["task_labels"].cpu())
            if batch["labels"].ndim == 1:
                logits.append(output.logits.float().cpu())
    learner.flops.drop()
    layers = {name: torch.cat(parts) for name, parts in columns.items() if len(parts) == len(tasks)}
    names = [name for name in (*hooks.names, FEATURES) if name in layers]
    return Reading(
        {name: layers[name] for name in names}, data.labels, torch.cat(tasks), torch.cat(logits) if logits else None
    )


def pooled(state: Tensor, batch: Batch, *, decoder: bool = False) -> Tensor:
    """A state [B, D] as it is, [B, T, D] as the mean over the tokens that are no padding, anything else flattened; float32
    on the CPU. Tokens that a strategy has put before the text are no padding."""
    state = state.float()
    mask = batch.get("decoder_attention_mask" if decoder else "attention_mask")
    if state.ndim == 3 and mask is not None and state.shape[1] >= mask.shape[1]:
        added = state.shape[1] - mask.shape[1]
        kept = torch.nn.functional.pad(mask, (added, 0), value=1)[..., None].to(state)
        return ((state * kept).sum(1) / kept.sum(1).clamp_min(1)).cpu()
    return (state.mean(1) if state.ndim == 3 else state.flatten(1)).cpu()


def some(data: Data, n: int, *parts: int | str) -> Data:
    """At most `n` samples, as evenly of all classes as there are; which ones is a function of `parts`."""
    if len(data) <= n:
        return data
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(derive_seed("some", *parts)))
    labels = data.labels[order]
    if labels.ndim == 1:
        rank = torch.zeros_like(labels)  # the how-many-th of its class
        for label in labels.unique():
            own = labels == label
            rank[own] = torch.arange(int(own.sum()))
        order = order[rank.argsort(stable=True)]
    return data.select(order[:n].sort().values)
