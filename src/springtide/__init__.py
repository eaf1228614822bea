"""Springtide: fast long-context decoding of Hugging Face causal models on CPU and GPU.

``springtide.load(path)`` gives an :class:`Engine`; ``engine.generate(prompts)`` and ``engine.stream(prompt)`` use it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from springtide.engine.engine import Engine, Output
    from springtide.integrations.transformers import hf_generate
    from springtide.loading import load
    from springtide.rows.sampling import Sampling

from springtide.errors import SpringtideError

__version__ = "0.1.0"

_HOMES = {
    "load": "springtide.loading",
    "Engine": "springtide.engine.engine",
    "Output": "springtide.engine.engine",
    "Sampling": "springtide.rows.sampling",
    "hf_generate": "springtide.integrations.transformers",
}

__all__ = ["Engine", "Output", "Sampling", "SpringtideError", "hf_generate", "load"]


def __getattr__(name: str) -> Any:
    """Import torch and transformers only when something that needs them is used."""
    if name not in _HOMES:
        raise AttributeError(f"module 'springtide' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
