"""From a model folder to an engine."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HUB_CACHE
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from springtide.attention.calibration import read_calibration, read_file
from springtide.attention.policy import Policy
from springtide.attention.tidal import NotCalibratedError
from springtide.drafting import find_adapter, find_drafter
from springtide.drafting.drafter import Drafter
from springtide.engine.engine import Engine
from springtide.errors import SpringtideError
from springtide.model.stack import check_supported, fingerprint
from springtide.places import cache_home, data_home

PACKAGE = Path(__file__).parent


def load(
    model: str | Path | PreTrainedModel,
    tokenizer: Any = None,
    policy: Policy | str = "dense",
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    calibrated: bool = True,
    draft: str | Path | Drafter | None = None,
) -> Engine:
    """An engine for a model.

    Args:
        model: a Hugging Face model folder, ``"pocket"`` for the bundled model, or a loaded model.
        tokenizer: the tokenizer, or a folder with one (default: the model folder's; None for a loaded model).
        policy: attention policy, see :func:`springtide.attention.parse_policy`. A model that ``tidal`` knows no layers
            of is calibrated briefly, see :func:`know_layers`.
        device: where to run (default: the first GPU if there is one, else CPU; a loaded model stays where it is).
        dtype: of weights and cache, e.g. ``"float32"`` (default: the checkpoint's).
        calibrated: use the model's ``springtide.json`` if there is one, see :func:`calibration_folder`.
        draft: what proposes tokens to try: ``"lookup"``, ``"medusa"``, ``"medusa2"`` or ``"hidden-transfer"``, a
            drafter's folder, or a drafter. Its draft tree is chosen by what rows cost on this machine. A Medusa-2
            drafter changes the model: its folder has an adapter, which is merged into the loaded weights.

    Raises:
        SpringtideError: no such folder, incomplete or broken weights, unsupported architecture, bad policy, a drafter
            that is missing or broken or does not fit the model.
    """
    wanted, place = as_dtype(dtype), as_device(device)
    if isinstance(model, PreTrainedModel):
        if dtype is not None:
            raise SpringtideError(
                "A dtype is for a model folder; convert a loaded model yourself, with model.to(dtype)."
            )
        if isinstance(tokenizer, (str, Path)):
            tokenizer = _load_tokenizer(Path(tokenizer))
        calibration = calibration_of(model) if calibrated else None
        engine = Engine(model if device is None else _move(model, place), tokenizer, calibration=calibration)
        engine = under(engine, policy)
        return engine if draft is None else drafting(engine, draft)
    folder = find_model(model)
    config = _load_config(folder)
    drafter = find_drafter(draft, folder) if isinstance(draft, (str, Path)) else draft
    if tokenizer is None or isinstance(tokenizer, (str, Path)):
        tokenizer = _load_tokenizer(Path(tokenizer) if tokenizer else folder)
    loaded = _load_weights(folder, config, wanted)
    adapter = find_adapter(draft, folder)
    if adapter is not None:
        loaded = _merge(loaded, adapter)
    calibration = calibration_of(loaded) if calibrated else None
    engine = under(Engine(_move(loaded, place), tokenizer, calibration=calibration), policy)
    return engine if drafter is None else drafting(engine, drafter)


def under(engine: Engine, policy: Policy | str) -> Engine:
    """The engine under a policy, whose model is calibrated briefly if the policy needs it, see :func:`know_layers`."""
    know_layers(engine, [policy])
    return engine.using(policy)


def know_layers(engine: Engine, policies: Sequence[Policy | str]) -> None:
    """Calibrate the engine's model briefly where one of the policies needs it and nobody has done so.

    It takes a minute at most, is kept in the user's cache and holds for every engine of the model.
    Raises SpringtideError for a policy that does not fit, and where it would take longer or there is no tokenizer.
    """
    for policy in policies:
        try:
            engine.resolve(policy)
        except NotCalibratedError:
            calibration = _kept_calibration(engine)
            engine.stack.spec = replace(engine.stack.spec, calibration=calibration)
            return


def _kept_calibration(engine: Engine) -> dict[str, Any]:
    """The brief calibration of the engine's model in the user's cache, which is made if it is not there."""
    path = cache_home() / "calibrations" / f"{_key(engine.stack.model)}.json"
    found = read_file(path)
    if found is None:
        if engine.tokenizer is None:
            raise NotCalibratedError
        from springtide.evaluation.brief import calibrate_briefly

        found = calibrate_briefly(engine, path)
    return found


def drafting(engine: Engine, draft: str | Path | Drafter) -> Engine:
    """The engine with a drafter, see :func:`load`; raises SpringtideError for one that would change the model."""
    drafted = copy(engine)
    drafted.drafter = engine.drafter_of(draft)
    return drafted


def calibration_of(model: PreTrainedModel) -> dict[str, Any] | None:
    """The model's ``springtide.json``, None if there is none: the first in its :func:`_calibration_folders`."""
    for folder in _calibration_folders(model):
        found = read_calibration(folder)
        if found is not None:
            return found
    return None


def calibration_folder(model: PreTrainedModel) -> Path:
    """Where calibration writes ``springtide.json``: the folder that the model was loaded from, if it is the user's.

    What came with Springtide or lies in the cache of the Hugging Face hub is not. Its calibration goes to a folder in
    ``$XDG_DATA_HOME/springtide``, which holds for the same weights wherever they lie.
    """
    return _calibration_folders(model)[0]


def _calibration_folders(model: PreTrainedModel) -> list[Path]:
    """Where the model's ``springtide.json`` may lie; the first that is there is the one."""
    name, kept = model.name_or_path, data_home() / "calibrations" / _key(model)
    if not name or not Path(name).is_dir():
        return [kept]
    folder = Path(name).resolve()
    foreign = any(folder.is_relative_to(Path(place).resolve()) for place in (PACKAGE, HF_HUB_CACHE))
    return [kept, Path(name)] if foreign else [Path(name), kept]


def _key(model: PreTrainedModel) -> str:
    """Tells models apart, wherever their weights came from."""
    return f"{fingerprint(model)}-{model.config.num_hidden_layers}"


def find_model(name: str | Path) -> Path:
    """The folder of a model: a path, or ``"pocket"``. Raises SpringtideError if there is none."""
    pocket = str(name) == "pocket"
    folder = PACKAGE / "models" / "pocket" if pocket else Path(name).expanduser()
    if not str(name) or not folder.is_dir():
        if pocket:
            raise SpringtideError("The bundled model is not there; install springtide again or give a model folder.")
        raise SpringtideError(
            f"There is no model folder '{name}'; give a folder with config.json and weights (download it first), "
            "or 'pocket'."
        )
    if not (folder / "config.json").is_file():
        raise SpringtideError(
            f"'{folder}' holds no config.json, so it is not a Hugging Face model folder; "
            "give one that is, or finish the download."
        )
    return folder


def as_device(device: str | torch.device | None) -> torch.device:
    """A device by name; the first GPU, else the CPU, for None."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise SpringtideError(f"Unknown device '{device}': use cpu, cuda or cuda:NUMBER.")
    try:
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise SpringtideError(f"Device '{device}' cannot be used ({_reason(error)}); use cpu.") from None
    return found


def as_dtype(dtype: str | torch.dtype | None) -> torch.dtype | str:
    """A dtype by name; "auto" (the checkpoint's own) for None."""
    if dtype is None:
        return "auto"
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
    if dtype in names.values():
        return dtype
    if dtype not in names:
        raise SpringtideError(f"Unknown dtype '{dtype}': choose one of {', '.join(names)}.")
    return names[dtype]


def _move(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    try:
        moved: PreTrainedModel = model.to(device)
    except torch.OutOfMemoryError:
        raise SpringtideError(
            f"The model does not fit into the memory of {device}; use another device or dtype."
        ) from None
    return moved


def _load_config(folder: Path) -> PreTrainedConfig:
    """The configuration of a supported model whose files are all there."""
    path = folder / "config.json"
    kind = _read_object(path).get("model_type")
    if not isinstance(kind, str):
        raise SpringtideError(f"'{path}' names no model_type; download the model again.")
    check_supported(kind)
    _check_files(folder)
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the file may hold anything
        raise SpringtideError(f"'{path}' cannot be used ({_reason(error)}); download the model again.") from None


def _load_weights(folder: Path, config: PreTrainedConfig, dtype: torch.dtype | str) -> PreTrainedModel:
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    except ImportError as error:
        raise SpringtideError(f"The weights in '{folder}' need a package that is missing: {_reason(error)}.") from None
    except Exception as error:  # the files may hold anything
        raise SpringtideError(
            f"The weights in '{folder}' cannot be read ({_reason(error)}); download the model again."
        ) from None
    finally:
        transformers_logging.enable_progress_bar()
    _check_tensors(folder, model, report)
    return model


def _check_tensors(folder: Path, model: PreTrainedModel, report: dict[str, Any]) -> None:
    """Raise SpringtideError unless every tensor of the model was in the files, in its shape and with finite values."""
    for tensors, fault in (
        (sorted(report["missing_keys"]), "lack {} that the model needs"),
        (sorted(name for name, *_ in report["mismatched_keys"]), "hold {} of another shape than config.json says"),
    ):
        if tensors:
            count = f"{len(tensors)} tensor{'s' if len(tensors) > 1 else ''}"
            raise SpringtideError(
                f"The weights in '{folder}' {fault.format(count)}, such as '{tensors[0]}'; download the model again."
            )
    _check_finite(folder, model)


def _check_finite(folder: Path, model: PreTrainedModel) -> None:
    """Raise SpringtideError if a tensor that came from the folder holds NaN or infinity."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter.detach().abs().max()):
            raise SpringtideError(f"Tensor '{name}' in '{folder}' holds NaN or infinite values; get sound weights.")


def _merge(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """The model with an adapter in peft's format added to its weights."""
    try:
        from peft import PeftModel
    except ImportError:
        raise SpringtideError(
            f"The adapter in '{adapter}' needs the package peft; run pip install 'springtide[train]'."
        ) from None
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (adapter / name).is_file():
            raise SpringtideError(f"'{adapter}' lacks {name}; get the drafter again.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", ".*missing adapter keys")
            merged: PreTrainedModel = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    except Exception as error:  # the files may hold anything
        raise SpringtideError(
            f"The adapter in '{adapter}' cannot be used ({_reason(error):.200}); get the drafter again."
        ) from None
    _check_finite(adapter, merged)
    return merged


def _check_files(folder: Path) -> None:
    """Raise SpringtideError when a weight file that the folder's index names is not there."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = _read_object(index).get("weight_map")
        if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
            raise SpringtideError(f"'{index}' does not say where the weights are; download it again.")
        wanted = sorted(set(names.values()))
        missing = [name for name in wanted if not (folder / name).is_file()]
        if missing:
            raise SpringtideError(
                f"'{folder}' lacks {len(missing)} of {len(wanted)} weight files, such as '{missing[0]}'; "
                "finish the download."
            )
    elif not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise SpringtideError(f"'{folder}' holds no weights (*.safetensors); finish the download.")
    if (folder / "generation_config.json").is_file():
        _read_object(folder / "generation_config.json")  # transformers would go on without a broken one


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no JSON object")
    except (ValueError, OSError) as error:
        raise SpringtideError(f"'{path}' is broken ({_reason(error)}); download it again.") from None
    return content


def _load_tokenizer(folder: Path) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the files may hold anything
        reason = _reason(error) if (folder / "tokenizer.json").is_file() else "there is no tokenizer.json"
        raise SpringtideError(f"'{folder}' holds no usable tokenizer ({reason}); finish the download.") from None
    if not any((folder / name).is_file() for name in tokenizer.vocab_files_names.values()):
        # Some classes make an empty tokenizer out of nothing.
        raise SpringtideError(f"'{folder}' holds no usable tokenizer (there is no file of one); finish the download.")
    return tokenizer


def _reason(error: Exception) -> str:
    """The first sentence of an error, on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.split(". ")[0].rstrip(".:")
