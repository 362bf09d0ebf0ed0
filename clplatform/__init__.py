"""clplatform: continual-learning experiments. `load(run).predict(...)` uses what a run has learned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clplatform.saved import load as load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    # Lazy: `clplatform --help`, `list` and `report` must not pay for importing torch.
    if name == "load":
        from clplatform.saved import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
