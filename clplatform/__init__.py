"""clplatform: continual-learning experiments. `load(run).predict(...)` uses what a run has learned, `update(run, data)` teaches it
more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clplatform.saved import load as load
    from clplatform.updating import update as update

__version__ = "0.1.0"
__all__ = ["__version__", "load", "update"]


def __getattr__(name: str) -> Any:
    # Lazy: `clplatform --help`, `list` and `report` must not pay for importing torch.
    if name == "load":
        from clplatform.saved import load

        return load
    if name == "update":
        from clplatform.updating import update

        return update
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
