"""Models of the Hugging Face hub: fetched into transformers' cache, with its tokens and its offline mode."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import constants, errors, snapshot_download
from huggingface_hub.utils._validators import validate_repo_id

from springtide.errors import SpringtideError
from springtide.files import read_object, reason
from springtide.model.architecture import Architecture

SMALL = ["*.json", "*.jinja", "*.model", "*.txt"]  # configuration and tokenizer
WEIGHTS = ("*.safetensors", "*.bin")
COPIES = ["*/*", "consolidated*"]  # of the weights, in other projects' layouts


def fetch(name: str, revision: str | None) -> Path:
    """The folder in transformers' cache with a model of the hub, which is fetched if it is not there.

    Raises SpringtideError where it cannot be, and for an unsupported architecture.
    """
    try:
        validate_repo_id(name)
    except errors.HFValidationError:
        kind = "file" if name.endswith(".gguf") else "model folder"
        raise SpringtideError(
            f"There is no {kind} '{name}'; give a folder with config.json and weights, a .gguf file, "
            "a model's name on the Hugging Face hub, or 'pocket'."
        ) from None
    folder = _snapshot(name, revision, SMALL, f"There is no model folder '{name}', it was not fetched before")
    if not (folder / "config.json").is_file():
        raise SpringtideError(
            f"The model '{name}' on the Hugging Face hub has no config.json; "
            "choose one in Hugging Face's format, or download a GGUF file and give that."
        )
    Architecture.of(str(read_object(folder / "config.json").get("model_type")))  # refused before gigabytes are fetched
    for kind in WEIGHTS:  # the second only where there is none of the first
        commit, fault = folder.name, f"The weights of '{name}' are not all in the cache"
        folder = _snapshot(name, commit, [kind], fault)
        if any(folder.glob(kind)):
            break
    return folder


def _snapshot(name: str, revision: str | None, patterns: list[str], fault: str) -> Path:
    """The folder in the cache, which holds the files now; where they cannot be fetched, the ``fault`` is said."""
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=COPIES))
    except errors.GatedRepoError:
        raise SpringtideError(
            f"The model '{name}' is gated; ask for access at {constants.ENDPOINT}/{name} and run `hf auth login`."
        ) from None
    except errors.RepositoryNotFoundError:
        raise SpringtideError(
            f"There is no model folder '{name}', and the Hugging Face hub has no such model; "
            "check the name, or run `hf auth login` if it is private."
        ) from None
    except errors.RevisionNotFoundError:
        raise SpringtideError(
            f"The model '{name}' has no revision '{revision}'; give a branch, a tag or a commit of it."
        ) from None
    except errors.IncompleteSnapshotError as error:  # without a network; perhaps what is missing is not needed
        return Path(error.snapshot_path)
    except errors.LocalEntryNotFoundError as error:
        if isinstance(error.__cause__, errors.OfflineModeIsEnabled):
            raise SpringtideError(f"{fault}, and offline mode is on; unset HF_HUB_OFFLINE, or give a folder.") from None
        raise SpringtideError(
            f"{fault}, and the Hugging Face hub cannot be reached; check the network, or give a folder."
        ) from None
    except errors.HfHubHTTPError as error:
        if error.response.status_code == 401:
            raise SpringtideError(
                "The Hugging Face hub does not accept your token; run `hf auth login`, or unset HF_TOKEN."
            ) from None
        raise SpringtideError(
            f"The Hugging Face hub failed (status {error.response.status_code}); try again, or give a folder."
        ) from None
    except Exception as error:  # of the network, of the disk
        raise SpringtideError(
            f"The model '{name}' cannot be fetched from the Hugging Face hub ({reason(error)}); try again."
        ) from None
