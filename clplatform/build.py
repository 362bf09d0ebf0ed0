"""From a checked configuration to objects."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from clplatform.budget import build_budget
from clplatform.config import EXTRA, is_full
from clplatform.data import derive_seed
from clplatform.fitting import Fitter
from clplatform.head.linear import LinearHead
from clplatform.head.span import SpanHead
from clplatform.head.vocabulary import VocabularyHead
from clplatform.learner import Learner
from clplatform.machine import check_device
from clplatform.signature import OURS, find
from clplatform.strategy.base import Chain, Strategy
from clplatform.stream.blurry import blurry
from clplatform.stream.extend import extend, remembered
from clplatform.tuning.base import TUNED, Tuning
from clplatform.tuning.full import Full
from clplatform.types import ClplatformError, Experience, Stream, StreamInfo

# Families whose strategies put parts into the backbone, copy it, or mask its weights.
OWN_STRUCTURE = frozenset({"expansion", "isolation", "prompt"})


def make(node: dict[str, Any], **given: Any) -> Any:
    """Call a node's `_target_` with its values and what the platform gives; nested nodes first, unless the node says
    `_recursive_: false`.

    Unlike Hydra's `instantiate` it passes objects through as they are and lets exceptions through.
    """
    target = find(node["_target_"])
    nested = make_nested if node.get("_recursive_", True) else _as_it_is
    values = {k: nested(v) for k, v in node.items() if k not in OURS} | given
    return partial(target, **values) if node.get("_partial_") else target(**values)


def make_nested(value: Any) -> Any:
    if isinstance(value, dict) and "_target_" in value:
        return make(value)
    if isinstance(value, list):
        return [make_nested(v) for v in value]
    return value


def _as_it_is(value: Any) -> Any:
    return value


def build_tokenizer(config: dict[str, Any]) -> Any:
    """The tokenizer of the configuration, or the pretrained backbone's; None where there is none (the stream then trains its
    own).

    Raises:
        ClplatformError: it cannot be had; one is chosen that the stream or the backbone has no use for.
    """
    if own := config.get("tokenizer"):
        return _own_tokenizer(own, config)
    if not takes_tokenizer(config["stream"]):
        return None
    if getattr(find(config["backbone"]["_target_"]), "reads", "input_ids") != "input_ids":
        return None  # an image model, which will refuse the stream when it is built
    from clplatform.backbone.pretrained import decoder_start, tokenizer_source
    from clplatform.stream.tokenizer import load_tokenizer

    source = tokenizer_source(config["backbone"])
    if not source:
        return None
    tokenizer: Any = load_tokenizer(source)
    tokenizer.decoder_start = decoder_start(source, config["backbone"].get("config") or {})
    tokenizer.origin = f"the backbone's own tokenizer, with {len(tokenizer)} tokens"
    return tokenizer


def _own_tokenizer(source: str, config: dict[str, Any]) -> Any:
    if not takes_tokenizer(config["stream"]):
        raise ClplatformError(f"tokenizer={source}: stream={config['stream']['name']} has no text; leave it null")
    if (pretrained := config["backbone"].get("pretrained")) is not None:
        raise ClplatformError(
            f"tokenizer={source}: backbone={config['backbone']['name']} (pretrained={pretrained}) has a tokenizer, whose tokens "
            "its weights know; leave it null"
        )
    from clplatform.stream.own_tokenizer import own_tokenizer

    tokenizer, tokenizer.origin = own_tokenizer(source, config["stream"])
    return tokenizer


def build_stream(config: dict[str, Any], tokenizer: Any = None) -> Stream:
    """The stream; a text stream is tokenized for the backbone. What a run was updated with comes after its own experiences."""
    if (folder := config.get("remembered")) is not None:
        stream = remembered(Path(folder), pretrained=config["backbone"].get("pretrained") is not None)
    else:
        node = without_extra(config, "stream")
        try:
            stream = make(node, **({"tokenizer": tokenizer} if takes_tokenizer(node) else {}))
        except ClplatformError as error:
            if not config.get("updates"):
                raise
            raise ClplatformError(
                f"{error} (what the run has learned: paths are from where it was made; where these data are gone, "
                "`clplatform update --without-earlier-data`)"
            ) from None
        if note := getattr(tokenizer, "origin", None):
            stream.notes.append(note)
        if (share := config["stream"].get("blurry")) is not None:
            stream = blurry(stream, share, node.get("seed"))
    for update in config.get("updates", []):
        given = {"tokenizer": stream.tokenizer} if takes_tokenizer(update) else {}
        stream = extend(stream, make(update, **given))
    return stream


def without_extra(config: dict[str, Any], group: str) -> dict[str, Any]:
    """A group's node without the keys that are for other parts of the configuration."""
    return {k: v for k, v in config[group].items() if k not in EXTRA[group]}


def takes_tokenizer(node: dict[str, Any]) -> bool:
    return "tokenizer" in inspect.signature(find(node["_target_"])).parameters


def build_strategies(config: dict[str, Any]) -> Chain:
    """The chain of strategies, in the order typed.

    Raises:
        ClplatformError: one cannot be built, or they cannot be combined.
    """
    strategies = {name: build_strategy(name, node) for name, node in config["strategy"].items()}
    chosen = f"strategy=[{','.join(strategies)}]"
    try:
        chain = Chain(strategies)
    except ValueError as error:
        raise ClplatformError(f"{chosen}: {error}") from None
    bounds = [name for name, s in strategies.items() if "past_data" in s.needs]
    if len(bounds) > 1:
        raise ClplatformError(f"{chosen}: {' and '.join(bounds)} cannot be combined: each adds all earlier data")
    return chain


def build_strategy(name: str, node: dict[str, Any]) -> Strategy:
    """One strategy from its page."""
    if "device" in node:
        check_device(f"strategy.{name}.device", node["device"])
    try:
        strategy = make(node)
    except ValueError as error:
        raise ClplatformError(f"strategy.{name}: {error}") from error
    if not hasattr(strategy, "extend_batch"):
        raise ClplatformError(
            f"strategy.{name}._target_={node['_target_']}: not a strategy; derive it from "
            "clplatform.strategy.base.Strategy"
        )
    return strategy


def check_needs(chain: Chain, info: StreamInfo, config: dict[str, Any]) -> None:
    """Does every strategy find what it needs in this stream and backbone?"""
    stream, backbone = f"stream={info.name} ({info.scenario})", f"backbone={config['backbone']['name']}"
    tuning = build_tuning(config)
    perceptron = str(config["backbone"].get("_target_")).startswith("clplatform.backbone.mlp.")
    offered = {
        "task_ids": (
            info.task_ids,
            "task ids",
            f"{stream} hides them at inference; choose stream.scenario=task_incremental",
        ),
        "boundaries": (info.boundaries, "task boundaries", f"{stream} has none; leave stream.blurry=null"),
        "past_data": (
            config.get("remembered") is None,
            "the data of all earlier experiences",
            "the run was updated without them",
        ),
        "pretrained": (
            bool(config["backbone"].get("pretrained")),
            "a pretrained backbone",
            f"{backbone} has random weights; choose another or give backbone.pretrained=<folder>",
        ),
        "transformer": (
            not perceptron,
            "a Transformer",
            f"{backbone} is none; choose a Transformer backbone, such as vit_tiny",
        ),
        "decoder": (
            "causal_lm" in getattr(find(config["backbone"]["_target_"]), "problems", ()),
            "a decoder",
            f"{backbone} is none; choose a causal language model, such as transformer_decoder",
        ),
        "tuning": (
            not is_full(config),
            "a tuning",
            "tuning=full trains all of the backbone; choose another, such as tuning=lora",
        ),
        "mergeable": (
            tuning.mergeable,
            "a tuning that can be merged into weights",
            f"tuning={tuning.name} cannot; choose tuning=lora, dora or ia3",
        ),
    }
    for name, strategy in chain.strategies.items():
        if info.problem not in strategy.problems:
            raise ClplatformError(
                f"strategy={name} learns {' and '.join(sorted(strategy.problems))}, and stream={info.name} is "
                f"{info.problem}; `clplatform list strategies` says what each can learn"
            )
    head = find(config["head"]["_target_"])
    wanted = {f"strategy={name}": s.needs for name, s in chain.strategies.items()}
    wanted[f"head={head.__module__.rpartition('.')[2]}"] = getattr(head, "needs", frozenset())
    for who, needs in wanted.items():
        for need in sorted(needs & set(offered)):
            present, what, problem = offered[need]
            if not present:
                raise ClplatformError(f"{who} needs {what}, but {problem}")


def build_tuning(config: dict[str, Any]) -> Tuning:
    """What is trained of the backbone; a configuration of before there was a choice has all of it trained."""
    if config.get("tuning") is None:
        return Full()
    tuning = make(without_extra(config, "tuning"))
    if not hasattr(tuning, "add"):
        raise ClplatformError(
            f"tuning._target_={config['tuning']['_target_']}: not a tuning; derive it from clplatform.tuning.base.Tuning"
        )
    return tuning


def check_tuning(config: dict[str, Any], chain: Chain) -> None:
    """Only one may say what is trained of the backbone.

    Raises:
        ClplatformError: a strategy, or `backbone.freeze`, says so too.
    """
    if is_full(config):
        return
    chosen = f"tuning={build_tuning(config).name}"
    freeze = config["backbone"].get("freeze", "none")
    if freeze != "none":
        raise ClplatformError(f"backbone.freeze={freeze}: {chosen} freezes the backbone already; leave it at none")
    for name, strategy in chain.strategies.items():
        if strategy.family in OWN_STRUCTURE and not strategy.needs & TUNED:
            raise ClplatformError(
                f"strategy={name} ({strategy.family}) has parts, copies or masks of its own and says itself what is trained: "
                f"it cannot be combined with {chosen}; leave tuning=full"
            )


def tuning_notes(config: dict[str, Any]) -> list[str]:
    """What a run's record should say about its tuning."""
    if is_full(config) or config["backbone"].get("pretrained"):
        return []
    name = build_tuning(config).name
    return [f"tuning={name} keeps the backbone's weights, which are random: it is meant for pretrained ones"]


def check_capacity(chain: Chain, info: StreamInfo) -> None:
    """A memory must have room for a sample of every class."""
    n_classes = len(info.class_names)
    for name, strategy in chain.strategies.items():
        capacity = getattr(getattr(strategy, "buffer", None), "capacity", None)
        if capacity is not None and capacity < n_classes:
            raise ClplatformError(
                f"strategy.{name}.capacity={capacity} is smaller than the {n_classes} classes of stream={info.name}; "
                f"give it {n_classes} or more"
            )


def check_validation(config: dict[str, Any], experiences: Iterable[Experience]) -> None:
    """Early stopping looks at the validation split: there must be one in every experience that is to be learned."""
    patience = config["early_stopping"]
    if patience is None:
        return
    lacking = [e.name for e in experiences if e.validation is None]
    if lacking:
        raise ClplatformError(
            f"early_stopping={patience} needs a validation split, which the experience {lacking[0]!r} lacks; "
            "give stream.validation_fraction=0.1, or early_stopping=null"
        )
    if config["trainer"].get("limit_val_batches", 1) == 0:
        raise ClplatformError(f"early_stopping={patience} needs validation: leave out trainer.limit_val_batches=0")


def check_optimizer(config: dict[str, Any]) -> None:
    """Let the optimizer look at its settings before anything is trained.

    Raises:
        ClplatformError: it refuses them.
    """
    try:
        make(config["optimizer"])([torch.zeros(1, requires_grad=True)])
    except (ValueError, TypeError) as error:
        raise ClplatformError(f"optimizer: {error}; see optimizer.* in `clplatform --cfg job`") from None


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
    node = without_extra(config, "backbone")
    target = find(node["_target_"])
    check_problem(config, target, info)
    if "problem" in inspect.signature(target).parameters:
        given["problem"] = info.problem
    backbone = make(node, **given)
    build_tuning(config).apply(backbone, info.input)
    make_head: Any = VocabularyHead
    if info.problem == "question_answering":
        make_head = partial(SpanHead, feature_size=backbone.feature_size)
    elif not info.predicts_text:
        make_head = partial(make, config["head"], feature_size=backbone.feature_size)
    return Learner(
        backbone=backbone,
        make_head=make_head,
        chain=chain,
        info=info,
        optimizer=make(config["optimizer"]),
        schedule=make(config["scheduler"]),
        augment=augment,
        label_smoothing=config["label_smoothing"],
        batch_size=config["batch_size"],
    )


def check_problem(config: dict[str, Any], backbone: Any, info: StreamInfo) -> None:
    """Can this backbone, with this head, learn the stream's problem?"""
    problems = getattr(backbone, "problems", frozenset({"classification"}))
    name = config["backbone"]["name"]
    if info.problem not in problems:
        raise ClplatformError(
            f"stream={info.name} is {info.problem}, and backbone={name} learns {' and '.join(sorted(problems))}; "
            f"choose one of those that `clplatform list backbones` shows for {info.problem}"
        )
    head = find(config["head"]["_target_"])
    if not info.has_classes and head is not LinearHead:
        what = (
            "a language model has an output layer of its own" if info.predicts_text else "a span has a head of its own"
        )
        raise ClplatformError(f"head={head.__module__.rpartition('.')[2]}: {what}; leave head=single")


def build_fitter(config: dict[str, Any]) -> Fitter:
    return Fitter(
        trainer=config["trainer"],
        batch_size=config["batch_size"],
        eval_batch_size=config["eval_batch_size"],
        num_workers=config["num_workers"],
        bucket=config.get("bucket_by_length", False),
        patience=config["early_stopping"],
        checkpoint_every=config["checkpoint"]["every_n_batches"],
        checkpoint_minutes=config["checkpoint"]["every_minutes"],
        budget=build_budget(config),
    )
