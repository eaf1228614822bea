"""The folder of a drafter with weights: ``config.json`` and ``model.safetensors``.

Every configuration names the ``drafter`` and says what model it is for: ``hidden_size``, ``vocab_size``, and ``base``,
the model's fingerprint, None if it is not known. ``accuracy`` is what :mod:`springtide.drafting.shape` calls so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from springtide.drafting.drafter import Target
from springtide.errors import SpringtideError
from springtide.files import filling, read_object, reason

CONFIG = "config.json"
WEIGHTS = "model.safetensors"


def write_folder(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a drafter's folder, its weights as bf16; other files that are there stay.

    Raises SpringtideError when it cannot be written.
    """
    stored = {name: tensor.detach().to("cpu", torch.bfloat16).contiguous() for name, tensor in tensors.items()}
    text = json.dumps(config, indent=2) + "\n"
    with filling(folder) as temporary:
        save_file(stored, temporary / WEIGHTS)
        (temporary / CONFIG).write_text(text, encoding="utf-8")


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and weights (on the CPU, as stored) of a drafter's folder.

    Raises SpringtideError for a missing or broken file and for weights that are not finite.
    """
    return read_config(folder), read_weights(folder / WEIGHTS)


def read_config(folder: Path) -> dict[str, Any]:
    """The content of a drafter's ``config.json``; raises SpringtideError if there is none or it is broken."""
    path = folder / CONFIG
    if not path.is_file():
        raise SpringtideError(f"'{folder}' holds no {CONFIG}, so it is not a drafter's folder; give one that is.")
    return read_object(path)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; raises SpringtideError if it is missing or broken, or not finite."""
    if not path.is_file():
        raise SpringtideError(f"'{path.parent}' holds no {path.name}; finish the download, or train the drafter again.")
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise SpringtideError(f"'{path}' is broken ({reason(error)}); get it again.") from None
    check_finite(path, tensors)
    return tensors


def check_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise SpringtideError if one of the tensors of a file holds NaN or infinity."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise SpringtideError(f"Tensor '{name}' in '{path}' holds NaN or infinite values; get sound weights.")


def check_base(config: Mapping[str, Any], target: Target) -> None:
    """Raise SpringtideError unless ``target`` is the model that a drafter with this configuration was made for."""
    name, spec = config["drafter"], target.spec
    for field, own, what in (
        ("hidden_size", spec.hidden_size, "hidden states of size"),
        ("vocab_size", spec.vocab_size, "a vocabulary of"),
    ):
        if config[field] != own:
            raise SpringtideError(
                f"The {name} drafter is for a model with {what} {config[field]}, but this model's is {own}; "
                "use a drafter that was trained for this model."
            )
    if config.get("base") not in (None, target.fingerprint):
        raise SpringtideError(
            f"The {name} drafter was trained for another model of the same size; "
            "use a drafter that was trained for this model."
        )
