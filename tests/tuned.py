"""Every tuning of `conf/tuning/`, made from its page with sizes for small encoders, and tuned backbones of the tiny worlds."""

from __future__ import annotations

from typing import Any

import torch
import yaml
from encoders import IMAGES, TEXTS, image_encoder, images, text_encoder, texts
from text_world import INPUT, TinyTextStream, make_text_experiment, tiny_bert
from world import TinyStream, make_experiment, tiny_vit

from clplatform.build import make
from clplatform.config import EXTRA, conf_dir
from clplatform.tuning.base import Tuning

SIZES: dict[str, dict[str, Any]] = {
    "lora": {"rank": 2}, "dora": {"rank": 2}, "adapter": {"bottleneck": 4}, "prompt": {"length": 3}, "prefix": {"length": 2},
    "p_tuning": {"length": 3, "hidden": 8},
}  # fmt: skip
# What the names of trained parameters have in them, and no others have.
MARKS = {
    "lora": "lora_", "dora": "lora_", "ia3": "ia3_l", "adapter": "adapters.", "prompt": "soft_prompt", "prefix": "prefix.",
    "bitfit": "bias", "p_tuning": "soft_prompt.encoder.",
}  # fmt: skip
EXACT = ["adapter", "bitfit", "dora", "ia3", "lora"]  # change nothing at the start
NAMES = sorted({path.stem for path in (conf_dir() / "tuning").glob("*.yaml")} - {"full"})
WORLDS = {"vit": (TinyStream, make_experiment), "bert": (TinyTextStream, make_text_experiment)}


def from_page(name: str, **changes: Any) -> Tuning:
    """The tuning of this page, with some values changed."""
    node = yaml.safe_load((conf_dir() / "tuning" / f"{name}.yaml").read_text())
    own = {key: value for key, value in node.items() if key not in EXTRA["tuning"]}
    return make({**own, **SIZES.get(name, {}), **changes})


def encoder(kind: str, name: str | None = None, **changes: Any) -> tuple[Any, Any]:
    """A backbone of three layers, in eval mode, tuned if a tuning is named; and five samples for it."""
    image = kind == "vit"
    backbone = image_encoder() if image else text_encoder(kind)
    if name is not None:
        torch.manual_seed(5)
        from_page(name, **changes).apply(backbone, IMAGES if image else TEXTS)
    return backbone, {"pixel_values": images(5)} if image else texts((4, 12, 1, 7, 5))


def tiny(kind: str, name: str, **changes: Any) -> Any:
    """The tiny world's Transformer, tuned."""
    backbone = tiny_vit() if kind == "vit" else tiny_bert()
    spec = TinyStream().info.input if kind == "vit" else INPUT
    torch.manual_seed(5)
    from_page(name, **changes).apply(backbone, spec)
    return backbone


def tiny_experiment(folder: Any, kind: str, name: str, strategies: dict[str, Any], **options: Any) -> Any:
    """An experiment of the tiny world with a tuned Transformer."""
    stream, make_it = WORLDS[kind]
    experiment: Any = make_it(folder, strategies, stream=stream(), **options)
    experiment.learner.backbone = tiny(kind, name)
    experiment.learner.flops.watch(experiment.learner.backbone)
    return experiment


def trained_names(backbone: Any) -> set[str]:
    return {name for name, p in backbone.named_parameters() if p.requires_grad}


def shake(backbone: Any, seed: int = 7, scale: float = 0.3) -> None:
    """Move all that is trained, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in backbone.parameters():
            if p.requires_grad:
                p.add_(scale * torch.randn(p.shape, generator=generator))
