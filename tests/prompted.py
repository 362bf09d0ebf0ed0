"""What tests of prompt strategies share: the tiny world's Transformers written out, one sample at a time, and their runs."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from naive import Recorder
from strategies import from_page
from text_world import TinyTextStream, make_text_experiment
from torch import Tensor
from world import TinyStream, make_experiment, tiny_vit

# Decay and momentum reach what has no gradient, if nothing holds it.
ADAMW = partial(torch.optim.AdamW, lr=0.02, weight_decay=0.1)

Prefixes = dict[int, tuple[Tensor, Tensor]]  # layer, from 1 → keys and values, each [L, D]


def run(
    folder: Path, name: str, *, stream: Any = None, backbone: Any = None, optimizer: Any = None, **changes: Any
) -> Any:
    """A finished run and its recorder; `optimizer` None: SGD with momentum, as `world.make_learner` has it."""
    stream, recorder = stream or TinyStream(), Recorder()
    options: dict[str, Any] = {"stream": stream, **({"optimizer": optimizer} if optimizer else {})}
    make = make_text_experiment if isinstance(stream, TinyTextStream) else make_experiment
    if make is make_experiment:
        options["backbone"] = backbone or livelier(tiny_vit())
    experiment = make(folder, {"recorder": recorder, name: from_page(name, **changes)}, **options)
    experiment.run()
    return experiment, recorder


def livelier(backbone: Any) -> Any:
    """With random weights of a size at which samples, prompts and layers matter."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in backbone.named_parameters():
            if p.ndim >= 2:
                p.normal_(0, 0.5 if "embeddings" in name else 0.25, generator=generator)
    return backbone


def read(backbone: Any, x: Tensor, tokens: Tensor | None = None, prefixes: Prefixes | None = None) -> Tensor:
    """The tiny ViT on one image [1, 1, D]: outputs [T, D], those of `tokens` [L, D] behind the first."""
    model = backbone.model
    hidden = model.embeddings(x[None])[0]
    if tokens is not None:
        hidden = torch.cat([hidden[:1], tokens, hidden[1:]])
    for number, layer in enumerate(model.layers, 1):
        normed, attention = layer.layernorm_before(hidden), layer.attention
        q, k, v = attention.q_proj(normed), attention.k_proj(normed), attention.v_proj(normed)
        if prefixes and number in prefixes:
            k, v = torch.cat([prefixes[number][0], k]), torch.cat([prefixes[number][1], v])
        heads = [(q[:, c] @ k[:, c].T / 8**0.5).softmax(1) @ v[:, c] for c in torch.arange(16).split(8)]
        hidden = hidden + attention.o_proj(torch.cat(heads, 1))
        hidden = hidden + layer.mlp(layer.layernorm_after(hidden))
    return model.layernorm(hidden)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum() / (a.norm() * b.norm())


def cross_entropy(logits: Tensor, label: int, classes: Any) -> Tensor:
    """Of one sample among these classes."""
    return sum(logits[k].exp() for k in classes).log() - logits[label]  # type: ignore[union-attr]


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


def sgd(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def close(found: Tensor, expected: Tensor, *, rtol: float = 1e-3, atol: float = 1e-4) -> None:
    torch.testing.assert_close(found, expected.detach(), rtol=rtol, atol=atol)


def mixed(stream: Any, seed: int = 0) -> dict[str, Tensor]:
    """Test samples of all experiences in one batch, shuffled."""
    batches = [e.test.fetch(torch.arange(len(e.test))) for e in stream]
    names, n = batches[0].keys(), sum(len(b["labels"]) for b in batches)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    if "input_ids" not in names:
        return {name: torch.cat([b[name] for b in batches])[order] for name in names}
    return {name: torch.cat([e.test.columns[name] for e in stream])[order] for name in stream[0].test.columns}


def check_text_rows(learner: Any, stream: Any) -> None:
    """A batch of padded texts of all experiences gives what one text at a time gives."""
    learner.eval()
    batch = mixed(stream)
    with torch.no_grad():
        together = learner(batch)
        for i in range(len(batch["labels"])):
            length = int(batch["attention_mask"][i].sum())
            row = {n: c[i : i + 1, :length] if c.ndim == 2 else c[i : i + 1] for n, c in batch.items()}
            alone = learner(row)
            close(together.logits[i], alone.logits[0])
            close(together.features[i], alone.features[0])


def check_task_ids_are_not_used(learner: Any, stream: Any) -> None:
    """Where they are hidden."""
    batch = mixed(stream)
    assert not batch["task_labels"].any()
    scrambled = {**batch, "task_labels": torch.arange(len(batch["labels"])) % 3}
    with torch.no_grad():
        assert torch.equal(learner.eval()(batch).logits, learner(scrambled).logits)


def check_frozen(recorder: Recorder, classes: list[int]) -> None:
    """The backbone, and the classifiers of earlier experiences, to the bit; those of the experience are trained.

    Args:
        classes: seen before each experience.
    """
    for i, n in enumerate(classes):
        before, after = recorder.before[i], recorder.after[i]
        own = [name for name in before if name.startswith("backbone.")]
        assert len(own) > 10
        assert all(torch.equal(before[name], after[name]) for name in own)
        for name in ("head.linear.weight", "head.linear.bias"):
            assert torch.equal(before[name][:n], after[name][:n])
            assert not (before[name][n:] == after[name][n:]).any()
