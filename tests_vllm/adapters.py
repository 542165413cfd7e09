"""LoRA adapters of the default model that change its answers, without having been trained."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

RANK = 8
#: Of the weights: enough to change the answer, not enough to make it noise.
SCALE = 0.1
_TARGETS = ("q_proj", "v_proj")


def write_adapter(model: Path, output: Path, seed: int) -> None:
    """A random adapter for ``model`` in PEFT's format; other seeds, other answers."""
    config = json.loads((model / "config.json").read_text())
    hidden, head = config["hidden_size"], config["head_dim"]
    widths = {
        "q_proj": config["num_attention_heads"] * head,
        "v_proj": config["num_key_value_heads"] * head,
    }
    random = np.random.default_rng(seed)
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        for target in _TARGETS:
            name = f"base_model.model.model.layers.{layer}.self_attn.{target}"
            shape_a, shape_b = (RANK, hidden), (widths[target], RANK)
            for part, shape in ("A", shape_a), ("B", shape_b):
                values = random.normal(0.0, SCALE, shape).astype(np.float32)
                weights[f"{name}.lora_{part}.weight"] = values
    output.mkdir()
    save_file(weights, output / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.name,
        "r": RANK,
        "lora_alpha": RANK,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(_TARGETS),
    }
    (output / "adapter_config.json").write_text(json.dumps(settings))
