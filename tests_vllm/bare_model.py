"""As much of a model as vLLM needs for its configuration: there is nothing to compute."""

from __future__ import annotations

import json
from pathlib import Path

MAX_MODEL_LEN = 4096


def write_model(directory: Path) -> Path:
    """A small Llama without weights; ``directory`` must be there."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": MAX_MODEL_LEN,
        "vocab_size": 50_000,
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory
