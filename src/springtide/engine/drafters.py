"""Drafters by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from springtide.drafting.drafter import Drafter
from springtide.drafting.folder import read_config
from springtide.drafting.guesser import Guesser
from springtide.drafting.hidden_transfer import HiddenTransfer
from springtide.drafting.longspec import LongSpec
from springtide.drafting.lookup import Lookup
from springtide.drafting.medusa import Medusa
from springtide.engine.self_draft import SelfDraft
from springtide.errors import SpringtideError
from springtide.registry import Registry

DRAFTERS: Registry[Drafter] = Registry(
    "drafter",
    {
        "lookup": Lookup,
        "medusa": Medusa,
        "medusa2": Medusa,
        "hidden-transfer": HiddenTransfer,
        "longspec": LongSpec,
        "self": SelfDraft,
    },
)
ADAPTER = "adapter"  # folder in a drafter's: what it adds to the target's weights, in peft's format


def find_folder(draft: str | Path, model: Path | None) -> Path | None:
    """The folder of a drafter, which is given as :func:`find_drafter` takes it; None for one that has no weights.

    Those with a name lie in ``drafters`` in the folder of the ``model``. Raises SpringtideError if there is none.
    """
    name = _name(draft)
    if name is None:
        folder = Path(draft).expanduser()
        if not str(draft) or not folder.is_dir():
            raise SpringtideError(
                f"There is no drafter '{draft}': choose {', '.join(DRAFTERS.kinds)}, or give a drafter's folder."
            )
        return folder
    if not issubclass(DRAFTERS.kinds[name], Guesser):
        return None
    folder = Path() if model is None else model / "drafters" / name
    if model is None or not folder.is_dir():
        raise SpringtideError(
            f"There is no drafter '{name}' beside this model (the pocket model has one); train one with "
            "`springtide train` and give its folder, or use 'lookup', which fits every model."
        )
    return folder


def find_drafter(draft: str | Path, model: Path | None) -> Drafter:
    """The drafter in a folder, or from ``name`` or ``name:option=value,option=value``, see :mod:`springtide.registry`.

    A path that exists is a path, whatever characters are in it, unless it is a drafter's name. Raises SpringtideError
    for one that is missing or broken, and for an unknown option or value.
    """
    values = {} if _name(draft) is None else DRAFTERS.read(str(draft))[1]
    folder = find_folder(draft, model)
    if folder is None:
        drafter = DRAFTERS.parse(str(draft))
        if isinstance(drafter, SelfDraft) and drafter.draft is not None:
            return replace(drafter, draft=find_drafter(drafter.draft, model))
        return drafter
    kind = read_config(folder).get("drafter", Medusa.name)  # other projects' folders, which Medusa reads, do not say
    for cls in (Medusa, HiddenTransfer, LongSpec):
        if kind == cls.name:
            return replace(cls.load(folder), **values)
    raise SpringtideError(f"'{folder}' holds a drafter '{kind}', which this version does not know; update springtide.")


def find_adapter(draft: str | Path | Drafter | None, model: Path | None) -> Path | None:
    """The folder of the adapter that comes with a drafter, None if there is none."""
    if isinstance(draft, str) and _name(draft) == SelfDraft.name:
        return find_adapter(DRAFTERS.read(draft)[1].get("draft"), model)
    folder = find_folder(draft, model) if isinstance(draft, (str, Path)) else None
    return folder / ADAPTER if folder is not None and (folder / ADAPTER).is_dir() else None


def _name(draft: str | Path) -> str | None:
    """The name in ``draft``, None if it is a folder."""
    text = "" if isinstance(draft, Path) else draft.strip()
    name = text.partition(":")[0]
    known = name in DRAFTERS.kinds and (name == text or not Path(text).expanduser().is_dir())
    return name if known else None
