"""What a saved state may name."""

from __future__ import annotations

import warnings

import pytest

from clplatform.types import ClplatformError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of libraries that Avalanche imports
    from avalanche.training.plugins import EWCPlugin

    from clplatform.avalanche_host.decode import Decoder, by_name
    from clplatform.avalanche_host.encode import qualified

pytestmark = pytest.mark.filterwarnings("ignore")  # Avalanche's own


def test_a_class_of_avalanche_is_found_by_its_name() -> None:
    assert by_name(qualified(EWCPlugin)) is EWCPlugin


@pytest.mark.parametrize(
    "name",
    [
        "os:system",
        "avalanche.training.checkpoint:os.system",  # through what a module imports
        "avalanche.training.plugins.ewc:torch.load",
        "avalanche.training.plugins:EWCPlugin",  # not its own module: names are those that were written
        "avalanche.nothing:here",
        "avalanche.training.plugins.ewc:Nothing",
    ],
)
def test_nothing_else_is(name: str) -> None:
    with pytest.raises(ClplatformError, match="cannot be restored"):
        by_name(name)


def test_a_generator_is_made_by_a_generator_function_only() -> None:
    node = {"type": "generator", "number": 0, "function": qualified(EWCPlugin), "arguments": {}}
    with pytest.raises(ClplatformError, match="cannot be restored"):
        Decoder(None).decode(node)  # type: ignore[arg-type]
