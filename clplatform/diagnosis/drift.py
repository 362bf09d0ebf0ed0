"""How far the representation of each experience has moved since it was learned, layer by layer.

By similarity (`cka`), and by what a linear probe can still read: a probe is trained on the experience's training features of a
layer and tested on its test features, with the model of then and with the final one. The difference is the forgetting of the
representation (Davari et al. 2022), whatever the head does.
"""

from __future__ import annotations

from typing import Any

import torch

from clplatform.diagnosis.cka import linear_cka, unbiased_cka
from clplatform.diagnosis.layers import Reading
from clplatform.diagnosis.probes import balanced, fit_probe

MOST = 1000  # samples of a CKA: its cost grows with their square


def similarity(then: Reading, final: Reading) -> dict[str, dict[str, float | None]]:
    """CKA of every layer that both have, between the features of the same samples: `linear` and `unbiased`."""
    rows = torch.arange(len(final.labels))[:MOST] if len(final.labels) > MOST else slice(None)
    return {
        name: {
            "linear": linear_cka(then.layers[name][rows], state[rows]),
            "unbiased": unbiased_cka(then.layers[name][rows], state[rows]),
        }
        for name, state in final.layers.items()
        if name in then.layers
    }


def probe_layers(train: Reading, test: Reading) -> dict[str, float | None]:
    """Test accuracy of a probe on every layer, among the classes of these samples; empty where there is one class only."""
    classes, labels = train.labels.unique(return_inverse=True)
    if len(classes) < 2:
        return {}
    known = torch.isin(test.labels, classes)
    wanted = torch.searchsorted(classes, test.labels[known])
    found: dict[str, float | None] = {}
    for name, state in train.layers.items():
        probe = fit_probe(state, labels, len(classes), weights=balanced(labels))
        found[name] = probe.accuracy(test.layers[name][known], wanted)
    return found


def table(rows: list[dict[str, Any] | None], names: list[str]) -> list[list[Any]]:
    """[layer][experience] of what was found for each experience (None: nothing)."""
    return [[None if row is None else row.get(name) for row in rows] for name in names]
