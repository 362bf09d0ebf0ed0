"""A generator for Avalanche's generative replay (Shin et al. 2017), as its strategy `GenerativeReplay` makes one."""

from __future__ import annotations

from avalanche.logging import BaseLogger
from avalanche.models.generator import MlpVAE, VAE_loss
from avalanche.training.plugins import EvaluationPlugin, GenerativeReplayPlugin
from avalanche.training.supervised.strategy_wrappers import VAETraining
from torch import nn
from torch.optim import Adam


def vae(
    *,
    shape: list[int],
    latent: int = 2,
    lr: float = 0.01,
    weight_decay: float = 0.0001,
    epochs: int = 1,
    batch_size: int = 32,
    replay_size: int | None = None,
    device: str = "cpu",
) -> VAETraining:
    """A variational autoencoder of images in 0 … 1 with its own training, which replays what it has generated before.

    Args:
        shape: channels, height, width.
        latent: size of the code.
        lr, weight_decay: of Adam.
        epochs, batch_size: of its training on each experience.
        replay_size: generated samples in each of its batches; None: as many as the batch has.
    """
    model = MlpVAE(tuple(shape), nhid=latent, device=device)
    # Avalanche normalises what is generated as MNIST; images here are in 0 … 1.
    model.decoder.invTrans = nn.Identity()  # type: ignore[assignment]
    return VAETraining(
        model=model,
        optimizer=Adam(model.parameters(), lr=lr, weight_decay=weight_decay),
        criterion=VAE_loss,
        train_mb_size=batch_size,
        train_epochs=epochs,
        eval_mb_size=batch_size,
        device=device,
        plugins=[GenerativeReplayPlugin(replay_size=replay_size)],
        evaluator=EvaluationPlugin(loggers=[BaseLogger()]),
    )
