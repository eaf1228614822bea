"""Medusa heads as files, in three layouts: Springtide's own, the original project's, and vLLM's.

In memory they have one form, which is how Springtide's layout stores them: its ``config.json`` and the stacked tensors
of :class:`springtide.drafting.medusa.Heads`. The other layouts have a tensor for each head and layer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from springtide.drafting.folder import (
    CONFIG,
    WEIGHTS,
    check_finite,
    read_config,
    read_folder,
    read_weights,
    write_folder,
)
from springtide.errors import SpringtideError
from springtide.files import filling

Config = dict[str, Any]
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """Springtide's layout, and the base of the others. ``mark``: a field that only its ``config.json`` has."""

    mark: str

    def read(self, folder: Path) -> tuple[Config, Tensors]:
        """Configuration and tensors in Springtide's form; raises SpringtideError for files that are unsound."""
        return read_folder(folder)

    def write(self, folder: Path, config: Config, tensors: Tensors, lm_head: Tensor | None) -> None:
        """Write them in bf16; ``lm_head [V, hidden]`` is the target's, None if it is not known."""
        write_folder(folder, config, tensors)


@dataclass(frozen=True)
class Separate(Layout):
    """A layout with a tensor for each head and layer.

    Attributes:
        files: the weights are in the first of these that is there; the first of all is written.
        weight, bias, lm_head: names of tensors, made of ``head``, ``layer`` and ``layers`` (of residual blocks).
        shared: a field that is true where all heads use the target's LM head, stored as head 0's; None for a layout
            in which every head has its own.
        settings: what ``config.json`` holds for Springtide's configuration, a number of heads and one of layers.
    """

    files: tuple[str, ...]
    weight: str
    bias: str
    lm_head: str
    shared: str | None
    settings: Callable[[Config, int, int], Config]

    def names(self, layers: int, heads: int, lm_heads: int) -> dict[str, list[str]]:
        """Names of the tensors that each stacked one is made of, those of a layer's heads side by side."""
        places = [{"head": head, "layer": layer} for layer in range(layers) for head in range(heads)]
        return {
            "weight": [self.weight.format(**place) for place in places],
            "bias": [self.bias.format(**place) for place in places],
            "lm_heads": [self.lm_head.format(head=head, layers=layers) for head in range(lm_heads)],
        }

    def read(self, folder: Path) -> tuple[Config, Tensors]:
        config = read_config(folder)
        path = next((folder / name for name in self.files if (folder / name).is_file()), folder / self.files[0])
        stored = READERS[path.suffix](path)
        # Counted in the weights: there are published configurations that name fewer heads.
        heads = next(n for n in count() if n and self.weight.format(head=n, layer=0) not in stored)
        layers = next(n for n in count() if n and self.weight.format(head=0, layer=n) not in stored)
        shared = self.shared is not None and bool(config.get(self.shared))
        names = self.names(layers, heads, 1 if shared else heads)
        if stored.keys().isdisjoint(names["bias"]):
            del names["bias"]
        stacked = _stacked(path, stored, names)
        lm_heads = stacked.pop("lm_heads")
        blocks = {kind: tensor.view(layers, heads, *tensor.shape[1:]) for kind, tensor in stacked.items()}
        blocks.setdefault("bias", torch.zeros_like(blocks["weight"][..., 0]))
        own = {
            "drafter": "medusa",
            "hidden_size": lm_heads.shape[2],
            "vocab_size": lm_heads.shape[1],
            "base": None,
            "base_model": config.get("base_model_name_or_path"),
            "accuracy": None,
        }
        return own, blocks if shared else blocks | {"lm_heads": lm_heads}

    def write(self, folder: Path, config: Config, tensors: Tensors, lm_head: Tensor | None) -> None:
        layers, heads = tensors["weight"].shape[:2]
        settings = self.settings(config, heads, layers)
        if self.shared is not None:
            settings[self.shared] = "lm_heads" not in tensors
        lm_heads = tensors.get("lm_heads")
        if lm_heads is None:
            if lm_head is None:
                raise SpringtideError(
                    "These heads use their model's LM head, which this layout stores; name the model with --model, "
                    "or resolve the drafter for it first."
                )
            lm_heads = lm_head.expand(1 if self.shared else heads, -1, -1)
        stacked = {
            "weight": tensors["weight"].flatten(0, 1),
            "bias": tensors["bias"].flatten(0, 1),
            "lm_heads": lm_heads,
        }
        stored = {
            name: part.to("cpu", torch.bfloat16, copy=True)
            for kind, names in self.names(layers, heads, len(lm_heads)).items()
            for name, part in zip(names, stacked[kind].detach(), strict=True)
        }
        file = self.files[0]
        with filling(folder) as temporary:
            WRITERS[Path(file).suffix](stored, temporary / file)
            (temporary / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _stacked(path: Path, stored: Tensors, names: Mapping[str, Sequence[str]]) -> Tensors:
    """Stacks of the tensors of these names; raises SpringtideError unless the file holds them, alike, and no others."""
    odd = sorted({name for group in names.values() for name in group} ^ stored.keys())
    if odd:
        fault = f"holds '{odd[0]}', which is no part of Medusa heads" if odd[0] in stored else f"lacks '{odd[0]}'"
        raise SpringtideError(f"'{path}' {fault}; get sound weights.")
    try:
        return {kind: torch.stack([stored[name] for name in group]) for kind, group in names.items()}
    except RuntimeError:
        raise SpringtideError(f"'{path}' holds heads of different sizes; get sound weights.") from None


def read_torch(path: Path) -> Tensors:
    """The tensors of a ``torch.save`` file, in which no code is run.

    Raises SpringtideError if it is missing or broken, or holds anything but tensors with finite values.
    """
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        sound = isinstance(tensors, dict) and all(isinstance(tensor, Tensor) for tensor in tensors.values())
    except OSError as error:
        raise SpringtideError(f"'{path}' cannot be read ({error.strerror}); finish the download.") from None
    except Exception:  # the file may hold anything
        sound = False
    if not sound:
        raise SpringtideError(f"'{path}' is broken, or holds more than tensors; get it again.")
    check_finite(path, tensors)
    return dict(tensors)


READERS: dict[str, Callable[[Path], Tensors]] = {".pt": read_torch, ".safetensors": read_weights}
WRITERS: dict[str, Callable[[Tensors, Path], object]] = {".pt": torch.save, ".safetensors": save_file}

FORMATS: dict[str, Layout] = {
    "springtide": Layout("drafter"),
    "original": Separate(
        mark="medusa_num_heads",
        files=("medusa_lm_head.pt", "medusa_lm_head.safetensors", WEIGHTS),
        weight="{head}.{layer}.linear.weight",
        bias="{head}.{layer}.linear.bias",
        lm_head="{head}.{layers}.weight",
        shared=None,
        settings=lambda config, heads, layers: {
            "base_model_name_or_path": config["base_model"] or "",
            "medusa_num_heads": heads,
            "medusa_num_layers": layers,
        },
    ),
    "vllm": Separate(
        mark="num_heads",
        files=(WEIGHTS,),
        weight="blocks.{head}.layers.{layer}.weight",
        bias="blocks.{head}.layers.{layer}.bias",
        lm_head="lm_heads.{head}.weight",
        shared="original_lm_head",
        settings=lambda config, heads, layers: {
            "model_type": "medusa",
            "architectures": ["MedusaModel"],
            "hidden_size": config["hidden_size"],
            "vocab_size": config["vocab_size"],
            "truncated_vocab_size": config["vocab_size"],
            "num_heads": heads,
            "num_hidden_layers": layers,
            "medusa_fc_bias": True,
        },
    ),
}


def read(folder: Path) -> tuple[Config, Tensors]:
    """Heads in Springtide's form from a folder in any of the layouts; raises SpringtideError if it has none of them."""
    config = read_config(folder)
    for layout in FORMATS.values():
        if layout.mark in config and config.get("drafter", "medusa") == "medusa":
            return layout.read(folder)
    raise SpringtideError(
        f"'{folder}' holds no Medusa heads in a known layout ({', '.join(FORMATS)}); give the folder of a drafter."
    )


def write(folder: Path, name: str, config: Config, tensors: Tensors, lm_head: Tensor | None) -> None:
    """Write heads in a layout by name, see :class:`Layout`; raises SpringtideError for an unknown one."""
    if name not in FORMATS:
        raise SpringtideError(f"There is no layout '{name}' for Medusa heads; choose one of {', '.join(FORMATS)}.")
    FORMATS[name].write(folder, config, tensors, lm_head)
