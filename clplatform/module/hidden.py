"""The hidden states of a backbone: what passes from one of its blocks to the next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def linear_blocks(backbone: Any) -> list[nn.Linear] | None:
    """The layers of a perceptron: of a backbone whose blocks have one linear layer each, which hold all its parameters.
    None: it is another."""
    blocks = [
        [m for m in b.modules() if next(m.parameters(recurse=False), None) is not None] for b in backbone.blocks()
    ]
    linears = [held[0] for held in blocks if len(held) == 1 and isinstance(held[0], nn.Linear)]
    n_inside = sum(p.numel() for linear in linears for p in linear.parameters())
    whole = len(linears) == len(blocks) and n_inside == sum(p.numel() for p in backbone.parameters())
    return linears if whole else None


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden state that a block is given: its first argument, by whatever name."""
    return args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor))


def with_first_input(
    args: tuple[Any, ...], kwargs: dict[str, Any], state: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a block is given, with another hidden state."""
    if args:
        return (state, *args[1:]), kwargs
    name = next(n for n, v in kwargs.items() if isinstance(v, Tensor))
    return args, {**kwargs, name: state}


def first_output(output: Any) -> Tensor:
    """The hidden state that a block returns, alone or first in a tuple."""
    return output[0] if isinstance(output, tuple) else output


def with_first_output(output: Any, state: Tensor) -> Any:
    """What a block returns, with another hidden state."""
    return (state, *output[1:]) if isinstance(output, tuple) else state


@contextmanager
def capture(blocks: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Inside, a forward pass leaves its hidden states in the list: the input of every block but the first, and the output
    of the last. One tensor for each block, [B, D] or [B, tokens, D]; a second pass adds its own.

    (The first block of a Transformer is a list of embeddings, which is never called as a whole.)
    """
    states: list[Tensor] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.append(first_input(args, kwargs))

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        states.append(first_output(output))

    hooks = [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks[1:]]
    hooks.append(blocks[-1].register_forward_hook(after))
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()
