"""The tiny world of the conformance suite, for tests."""

from clplatform.check.world import (  # noqa: F401
    DIM,
    TinyBackbone,
    TinyHead,
    TinyStream,
    make_experiment,
    make_learner,
    same,
    tiny_vit,
    weights,
)
