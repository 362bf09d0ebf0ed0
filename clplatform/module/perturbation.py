"""Perturbations of a batch's token vectors: what adversarial training adds to the embeddings of texts (to an image's patches).

    d(r) = g / ‖g‖₂,  g = ∇_r ℓ(x + s r, y),  s = ‖x‖₂ / √n

x are the vectors that the backbone's token embedding returns, before positions are added; norms are of one sample, over all its
tokens, and n is how many numbers these have. s is a constant, and 1 unless perturbations are relative: it does what normalising
the embeddings to unit variance does, which pretrained weights do not allow. Padding is not perturbed. The perturbation travels in the batch, so that strategies which send rows here and there
send it along, and is added by hooks while a context lasts: nothing is left in the model, which may be copied at any time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clplatform.memory.features import FrozenFeatures
from clplatform.module.hidden import first_output, with_first_output
from clplatform.module.mode import eval_mode
from clplatform.types import Batch, ClplatformError

if TYPE_CHECKING:
    from clplatform.learner import Learner

COLUMN = "perturbation"
# Of our own Transformers: what makes vectors of tokens, or of patches.
OURS = ("embeddings.token", "embeddings.projection")


def token_embedding(backbone: nn.Module) -> nn.Module | None:
    """What turns tokens (or patches) into vectors; None: the backbone has no such part."""
    model: Any = next((m for m in backbone.modules() if hasattr(m, "base_model_prefix")), None)
    if model is None:
        return next((m for name, m in backbone.named_modules() if name.endswith(OURS)), None)
    try:
        return model.get_input_embeddings()
    except NotImplementedError:
        return None


def check_reach(name: str, learner: Learner) -> None:
    """Raises ClplatformError where there is nothing to perturb; `name` is the strategy's."""
    if token_embedding(learner.backbone) is None:
        raise ClplatformError(
            f"strategy={name} perturbs the vectors of tokens, and this backbone has no token embedding; choose a "
            "Transformer, such as transformer_text or minilm"
        )
    for other, strategy in learner.chain.strategies.items():
        if isinstance(getattr(strategy, "features", None), FrozenFeatures):
            raise ClplatformError(
                f"strategy=[{name},{other}] cannot be combined: {other} computes features of the frozen backbone once, and a "
                f"perturbation of the tokens never reaches them; leave out one (backbone.freeze=all goes with {name})"
            )


def applies(learner: Learner) -> bool:
    """Not to a stage that is of other parts than the backbone (BiC's correction), which may be given its features."""
    return learner.stage.trainable is None or any(p.requires_grad for p in learner.backbone.parameters())


@contextmanager
def add_perturbation(backbone: nn.Module, *, relative: bool = False) -> Iterator[None]:
    """Inside, the backbone adds the batch's column `perturbation`, if it has one, to its token vectors.

    Args:
        relative: in units of a sample's root mean square.
    """
    waiting: list[Batch] = []

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        waiting[:] = [args[0]] if COLUMN in args[0] else []

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        if not waiting:  # a decoder may share the embedding: only what is read is perturbed, not what is written
            return None
        vectors, batch = first_output(output), waiting.pop()
        perturbation = batch[COLUMN]
        if vectors.shape != perturbation.shape:
            perturbation = perturbation[:, : vectors.shape[1]]  # rows that were cut to their longest text
        if relative:
            perturbation = perturbation * spread(vectors.detach(), real(batch))
        return with_first_output(output, vectors + perturbation.to(vectors))

    embedding = token_embedding(backbone)
    assert embedding is not None
    hooks = [backbone.register_forward_pre_hook(before), embedding.register_forward_hook(after)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def real(batch: Batch) -> Tensor | float:
    """0 for padding, [B, T, 1]; 1 where there is none."""
    return batch["attention_mask"][:, :, None].float() if "input_ids" in batch else 1.0


def spread(vectors: Tensor, mask: Tensor | float) -> Tensor:
    """s: the root mean square of each sample's numbers, but for padding, [B, 1, …]."""
    return norms(vectors * mask) / size(vectors, mask).sqrt()


def size(vectors: Tensor, mask: Tensor | float) -> Tensor:
    """n: how many numbers of each sample are not of padding, [B, 1, …]."""
    count = (torch.ones_like(vectors) * mask).flatten(1).sum(1).clamp_min(1)
    return count.view(-1, *[1] * (vectors.ndim - 1))


class Passes:
    """Passes of one batch with perturbed token vectors, all of them with the same dropout.

    Args:
        batch: as the model is trained on it.
        shape: of an image's vectors, if it is known.
    """

    def __init__(self, learner: Learner, batch: Batch, shape: tuple[int, ...] | None = None) -> None:
        self.learner, self.batch, self.shape = learner, batch, shape
        self.device = batch["labels"].device
        self.random = torch.get_rng_state(), torch.cuda.get_rng_state(self.device) if self._on_gpu else None

    @property
    def _on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def zeros(self) -> Tensor:
        """No perturbation, [B, T, D] (of images [B, …], as their patch embedding returns them)."""
        embedding = token_embedding(self.learner.backbone)
        if "input_ids" in self.batch and isinstance(embedding, nn.Embedding):
            return torch.zeros(*self.batch["input_ids"].shape, embedding.embedding_dim, device=self.device)
        if self.shape is None:
            self.shape = shape_of_vectors(self.learner.backbone, self.batch)
        return torch.zeros(len(self.batch["labels"]), *self.shape, device=self.device)

    def mask(self) -> Tensor | float:
        """0 for padding, [B, T, 1]."""
        return real(self.batch)

    def loss(self, perturbation: Tensor) -> Tensor:
        """The task's loss at x + r, as the strategies wrap and replace it."""
        torch.set_rng_state(self.random[0])
        if self.random[1] is not None:
            torch.cuda.set_rng_state(self.random[1], self.device)
        batch = {**self.batch, COLUMN: perturbation}
        output = self.learner(batch)
        loss = self.learner.chain.task_loss(self.learner, batch, output)
        return self.learner.task_loss(batch, output) if loss is None else loss

    def direction(self, perturbation: Tensor) -> Tensor:
        """d(r): of steepest ascent, of length 1 for each sample (0 where the loss does not depend on it)."""
        r = perturbation.detach().requires_grad_()
        # In float16 small gradients vanish without a scaled loss.
        plain = torch.autocast(self.device.type, enabled=False) if is_scaled(self.learner) else nullcontext()
        with torch.enable_grad(), plain:
            loss = self.loss(r)
        (g,) = torch.autograd.grad(loss, r, allow_unused=True) if loss.requires_grad else (None,)
        if g is None:
            raise ClplatformError(
                "the perturbation of the token vectors does not reach the loss: another strategy of "
                f"strategy=[{','.join(self.learner.chain.strategies)}] gives the head features of its own; leave it out"
            )
        g = g * self.mask()
        return g / norms(g).clamp_min(torch.finfo(g.dtype).tiny)


@contextmanager
def perturbed(
    learner: Learner, batch: Batch, shape: tuple[int, ...] | None = None, *, relative: bool = False
) -> Iterator[Passes]:
    """Inside, `Passes` of this batch. What strategies have noted of the pass that is trained on (`forward` may keep what
    `loss` is to use) is there again afterwards."""
    noted = [(s, dict(vars(s))) for s in learner.chain]
    try:
        with add_perturbation(learner.backbone, relative=relative):
            yield Passes(learner, batch, shape)
    finally:
        for strategy, values in noted:
            vars(strategy).update(values)


def norms(perturbation: Tensor) -> Tensor:
    """Euclidean length for each sample, over all its tokens: [B, …] → [B, 1, …]."""
    return perturbation.flatten(1).norm(dim=1).view(-1, *[1] * (perturbation.ndim - 1))


def project(perturbation: Tensor, radius: float) -> Tensor:
    """Π: the nearest perturbation whose length is at most `radius`, for each sample."""
    length = norms(perturbation).clamp_min(torch.finfo(perturbation.dtype).tiny)
    return perturbation * (radius / length).clamp_max(1)


@torch.no_grad()
def shape_of_vectors(backbone: Any, batch: Batch) -> tuple[int, ...]:
    """Shape of what a sample of this batch is inside the backbone, as its token embedding returns it."""
    found: list[Tensor] = []
    embedding = token_embedding(backbone)
    assert embedding is not None
    hook = embedding.register_forward_hook(lambda module, args, output: found.append(first_output(output)))
    try:
        with eval_mode(backbone):
            backbone.forward({name: value[:1] for name, value in batch.items()})  # past the counter of operations
    finally:
        hook.remove()
    return tuple(found[0].shape[1:])


def is_scaled(learner: Any) -> bool:
    """Is the loss scaled, because gradients are of float16?"""
    plugin = getattr(getattr(learner, "_trainer", None), "precision_plugin", None)
    return getattr(plugin, "scaler", None) is not None
