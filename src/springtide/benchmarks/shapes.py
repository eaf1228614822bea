"""Models of well-known shapes with random weights, for measuring speed without a download."""

from __future__ import annotations

from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

from springtide.attention.calibration import VERSION
from springtide.attention.tidal import paper
from springtide.engine.engine import Engine
from springtide.errors import SpringtideError
from springtide.rows.spec import ModelSpec

LONGEST = 2**20  # tokens that a random model may be made for

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA: dict[str, Any] = {"model_type": "llama", "num_key_value_heads": 8, "max_position_embeddings": 131072}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-1b": LLAMA
    | {
        "num_hidden_layers": 16,
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "head_dim": 64,
        "intermediate_size": 8192,
        "vocab_size": 32000,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "rms_norm_eps": 1e-5,
    },
    "llama-3b": LLAMA
    | {
        "num_hidden_layers": 28,
        "hidden_size": 3072,
        "num_attention_heads": 24,
        "head_dim": 128,
        "intermediate_size": 8192,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
        "rope_parameters": LLAMA3 | {"factor": 32.0},
        "rms_norm_eps": 1e-5,
    },
    "llama-8b": LLAMA
    | {
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "head_dim": 128,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
        "rope_parameters": LLAMA3 | {"factor": 8.0},
        "rms_norm_eps": 1e-5,
    },
    "qwen3-4b": {
        "model_type": "qwen3",
        "num_hidden_layers": 36,
        "hidden_size": 2560,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 9728,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 40960,
    },
}


def check_shape(shape: str, length: int) -> None:
    """Raise SpringtideError for an unknown shape or a length that no random model is made for."""
    if shape not in SHAPES:
        raise SpringtideError(f"Unknown shape '{shape}': choose one of {', '.join(SHAPES)}.")
    if length > LONGEST:
        raise SpringtideError(f"{length} tokens are too many: a random model holds {LONGEST}; use a shorter --context.")


def random_engine(
    shape: str, length: int, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu"
) -> Engine:
    """An engine for a model of a shape, weights normal with std 0.02 (seed 0), whose context holds ``length`` tokens.

    It is "calibrated" to the paper's layers, scaled to its depth: random weights have no better ones to be found.
    """
    check_shape(shape, length)
    options = dict(SHAPES[shape])
    options["max_position_embeddings"] = max(length, options["max_position_embeddings"])
    config = AutoConfig.for_model(**options, bos_token_id=None, eos_token_id=None)
    with torch.device("meta"):  # transformers' own initialisation would take minutes
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.to_empty(device=device)
    model.tie_weights()
    # Its frequencies are no parameters, so that they were lost with the meta device.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)
    generator = torch.Generator(device).manual_seed(0)
    parameters = list(model.parameters())
    with torch.no_grad():
        for weight in tqdm(parameters, desc="random weights", leave=False, disable=None, delay=2):
            if weight.ndim == 1:
                weight.fill_(1.0)
            else:
                weight.normal_(std=0.02, generator=generator)
    calibration = {"version": VERSION, "tidal": paper(ModelSpec.of(config))}
    return Engine(model, calibration=calibration)
