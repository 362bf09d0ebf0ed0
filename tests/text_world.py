"""The tiny world of the conformance suite in text, for tests."""

from clplatform.check.text_world import (  # noqa: F401
    INPUT,
    LENGTH,
    WORDS,
    TinyTextStream,
    make_text_experiment,
    texts,
    tiny_bert,
)
