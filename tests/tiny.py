"""Tiny random models of every supported architecture."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

BASE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 2,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
}
MIXED = ["sliding_attention", "full_attention"]  # by turns
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
    "qwen2": {"use_sliding_window": True, "sliding_window": 9, "layer_types": MIXED},
    "qwen3": {},
    "qwen3_moe": {"num_experts": 4, "norm_topk_prob": True, **MOE},
    "mistral": {"sliding_window": 9},
    "mixtral": {"num_local_experts": 4, "sliding_window": None, **MOE},
    "phi3": {"sliding_window": 9},
    "gemma2": {"sliding_window": 9, "layer_types": MIXED, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0},
    "gemma3_text": {"sliding_window": 9, "layer_types": MIXED, "query_pre_attn_scalar": 16},
    "granite": {
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
    },
    "smollm3": {"no_rope_layers": [1, 1, 1, 0]},
    "olmo2": {},
    "glm4": {"partial_rotary_factor": 0.5},
    "cohere2": {"sliding_window": 9, "layer_types": MIXED, "logit_scale": 0.5},
    "starcoder2": {"sliding_window": 9},
}


@cache
def tiny(name: str = "qwen3", dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    """A model with random weights (4 layers), always the same for the same arguments."""
    torch.manual_seed(0)
    options = {**BASE, **ARCHITECTURES[name], **overrides}
    if "layer_types" in options:
        options["layer_types"] = [MIXED[layer % 2] for layer in range(options["num_hidden_layers"])]
    config = AutoConfig.for_model(name, **options)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def random_tokens(length: int, seed: int = 0, vocab: int = 97) -> list[int]:
    """Token ids that are no special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocab, (length,), generator=generator).tolist()
