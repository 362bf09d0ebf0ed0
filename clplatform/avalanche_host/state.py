"""The whole state of hosted plugins: what is saved, what cannot be, and what it costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from clplatform.avalanche_host.decode import Decoder, tail_of
from clplatform.avalanche_host.encode import PLAIN, Encoder, modes, set_modes
from clplatform.types import ClplatformError

if TYPE_CHECKING:
    from clplatform.avalanche_host.facade import HostedStrategy


def state_of(hosted: HostedStrategy) -> dict[str, Any]:
    """All that plugins have changed, in themselves and around them."""
    encoder, model = Encoder(hosted), hosted.model
    names = {id(p): n for n, p in model.named_parameters()}
    state = {
        **around(encoder),
        "attributes": encoder.fields(model.attributes(), "model"),
        "modes": modes(model),
        "groups": {i: described(group, names) for i, group in enumerate(hosted.optimizer.param_groups)},
    }
    if not hosted.reset_optimizer:
        state["optimizer"] = hosted.optimizer.state_dict()["state"]
    return {**state, "unsaved": dict(enumerate(encoder.unsaved))}


def around(encoder: Encoder) -> dict[str, Any]:
    """Plugins, and what they have put in place of ours."""
    hosted = encoder.hosted
    return {
        "tail": encoder.encode(list(hosted.model.tail.children()), "model.tail"),
        "plugins": encoder.encode(hosted.plugins, "plugins"),
        "criterion": encoder.encode(hosted._criterion, "criterion"),
        "eval_classifier": encoder.encode(hosted.model.eval_classifier, "eval_classifier"),
    }


def put_around(decoder: Decoder, state: dict[str, Any]) -> None:
    """Inverse of `around`."""
    hosted, model = decoder.hosted, decoder.hosted.model
    model.tail = tail_of(decoder.decode(state["tail"]))
    decoder.decode(state["plugins"], hosted.plugins)
    hosted._criterion = decoder.decode(state["criterion"], hosted._criterion)
    model.eval_classifier = decoder.decode(state["eval_classifier"], model.eval_classifier)


def restore(hosted: HostedStrategy, state: dict[str, Any]) -> None:
    """Inverse of `state_of`, with the learner's weights in place.

    Raises:
        ClplatformError: a plugin held what could not be saved.
    """
    if state["unsaved"]:
        raise ClplatformError(
            f"strategy.avalanche: {', '.join(state['unsaved'].values())} cannot be saved, so this run cannot go on; "
            "start it anew"
        )
    decoder, model = Decoder(hosted), hosted.model
    hosted.device = hosted.learner.device
    model.follow()
    put_around(decoder, state)
    for name, value in state["attributes"].items():
        vars(model)[name] = decoder.decode(value, vars(model).get(name))
    set_modes(model, state["modes"])
    named = dict(model.named_parameters())
    for group, saved in zip(hosted.optimizer.param_groups, state["groups"].values(), strict=True):
        group.update(saved["settings"], params=[named[name] for name in saved["parameters"].values()])
    hosted.optimized_param_id = {n: named[n] for g in state["groups"].values() for n in g["parameters"].values()}
    if "optimizer" in state:
        hosted.optimizer.load_state_dict({**hosted.optimizer.state_dict(), "state": state["optimizer"]})


def described(group: dict[str, Any], names: dict[int, str]) -> dict[str, Any]:
    """A group of an optimizer's parameters: its settings, and its parameters by name."""
    settings = {k: v for k, v in group.items() if k != "params" and isinstance(v, (*PLAIN, tuple))}
    return {"settings": settings, "parameters": {i: names[id(p)] for i, p in enumerate(group["params"])}}


def unsaved(hosted: HostedStrategy) -> list[str]:
    """Paths of what cannot be saved now."""
    encoder = Encoder(hosted, samples=False)
    encoder.encode(hosted.plugins, "plugins")
    return encoder.unsaved


def cost(hosted: HostedStrategy) -> dict[str, int | float]:
    """Numbers that plugins hold beside the model, and samples that they store."""
    total = {"extra_parameters": 0, "stored_samples": 0}

    def count(node: Any) -> None:
        if isinstance(node, Tensor):
            total["extra_parameters"] += node.numel() if node.is_floating_point() else 0
        elif isinstance(node, dict) and node.get("type") not in ("loader", "generator"):  # views of what is stored
            if node.get("type") == "dataset":
                total["stored_samples"] += node["size"]
            for name, value in node.items():
                if name != "_buffer_weights":  # a place in a memory, as its samples
                    count(value)

    count(Encoder(hosted, samples=False).encode(hosted.plugins, "plugins"))
    return {name: value for name, value in total.items() if value}
