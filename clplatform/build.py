"""From a checked configuration to objects."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate

from clplatform.config import EXTRA
from clplatform.data import derive_seed
from clplatform.fitting import Fitter
from clplatform.learner import Learner
from clplatform.strategy.base import Chain, Strategy
from clplatform.types import ClplatformError, Stream, StreamInfo


def build_stream(config: dict[str, Any], tokenizer: Any = None) -> Stream:
    """The stream, tokenized for the backbone if it is text."""
    node = {k: v for k, v in config["stream"].items() if k not in EXTRA["stream"]}
    return instantiate(node, tokenizer=tokenizer, _convert_="all") if is_text(node) else instantiate(node, _convert_="all")


def is_text(node: dict[str, Any]) -> bool:
    """Does this stream take a tokenizer?"""
    import inspect

    from hydra.utils import get_object

    return "tokenizer" in inspect.signature(get_object(node["_target_"])).parameters


def build_strategies(config: dict[str, Any]) -> Chain:
    """The chain of strategies, in the order typed.

    Raises:
        ClplatformError: they cannot be combined.
    """
    strategies: dict[str, Strategy] = {
        name: instantiate(node, _convert_="all") for name, node in config["strategy"].items()
    }
    try:
        return Chain(strategies)
    except ValueError as error:
        raise ClplatformError(f"strategy={list(strategies)}: {error}") from None


def check_needs(chain: Chain, info: StreamInfo, config: dict[str, Any]) -> None:
    """Does every strategy find what it needs in this stream and backbone?"""
    backbone = config["backbone"]["name"]
    offered = {
        "task_ids": (info.task_ids, "hides task ids at inference", "choose stream.scenario=task_incremental"),
        "boundaries": (info.boundaries, "has no task boundaries", "choose a stream with boundaries"),
        "pretrained": (
            bool(config["backbone"].get("pretrained")),
            f"is learned by backbone={backbone}, which is not pretrained",
            "choose a pretrained backbone or give backbone.pretrained=<folder>",
        ),
        "transformer": (
            backbone != "mlp",
            f"is learned by backbone={backbone}, which is no Transformer",
            "choose a Transformer backbone, such as vit_tiny",
        ),
    }
    for name, strategy in chain.strategies.items():
        for need in sorted(strategy.needs & set(offered)):
            present, problem, remedy = offered[need]
            if not present:
                what = need.replace("_", " ")
                raise ClplatformError(
                    f"strategy={name} needs {what}, but stream={info.name} ({info.scenario}) {problem}; {remedy}"
                )


def build_learner(
    config: dict[str, Any], info: StreamInfo, chain: Chain, *, augment: Any = None, assets: Path | None = None
) -> Learner:
    """The untrained model with its strategies.

    Args:
        assets: folder of a saved model: the backbone is built from what is there, without the original weights.
    """
    torch.manual_seed(derive_seed(config["seed"], "initial weights"))
    given: dict[str, Any] = {"input": info.input}
    if assets is not None:
        given |= {"load_weights": False, "assets": assets}
    backbone = instantiate(config["backbone"], **given, _convert_="all")
    make_head = partial(instantiate, config["head"], feature_size=backbone.feature_size, _convert_="all")
    return Learner(
        backbone=backbone,
        make_head=make_head,
        chain=chain,
        info=info,
        optimizer=instantiate(config["optimizer"], _convert_="all"),
        schedule=instantiate(config["scheduler"], _convert_="all"),
        augment=augment,
        label_smoothing=config["label_smoothing"],
        batch_size=config["batch_size"],
    )


def build_fitter(config: dict[str, Any]) -> Fitter:
    return Fitter(
        trainer=config["trainer"],
        batch_size=config["batch_size"],
        eval_batch_size=config["eval_batch_size"],
        num_workers=config["num_workers"],
        patience=config["early_stopping"],
        checkpoint_every=config["checkpoint"]["every_n_batches"],
        checkpoint_minutes=config["checkpoint"]["every_minutes"],
    )
