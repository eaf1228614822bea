"""From a model's name to an engine."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from springtide.attention.calibration import read_calibration, read_file
from springtide.attention.policy import Policy
from springtide.attention.tidal import NotCalibratedError
from springtide.drafting.drafter import Drafter
from springtide.drafting.several import Several
from springtide.engine.drafters import AUTO, find_adapter, find_drafter
from springtide.engine.engine import Engine
from springtide.engine.self_draft import SPARSE, SelfDraft
from springtide.errors import SpringtideError
from springtide.files import reason
from springtide.model.source import check_finite, find_model, homes, identity, load_tokenizer
from springtide.places import cache_home


def load(
    model: str | Path | PreTrainedModel,
    tokenizer: Any = None,
    policy: Policy | str = "dense",
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    calibrated: bool = True,
    draft: str | Path | Drafter | None = None,
    revision: str | None = None,
) -> Engine:
    """An engine for a model.

    Args:
        model: a Hugging Face model folder, a name on the hub, a ``.gguf`` file, ``"pocket"`` for the bundled model (see
            :func:`springtide.model.source.find_model`), or a loaded model.
        tokenizer: the tokenizer, or a folder with one (default: the model folder's; None for a loaded model).
        policy: attention policy, see :func:`springtide.attention.parse_policy`. A model that ``tidal`` knows no layers
            of is calibrated briefly, see :func:`know_layers`.
        device: where to run (default: the first GPU if there is one, else CPU; a loaded model stays where it is).
        dtype: of weights and cache, e.g. ``"float32"`` (default: the checkpoint's).
        calibrated: use the model's ``springtide.json`` if there is one, see :func:`calibration_folder`.
        draft: what proposes tokens to try: ``"lookup"``, ``"medusa"``, ``"medusa2"``, ``"hidden-transfer"`` or
            ``"longspec"``, a drafter's folder, or a drafter; ``"auto"``: see
            :meth:`springtide.engine.engine.Engine.named`. Its draft tree is chosen by what rows cost on this
            machine. A Medusa-2 drafter changes the model, and that is said: its folder has an adapter, which is merged
            into the weights.
        revision: of a model of the hub: a branch, a tag or a commit (default: its main branch).

    Raises:
        SpringtideError: no such model, incomplete or broken weights, unsupported architecture, bad policy, a drafter
            that is missing or broken or does not fit the model.
    """
    wanted, place = as_dtype(dtype), as_device(device)
    if isinstance(model, PreTrainedModel):
        if dtype is not None:
            raise SpringtideError(
                "A dtype is for a model folder; convert a loaded model yourself, with model.to(dtype)."
            )
        if revision is not None:
            raise SpringtideError("A revision is for a model of the hub, not for a loaded one; leave it out.")
        if isinstance(tokenizer, (str, Path)):
            tokenizer = load_tokenizer(Path(tokenizer))
        calibration = calibration_of(model) if calibrated else None
        engine = Engine(model if device is None else _move(model, place), tokenizer, calibration=calibration)
        engine = under(engine, policy)
        return engine if draft is None else drafting(engine, draft)
    if not isinstance(model, (str, Path)):
        raise SpringtideError(
            f"A model is a folder, a name on the hub or a Hugging Face model, but not {type(model).__name__}."
        )
    source = find_model(model, revision)
    config = source.config()
    drafter = draft  # what AUTO is depends on the weights
    if isinstance(draft, (str, Path)) and draft != AUTO:
        drafter = find_drafter(draft, source.folder)
    if tokenizer is None or isinstance(tokenizer, (str, Path)):
        tokenizer = load_tokenizer(Path(tokenizer)) if tokenizer else source.tokenizer()
    loaded = source.weights(config, wanted)
    adapter = find_adapter(draft, source.folder)
    if adapter is not None:
        loaded = _merge(loaded, adapter)
        warnings.warn(
            f"the drafter '{draft}' changes the model: its adapter is merged into the weights, so that output is not "
            "that of the model alone",
            stacklevel=2,
        )
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
    path = cache_home() / "calibrations" / f"{identity(engine.stack.model)}.json"
    found = read_file(path)
    if found is None:
        if engine.tokenizer is None:
            raise NotCalibratedError
        from springtide.evaluation.brief import calibrate_briefly

        found = calibrate_briefly(engine, path)
    return found


def drafting(engine: Engine, draft: str | Path | Drafter) -> Engine:
    """The engine with a drafter, see :func:`load`; raises SpringtideError for one that would change the model."""
    drafter = draft if isinstance(draft, Drafter) else engine.named(draft)
    parts = drafter.drafters if isinstance(drafter, Several) else (drafter,)
    know_layers(engine, [part.policy or SPARSE for part in parts if isinstance(part, SelfDraft)])
    drafted = copy(engine)
    drafted.drafter = engine.drafter_of(drafter)
    return drafted


def calibration_of(model: PreTrainedModel) -> dict[str, Any] | None:
    """The model's ``springtide.json``, the first in its homes (:func:`homes`); None if there is none."""
    for folder in homes(model):
        found = read_calibration(folder)
        if found is not None:
            return found
    return None


def calibration_folder(model: PreTrainedModel) -> Path:
    """Where calibration writes ``springtide.json``: the first of the model's homes, see :func:`homes`."""
    return homes(model)[0]


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
        raise SpringtideError(f"Device '{device}' cannot be used ({reason(error)}); use cpu.") from None
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
            f"The adapter in '{adapter}' cannot be used ({reason(error):.200}); use a drafter that was trained for "
            "this model, or get it again."
        ) from None
    check_finite(adapter, merged)
    return merged
