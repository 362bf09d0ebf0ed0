"""Settings of our pages for a world of a few dozen samples."""

from __future__ import annotations

from typing import Any

SMALL: dict[str, dict[str, Any]] = {
    "replay": {"capacity": 20},
    "a_gem": {"capacity": 20},
    "gem": {"capacity": 20},
    "icarl": {"capacity": 20},
    "bic": {"capacity": 20, "epochs": 5},
    "der": {"capacity": 20},
    "derpp": {"capacity": 20},
    "er_ace": {"capacity": 20},
    "mir": {"capacity": 20, "step": 0.1},
    "gdumb": {"capacity": 20, "epochs": 3},
    "cls_er": {"capacity": 20, "plastic_decay": 0.5, "stable_decay": 0.8, "plastic_rate": 0.9, "stable_rate": 0.7},
    "ema_teacher": {"strength": 1.0, "temperature": 2.0, "decay": 0.5},
    "ewc": {"samples": 16, "strength": 100.0},
    "lora_experts": {"rank": 2},
    "o_lora": {"rank": 2},
    "inf_lora": {"rank": 8, "scale": 8.0},
    "adapters": {"bottleneck": 20},
    "avalanche": {"plugins": [{"replay": {"mem_size": 20}}]},
    "pgd": {"epsilon": 0.5, "step_size": 0.25},  # with more, its four patches may not get started
    "rwalk": {"interval": 7},
    "ranpac": {"size": 50},
    "linear_probe": {"lr": None},
    "seq_star": {"warm_up": 2, "classifier_lr": None},
    "packnet": {"prune": 0.5, "retrain_epochs": 2},
    "ogd": {"samples": 8},
    "der_net": {"capacity": 20, "epochs": 3},
    "hat": {"first": "adapter", "adapter_lr": 0.01},  # position embeddings would swamp words that come later
    "l2p": {"pool": 6, "length": 2, "choose": 2, "features": "backbone", "mask": False, "lr": None},
    "dualprompt": {"g_layers": [1], "g_length": 2, "e_layers": [1], "e_length": 3, "mask": False, "lr": None},
    "coda_prompt": {"layers": [1], "components": 3, "length": 2, "lr": None},
    "progressive_prompts": {"length": 3, "hidden": 8, "lr": None},
}
