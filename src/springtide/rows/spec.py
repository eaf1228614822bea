"""What policies and drafters need to know of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from transformers import PretrainedConfig


@dataclass(frozen=True)
class Rope:
    """How a model's rotary frequencies depend on the length of the sequence, in tokens, that they are for.

    ``longrope`` has one set of them up to the length that the model was ``trained`` at and another beyond, ``dynamic``
    the same ones up to there and others for every length beyond; all other kinds have one set. ``reread`` says that
    keys with the one set are no use beside those with the other: Phi-3 computes a sequence that outgrows the trained
    length anew. Otherwise, as in transformers, keys keep the frequencies that they were written with.
    """

    kind: str = "default"
    trained: int = 0
    reread: bool = False

    @classmethod
    def of(cls, config: PretrainedConfig, reread: bool) -> Self:
        """Read it from a Hugging Face configuration; ``reread``: whether the architecture does so."""
        parameters = _rope_parameters(config)
        kind = parameters.get("rope_type", "default")
        if kind == "longrope":
            return cls(kind, parameters["original_max_position_embeddings"], reread=reread)
        return cls(kind, config.max_position_embeddings) if kind == "dynamic" else cls(kind)

    def shortest(self, length: int) -> int:
        """The shortest length whose frequencies are those of ``length``; 0 where all lengths have the same."""
        if length <= self.trained or not self.trained:
            return 0
        return length if self.kind == "dynamic" else self.trained + 1


@dataclass(frozen=True)
class ModelSpec:
    """``windows[l]`` is layer ``l``'s sliding window in tokens, or None where it hides nothing of the context.

    ``calibration`` is the content of the ``springtide.json`` beside the model, if there is one.
    """

    num_layers: int
    windows: tuple[int | None, ...]
    vocab_size: int
    context_limit: int
    hidden_size: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    rope: Rope = Rope()
    calibration: dict[str, Any] | None = None

    @classmethod
    def of(cls, config: PretrainedConfig, calibration: dict[str, Any] | None = None, reread: bool = False) -> ModelSpec:
        """Read it from a Hugging Face configuration; ``reread``: see :class:`Rope`."""
        return cls(
            num_layers=config.num_hidden_layers,
            windows=_windows(config),
            vocab_size=config.vocab_size,
            context_limit=_context_limit(config),
            hidden_size=config.hidden_size,
            kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            rope=Rope.of(config, reread),
            calibration=calibration,
        )

    @property
    def global_layers(self) -> tuple[int, ...]:
        """The layers without a sliding window: those whose reads grow with the context."""
        return tuple(layer for layer, window in enumerate(self.windows) if window is None)


def _windows(config: PretrainedConfig) -> tuple[int | None, ...]:
    window = getattr(config, "sliding_window", None)
    if window is None or getattr(config, "use_sliding_window", True) is False or window >= _context_limit(config):
        return (None,) * int(config.num_hidden_layers)
    kinds: list[str] = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return tuple(int(window) if kind == "sliding_attention" else None for kind in kinds)


def _rope_parameters(config: PretrainedConfig) -> dict[str, Any]:
    """Of the layers without a sliding window, where the others have parameters of their own (Gemma 3)."""
    parameters: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    own: dict[str, Any] = parameters.get("full_attention", parameters)
    return own


def _context_limit(config: PretrainedConfig) -> int:
    """Tokens that the model can read: as the configuration says, or what rotary scaling stretches the context to."""
    limit: int = config.max_position_embeddings
    rope = _rope_parameters(config)
    if rope.get("rope_type") in ("dynamic", "yarn") and rope.get("factor"):
        return max(limit, int(rope["factor"] * rope.get("original_max_position_embeddings", limit)))
    return limit
