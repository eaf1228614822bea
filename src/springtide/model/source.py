"""Where a model comes from: a folder, the Hugging Face hub, or a GGUF file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from springtide.errors import SpringtideError
from springtide.files import read_object, reason
from springtide.model import gguf, hub
from springtide.model.architecture import Architecture
from springtide.model.stack import fingerprint
from springtide.places import data_home

PACKAGE = Path(__file__).parent.parent


@dataclass(frozen=True)
class Source:
    """The files of a model: the Hugging Face folder ``path``, or the GGUF file."""

    path: Path

    @property
    def folder(self) -> Path | None:
        """The folder that is the model's alone; None for a GGUF file."""
        return None if self.path.is_file() else self.path

    @property
    def files(self) -> list[Path]:
        """Those that say what the model computes."""
        if self.folder is None:
            return [self.path]
        return [self.path / "config.json", *sorted(path for kind in hub.WEIGHTS for path in self.path.glob(kind))]

    def config(self) -> PreTrainedConfig:
        """The configuration; raises SpringtideError for an unsupported architecture, and if files are not there."""
        if self.folder is None:
            return gguf.read_config(self.path)
        path = self.path / "config.json"
        kind = read_object(path).get("model_type")
        if not isinstance(kind, str):
            raise SpringtideError(f"'{path}' names no model_type; download the model again.")
        Architecture.of(kind)
        _check_files(self.path)
        try:
            return AutoConfig.from_pretrained(self._place, **self._options)
        except Exception as error:  # the file may hold anything
            raise SpringtideError(f"'{path}' cannot be used ({reason(error)}); download the model again.") from None

    def tokenizer(self) -> Any:
        """The tokenizer; raises SpringtideError if there is none that can be used."""
        if self.folder is not None:
            return load_tokenizer(self.path)
        try:
            return AutoTokenizer.from_pretrained(self._place, **self._options)
        except Exception as error:  # the file may hold anything
            raise SpringtideError(
                f"'{self.path}' holds no usable tokenizer ({reason(error)}); give the model's Hugging Face folder."
            ) from None

    def weights(self, config: PreTrainedConfig, dtype: torch.dtype | str) -> PreTrainedModel:
        """The model, dequantised, on the CPU; raises SpringtideError for weights that are broken or incomplete.

        ``dtype``: of the weights; ``"auto"`` takes the checkpoint's own, and fp32 for a GGUF file.
        """
        try:
            with quiet():
                model, report = AutoModelForCausalLM.from_pretrained(
                    self._place,
                    config=config,
                    dtype=dtype,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,
                    **self._options,
                )
        except ImportError as error:
            raise SpringtideError(
                f"The weights in '{self.path}' need a package that is missing ({reason(error)}); install it."
            ) from None
        except Exception as error:  # the files may hold anything
            raise SpringtideError(
                f"The weights in '{self.path}' cannot be read ({reason(error)}); download the model again."
            ) from None
        model.name_or_path = str(self.path)
        _check_tensors(self.path, model, report)
        return model

    @property
    def _place(self) -> Path:
        """The folder, as transformers' ``from_pretrained`` wants it."""
        return self.folder or self.path.parent

    @property
    def _options(self) -> dict[str, Any]:
        """What else it wants: the file, no network, and none of the model's own code."""
        file = {} if self.folder else {"gguf_file": self.path.name}
        return {"local_files_only": True, "trust_remote_code": False, **file}


def find_model(name: str | Path, revision: str | None = None) -> Source:
    """The files of a model: a folder, a ``.gguf`` file, a name on the Hugging Face hub, or ``"pocket"``.

    A model of the hub is fetched, at a ``revision`` (branch, tag or commit), into transformers' cache; what is there
    already is not fetched again. Raises SpringtideError if there is none, or its architecture is not supported.
    """
    path = PACKAGE / "models" / "pocket" if str(name) == "pocket" else Path(name).expanduser()
    if str(name) == "pocket" and not path.is_dir():
        raise SpringtideError("The bundled model is not there; install springtide again or give a model folder.")
    if not str(name) or not path.exists():
        with quiet():
            return Source(hub.fetch(str(name), revision))
    if revision is not None:
        raise SpringtideError(f"'{name}' is no model of the hub, so it has no revision '{revision}'; leave it out.")
    if path.is_dir():
        _check_folder(path)
    elif path.suffix == ".gguf":
        gguf.check_packages()
    else:
        raise SpringtideError(f"'{name}' is a file, but no .gguf file; give one, a model folder, or a name on the hub.")
    return Source(path)


def foreign(folder: Path) -> bool:
    """Whether a folder is not the user's to write to: it came with Springtide, or lies in the hub's cache."""
    places = (PACKAGE, Path(constants.HF_HUB_CACHE))
    return any(folder.resolve().is_relative_to(place.resolve()) for place in places)


def homes(model: PreTrainedModel) -> list[Path]:
    """Folders in which what was found out about a model may lie: it is read from any of them, written to the first.

    That is the folder that the model was loaded from, if it is the user's. What came with Springtide or lies in the
    cache of the Hugging Face hub is not: then it is a folder in ``$XDG_DATA_HOME/springtide``, which holds for the same
    weights wherever they lie.
    """
    name, kept = model.name_or_path, data_home() / "calibrations" / identity(model)
    if not name or not Path(name).is_dir():
        return [kept]
    return [kept, Path(name)] if foreign(Path(name)) else [Path(name), kept]


def identity(model: PreTrainedModel) -> str:
    """Tells models apart, wherever their weights came from."""
    return f"{fingerprint(model)}-{model.config.num_hidden_layers}"


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder; raises SpringtideError if there is none that can be used."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the files may hold anything
        why = reason(error) if (folder / "tokenizer.json").is_file() else "there is no tokenizer.json"
        raise SpringtideError(f"'{folder}' holds no usable tokenizer ({why}); finish the download.") from None
    if not any((folder / name).is_file() for name in tokenizer.vocab_files_names.values()):
        # Some classes make an empty tokenizer out of nothing.
        raise SpringtideError(f"'{folder}' holds no usable tokenizer (there is no file of one); finish the download.")
    return tokenizer


def check_finite(path: Path, model: PreTrainedModel) -> None:
    """Raise SpringtideError if a tensor of the model, which came from ``path``, holds NaN or infinity."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter.detach().abs().max()):
            raise SpringtideError(f"Tensor '{name}' in '{path}' holds NaN or infinite values; get sound weights.")


@contextmanager
def quiet() -> Iterator[None]:
    """Progress bars of what is fetched and loaded on a terminal only; they are left as they were set."""
    if sys.stderr.isatty():
        yield
        return
    own, hubs = logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    logging.disable_progress_bar()  # and the hub's
    try:
        yield
    finally:
        if own:
            logging.enable_progress_bar()  # and the hub's
        if hubs != own:
            (enable_progress_bars if hubs else disable_progress_bars)()


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        file = next(iter(sorted(folder.glob("*.gguf"))), None)
        advice = "give one that is, or finish the download" if file is None else f"give a file in it, such as '{file}'"
        raise SpringtideError(f"'{folder}' holds no config.json, so it is not a Hugging Face model folder; {advice}.")


def _check_tensors(path: Path, model: PreTrainedModel, report: dict[str, Any]) -> None:
    """Raise SpringtideError unless every tensor of the model was in the files, in its shape and with finite values."""
    for tensors, fault in (
        (sorted(report["missing_keys"]), "lack {} that the model needs"),
        (
            sorted(name for name, *_ in report["mismatched_keys"]),
            "hold {} of another shape than the configuration says",
        ),
    ):
        if tensors:
            count = f"{len(tensors)} tensor{'s' if len(tensors) > 1 else ''}"
            raise SpringtideError(
                f"The weights in '{path}' {fault.format(count)}, such as '{tensors[0]}'; download the model again."
            )
    check_finite(path, model)


def _check_files(folder: Path) -> None:
    """Raise SpringtideError when a weight file that the folder's index names is not there."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = read_object(index).get("weight_map")
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
        read_object(folder / "generation_config.json")  # transformers would go on without a broken one
