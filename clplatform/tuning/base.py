"""What is trained of a backbone, whatever the strategy.

A tuning is applied once, to a freshly built backbone and from its structure alone, so that resuming, predicting and loading
build the same again before they load the weights. All else of the backbone is frozen from then on; the head is trained as
always. The frozen part runs in the mode of the whole: its dropout acts on what is trained, as in the methods' papers.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from clplatform.types import InputSpec

# Of a strategy's needs, those that a tuning other than `full` meets.
TUNED = frozenset({"tuning", "mergeable"})


class Tuning:
    """Base of all tunings. Constructor arguments are keyword-only; their defaults live in the YAML page only.

    Class attributes:
        name: of its page.
        mergeable: can what it trains become a part of the weights (`strategy=merge`)?
    """

    name: ClassVar[str]
    mergeable: ClassVar[bool] = False

    def apply(self, backbone: Any, spec: InputSpec) -> None:
        """Freeze the backbone, but for what `add` puts in or marks.

        Args:
            spec: what a sample looks like.

        Raises:
            ClplatformError: it does not fit this backbone.
        """
        backbone.requires_grad_(False)
        for name in getattr(getattr(backbone, "model", None), "drawn_output", ()):  # nobody has trained it yet
            backbone.model.get_parameter(name).requires_grad_(True)
        own = {id(p) for p in backbone.parameters()}
        self.add(backbone, spec)
        for p in backbone.parameters():
            if id(p) not in own:
                p.requires_grad_(True)

    def add(self, backbone: Any, spec: InputSpec) -> None:
        """Put in parameters, which will be trained, or let some of the backbone's own require gradients. By default neither:
        only the head is trained."""


def encoder(backbone: nn.Module) -> Any:
    """The Hugging Face model inside a backbone, without a language model's output layer; a backbone of ours is its own."""
    found: Any = next((m for m in backbone.modules() if hasattr(m, "base_model_prefix")), None)
    return backbone if found is None else found.base_model
