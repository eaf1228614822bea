"""DependencyViTs in folders, as ``save_pretrained`` writes them."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch

from springtide.errors import SpringtideError
from springtide.vision.dependency_vit import (
    DependencyViTConfig,
    DependencyViTForImageClassification,
    DependencyViTModel,
    DependencyViTPreTrainedModel,
)

Model = TypeVar("Model", bound=DependencyViTPreTrainedModel)

HEADS = ("classifier.", "mask_token", "painter.")  # parameters that not every kind of model has


def find_vit(name: str | Path) -> Path:
    """The folder of a model: a path, or ``"pocket"`` for the bundled one, which knows the synthetic scenes."""
    return Path(__file__).parents[1] / "models" / "dependency-vit" if str(name) == "pocket" else Path(name).expanduser()


def load_config(folder: Path) -> DependencyViTConfig:
    """The configuration in a folder; raises SpringtideError unless it is a DependencyViT's."""
    if not (folder / "config.json").is_file():
        raise SpringtideError(
            f"'{folder}' holds no config.json, so it is no model's folder; "
            "train one with `springtide train dependency-vit`."
        )
    try:
        fields, _ = DependencyViTConfig.get_config_dict(folder, local_files_only=True)
    except (OSError, ValueError):
        raise SpringtideError(f"'{folder / 'config.json'}' cannot be read; get it anew.") from None
    if fields.get("model_type") != DependencyViTConfig.model_type:
        raise SpringtideError(f"'{folder}' holds a model of type '{fields.get('model_type')}', and no DependencyViT.")
    config: DependencyViTConfig = DependencyViTConfig.from_dict(fields)
    return config


def load_vit(kind: type[Model], folder: Path, config: DependencyViTConfig | None = None) -> Model:
    """The model in a folder, in fp32, on the CPU.

    ``config`` replaces the folder's, to train on from these weights: heads of which the folder has none, or of another
    size, then get random weights.
    Raises SpringtideError for a folder that holds no DependencyViT of this kind, and for weights that are missing or of
    another size than the configuration says.
    """
    own = load_config(folder)
    try:
        model: Model
        model, found = kind.from_pretrained(
            folder,
            config=config or own,
            dtype=torch.float32,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except Exception as error:  # the files may hold anything
        reason = " ".join(str(error).split()).split(". ")[0].rstrip(".:")
        raise SpringtideError(f"The weights in '{folder}' cannot be read ({reason}); get them anew.") from None
    odd = {*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])}
    wrong = sorted(name for name in odd if config is None or not name.startswith(HEADS))
    if wrong:
        raise SpringtideError(
            f"'{folder}' lacks weights of a {kind.__name__}, or has them in another size than its config.json says "
            f"({', '.join(wrong[:3])}); get both anew, or train such a model --from it."
        )
    return model


def load_any(folder: Path) -> DependencyViTPreTrainedModel:
    """The model in a folder, a classifier if it holds one; see :func:`load_vit`."""
    config = load_config(folder)
    classifier = DependencyViTForImageClassification
    return load_vit(classifier if classifier.__name__ in (config.architectures or ()) else DependencyViTModel, folder)
