"""Drafters by name."""

from __future__ import annotations

from pathlib import Path

from springtide.drafting.drafter import Drafter
from springtide.drafting.folder import read_config
from springtide.drafting.hidden_transfer import HiddenTransfer
from springtide.drafting.lookup import Lookup
from springtide.drafting.medusa import Medusa
from springtide.errors import SpringtideError

NAMES = ("lookup", "medusa", "medusa2", "hidden-transfer")
ADAPTER = "adapter"  # folder in a drafter's: what it adds to the target's weights, in peft's format


def find_folder(name: str | Path, model: Path | None) -> Path | None:
    """The folder of the drafter ``name``, which may be that folder; None for one that has no weights.

    Those with a name lie in ``drafters`` in the folder of the ``model``. Raises SpringtideError if there is none.
    """
    if name == "lookup":
        return None
    if name in NAMES:
        folder = model / "drafters" / name if model else None
        if folder is None or not folder.is_dir():
            raise SpringtideError(
                f"There is no drafter '{name}' beside this model (the pocket model has one); train one with "
                "`springtide train` and give its folder, or use 'lookup', which fits every model."
            )
        return folder
    folder = Path(name).expanduser()
    if not str(name) or not folder.is_dir():
        raise SpringtideError(f"There is no drafter '{name}': choose {', '.join(NAMES)}, or give a drafter's folder.")
    return folder


def find_drafter(name: str | Path, model: Path | None) -> Drafter:
    """The drafter ``name``, see :func:`find_folder`; raises SpringtideError if it is missing or broken."""
    folder = find_folder(name, model)
    if folder is None:
        return Lookup()
    kind = read_config(folder).get("drafter", Medusa.name)  # other projects' folders, which Medusa reads, do not say
    for cls in (Medusa, HiddenTransfer):
        if kind == cls.name:
            return cls.load(folder)
    raise SpringtideError(f"'{folder}' holds a drafter '{kind}', which this version does not know; update springtide.")


def find_adapter(draft: str | Path | Drafter | None, model: Path | None) -> Path | None:
    """The folder of the adapter that comes with a drafter, None if there is none."""
    folder = find_folder(draft, model) if isinstance(draft, (str, Path)) else None
    return folder / ADAPTER if folder is not None and (folder / ADAPTER).is_dir() else None
