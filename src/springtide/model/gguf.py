"""GGUF files: transformers reads and dequantises them."""

from __future__ import annotations

import warnings
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from springtide.errors import SpringtideError
from springtide.files import reason
from springtide.model.architecture import Architecture

PACKAGES = ("gguf", "accelerate")


def check_packages() -> None:
    """Raise SpringtideError where a package that reading needs is missing."""
    missing = [package for package in PACKAGES if find_spec(package) is None]
    if missing:
        raise SpringtideError(
            f"GGUF files need the package {' and '.join(missing)}; run pip install 'springtide[gguf]'."
        )


def read_config(path: Path) -> PreTrainedConfig:
    """The configuration that a file describes, with a warning if not all of it is read.

    Raises SpringtideError for a file that is not whole, or of an unsupported architecture.
    """
    gguf: Any = import_module("gguf")
    try:
        reader = gguf.GGUFReader(path)
        kind = str(reader.fields["general.architecture"].contents())
    except Exception:  # the file may hold anything
        raise SpringtideError(f"'{path}' is no whole GGUF file; download it again.") from None
    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    except Exception as error:  # an architecture that transformers does not read, or anything
        Architecture.of(kind)
        raise SpringtideError(
            f"'{path}' cannot be used ({reason(error)}); give the model's Hugging Face folder."
        ) from None
    Architecture.of(config.model_type)
    if _turned_otherwise(reader, kind, config):
        warnings.warn(
            f"'{path}' has rotary embeddings that transformers does not read from GGUF files, so that output differs "
            "from the original's, most of all in long texts; the model's Hugging Face folder does not have that fault",
            stacklevel=2,
        )
    return config


def _turned_otherwise(reader: Any, kind: str, config: PreTrainedConfig) -> bool:
    """Whether a file says of rotary embeddings what the configuration that came of it does not."""
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    known = {"scaling.type": rope.get("rope_type", "default"), "freq_base": rope.get("rope_theta")}
    for name, value in known.items():
        field = reader.fields.get(f"{kind}.rope.{name}")
        if field is not None and field.contents() not in (value, "none"):
            return True
    factors = [tensor.data for tensor in reader.tensors if tensor.name.startswith(("rope_freqs", "rope_factors"))]
    return any((own != 1).any() for own in factors)
