"""From a model folder to an engine."""

from __future__ import annotations

import json
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from springtide.attention.calibration import read_calibration
from springtide.attention.policy import Policy
from springtide.engine.engine import Engine
from springtide.engine.stack import check_supported
from springtide.errors import SpringtideError


def load(
    model: str | Path | PreTrainedModel,
    tokenizer: Any = None,
    policy: Policy | str = "dense",
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    calibrated: bool = True,
) -> Engine:
    """An engine for a model.

    Args:
        model: a Hugging Face model folder, ``"pocket"`` for the bundled model, or a loaded model.
        tokenizer: the tokenizer, or a folder with one (default: the model folder's; None for a loaded model).
        policy: attention policy, see :func:`springtide.attention.parse_policy`.
        device: where to run (default: the first GPU if there is one, else CPU; a loaded model stays where it is).
        dtype: of weights and cache, e.g. ``"float32"`` (default: the checkpoint's).
        calibrated: use the folder's ``springtide.json`` if there is one.

    Raises:
        SpringtideError: no such folder, incomplete or broken weights, unsupported architecture, bad policy.
    """
    if isinstance(model, PreTrainedModel):
        if isinstance(tokenizer, (str, Path)):
            tokenizer = _load_tokenizer(Path(tokenizer))
        return Engine(model.to(device) if device is not None else model, tokenizer, policy)
    folder = find_model(model)
    loaded = _load_weights(folder, as_dtype(dtype))
    if tokenizer is None or isinstance(tokenizer, (str, Path)):
        tokenizer = _load_tokenizer(Path(tokenizer) if tokenizer else folder)
    place = as_device(device)
    calibration = read_calibration(folder) if calibrated else None
    return Engine(loaded.to(place), tokenizer, policy, calibration=calibration)


def find_model(name: str | Path) -> Path:
    """The folder of a model: a path, or ``"pocket"``. Raises SpringtideError if there is none."""
    if str(name) == "pocket":
        folder = Path(str(resources.files("springtide"))) / "models" / "pocket"
    else:
        folder = Path(name).expanduser()
    if not folder.is_dir():
        raise SpringtideError(f"There is no model folder '{name}'; give a folder with config.json, or 'pocket'.")
    if not (folder / "config.json").is_file():
        raise SpringtideError(f"'{name}' holds no config.json, so it is not a Hugging Face model folder.")
    return folder


def as_device(device: str | torch.device | None) -> torch.device:
    """A device by name; the first GPU, else the CPU, for None."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise SpringtideError(f"Device '{device}' cannot be used: {str(error).splitlines()[0]}") from None
    return found


def as_dtype(dtype: str | torch.dtype | None) -> torch.dtype | str:
    """A dtype by name; "auto" (the checkpoint's own) for None."""
    if dtype is None or isinstance(dtype, torch.dtype):
        return "auto" if dtype is None else dtype
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
    if dtype not in names:
        raise SpringtideError(f"Unknown dtype '{dtype}': choose one of {', '.join(names)}.")
    return names[dtype]


def _load_weights(folder: Path, dtype: torch.dtype | str) -> PreTrainedModel:
    _check_files(folder)
    try:
        config = AutoConfig.from_pretrained(folder)
    except (ValueError, OSError, KeyError) as error:
        kind = _model_type(folder)
        check_supported(kind)
        raise SpringtideError(f"'{folder / 'config.json'}' cannot be read: {_first_line(error)}") from None
    check_supported(config.model_type)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, output_loading_info=True, local_files_only=True
        )
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise SpringtideError(
            f"The weights in '{folder}' cannot be read ({_first_line(error)}); download the model again."
        ) from None
    finally:
        transformers_logging.enable_progress_bar()
    missing = sorted({*report["missing_keys"], *(str(key) for key in report["mismatched_keys"])})
    if missing:
        raise SpringtideError(
            f"The weights in '{folder}' lack {len(missing)} tensors that the model needs, such as '{missing[0]}'; "
            "download the model again."
        )
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter.detach().abs().max()):
            raise SpringtideError(f"Tensor '{name}' in '{folder}' holds NaN or infinite values; get sound weights.")
    return model


def _check_files(folder: Path) -> None:
    """Raise SpringtideError when a weight file that the folder's index names is not there."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            wanted = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError) as error:
            raise SpringtideError(f"'{index}' is broken ({_first_line(error)}); download it again.") from None
        missing = [name for name in wanted if not (folder / name).is_file()]
        if missing:
            raise SpringtideError(
                f"'{folder}' lacks {len(missing)} of {len(wanted)} weight files, such as '{missing[0]}'; "
                "finish the download."
            )
    elif not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise SpringtideError(f"'{folder}' holds no weights (*.safetensors); finish the download.")


def _model_type(folder: Path) -> str:
    try:
        return str(json.loads((folder / "config.json").read_text()).get("model_type", "unnamed"))
    except (ValueError, OSError) as error:
        raise SpringtideError(f"'{folder / 'config.json'}' is not valid JSON: {_first_line(error)}") from None


def _load_tokenizer(folder: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise SpringtideError(f"'{folder}' holds no usable tokenizer: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
