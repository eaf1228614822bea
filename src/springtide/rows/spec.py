"""What policies and drafters need to know of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig


@dataclass(frozen=True)
class ModelSpec:
    """``windows[l]`` is layer ``l``'s sliding window in tokens, or None where it attends to everything.

    ``calibration`` is the content of the ``springtide.json`` beside the model, if there is one.
    """

    num_layers: int
    windows: tuple[int | None, ...]
    vocab_size: int
    context_limit: int
    hidden_size: int = 0
    kv_heads: int = 0
    calibration: dict[str, Any] | None = None

    @classmethod
    def of(cls, config: PretrainedConfig, calibration: dict[str, Any] | None = None) -> ModelSpec:
        """Read it from a Hugging Face configuration."""
        return cls(
            num_layers=config.num_hidden_layers,
            windows=_windows(config),
            vocab_size=config.vocab_size,
            context_limit=config.max_position_embeddings,
            hidden_size=config.hidden_size,
            kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            calibration=calibration,
        )

    @property
    def global_layers(self) -> tuple[int, ...]:
        """The layers without a sliding window: those whose reads grow with the context."""
        return tuple(layer for layer, window in enumerate(self.windows) if window is None)


def _windows(config: PretrainedConfig) -> tuple[int | None, ...]:
    window = getattr(config, "sliding_window", None)
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return (None,) * int(config.num_hidden_layers)
    kinds: list[str] = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return tuple(int(window) if kind == "sliding_attention" else None for kind in kinds)
