"""The supported architectures of Hugging Face, and what their configurations do not say of them: a record for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from springtide.errors import SpringtideError

Scaling = Callable[[Tensor, PreTrainedConfig], Tensor]


def as_it_is(tensor: Tensor, config: PreTrainedConfig) -> Tensor:
    """What most architectures do at both ends of the stack."""
    return tensor


def every(attention: Any) -> bool:
    """What most architectures' layers do."""
    return True


def capped(logits: Tensor, config: PreTrainedConfig) -> Tensor:
    """Gemma's soft cap."""
    cap = config.final_logit_softcapping
    return logits if cap is None else torch.tanh(logits / cap) * cap


@dataclass(frozen=True)
class Architecture:
    """How an architecture differs from a plain stack of layers whose attention we compute.

    Attributes:
        name: as users know it.
        fused: its layers are pre-norm, with a SiLU-gated MLP and rotary embedding in halves, which
            :mod:`springtide.model.fused` runs.
        rotary_by_layer_type: rotary embeddings differ by the type of the layer.
        reread: a sequence that outgrows the trained length is read anew, see :class:`springtide.rows.spec.Rope`.
        embeds: scales the embedding's vectors for the first layer.
        logits: scales the LM head's product.
        rotates: whether a layer, whose attention module it takes, turns queries and keys by their positions.
    """

    name: str
    fused: bool = False
    rotary_by_layer_type: bool = False
    reread: bool = False
    embeds: Scaling = as_it_is
    logits: Scaling = as_it_is
    rotates: Callable[[Any], bool] = every

    @staticmethod
    def of(model_type: str) -> Architecture:
        """The record of a configuration's ``model_type``; raises SpringtideError for one that is not supported."""
        if model_type not in ARCHITECTURES:
            names = ", ".join(architecture.name for architecture in ARCHITECTURES.values())
            raise SpringtideError(f"Architecture '{model_type}' is not supported; supported are {names}.")
        return ARCHITECTURES[model_type]


ARCHITECTURES = {
    "llama": Architecture("Llama", fused=True),
    "qwen2": Architecture("Qwen2", fused=True),
    "qwen3": Architecture("Qwen3", fused=True),
    "qwen3_moe": Architecture("Qwen3-MoE"),
    "mistral": Architecture("Mistral", fused=True),
    "mixtral": Architecture("Mixtral"),
    "phi3": Architecture("Phi-3", reread=True),
    "gemma2": Architecture("Gemma 2", logits=capped),
    "gemma3_text": Architecture("Gemma 3", rotary_by_layer_type=True, logits=capped),
    "granite": Architecture(
        "Granite",
        embeds=lambda vectors, config: vectors * config.embedding_multiplier,
        logits=lambda logits, config: logits / config.logits_scaling,
    ),
    "smollm3": Architecture("SmolLM3", fused=True, rotates=lambda attention: bool(attention.use_rope)),
    "olmo2": Architecture("OLMo 2"),
    "glm4": Architecture("GLM-4"),
    "cohere2": Architecture(
        "Cohere 2",
        logits=lambda logits, config: logits * config.logit_scale,
        rotates=lambda attention: attention.sliding_window is not None,
    ),
    "starcoder2": Architecture("Starcoder 2"),
}
