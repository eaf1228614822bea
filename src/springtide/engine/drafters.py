"""Drafters by name, and those that lie beside a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from springtide.drafting.drafter import Drafter
from springtide.drafting.folder import CONFIG, read_config
from springtide.drafting.guesser import Guesser
from springtide.drafting.hidden_transfer import HiddenTransfer
from springtide.drafting.longspec import LongSpec
from springtide.drafting.lookup import Lookup
from springtide.drafting.medusa import Medusa
from springtide.drafting.several import Several
from springtide.engine.self_draft import SelfDraft
from springtide.errors import SpringtideError
from springtide.registry import Registry, is_folder, split

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
AUTO = "auto"  # names every drafter that there is for a model
BESIDE = "drafters"  # folder in a model's that has those of its own
ADAPTER = "adapter"  # folder in a drafter's: what it adds to the target's weights, in peft's format


def find_folder(draft: str | Path, model: Path | None) -> Path | None:
    """The folder of one drafter, which is given as :func:`find_drafter` takes it; None for one that has no weights.

    Those with a name lie in ``BESIDE`` in the folder of the ``model``. Raises SpringtideError if there is none.
    """
    name = _name(draft)
    if name is None:
        folder = Path(draft).expanduser()
        if not is_folder(str(draft)):
            raise SpringtideError(
                f"There is no drafter '{draft}': choose {', '.join(DRAFTERS.kinds)}, or give a drafter's folder."
            )
        return folder
    if not issubclass(DRAFTERS.kinds[name], Guesser):
        return None
    folder = Path() if model is None else model / BESIDE / name
    if model is None or not folder.is_dir():
        raise SpringtideError(
            f"There is no drafter '{name}' beside this model (the pocket model has one); train one with "
            "`springtide train` and give its folder, or use 'lookup', which fits every model."
        )
    return folder


def find_drafter(draft: str | Path, model: Path | None) -> Drafter:
    """The drafter in a folder, or from ``name`` or ``name:option=value,option=value``, see :mod:`springtide.registry`.

    Several of these, joined by commas, are one drafter, see :class:`springtide.drafting.several.Several`; ``auto`` is
    lookup and all that lie beside the ``model``, but for those that would change it. A path that exists is a path,
    whatever characters are in it, unless it is a drafter's name. Raises SpringtideError for one that is missing or
    broken, for an unknown option or value, and for several of which one has an adapter.
    """
    find_adapter(draft, model)
    drafters = [_find_one(each, model) for each in _each(draft, model)]
    return drafters[0] if len(drafters) == 1 else Several(tuple(drafters))


def find_adapter(draft: str | Path | Drafter | None, model: Path | None) -> Path | None:
    """The folder of the adapter that comes with a drafter, None if there is none; raises as :func:`find_drafter`."""
    drafts = _each(draft, model) if isinstance(draft, (str, Path)) else []
    for each in drafts:
        folder = find_folder(each, model)
        own = find_adapter(_below(each), model) if folder is None else folder / ADAPTER
        if own is not None and own.is_dir():
            if len(drafts) > 1:
                raise SpringtideError(
                    f"The drafter '{each}' comes with an adapter, which changes the model, so it cannot be one of "
                    "several; name it alone."
                )
            return own
    return None


def _each(draft: str | Path, model: Path | None) -> Sequence[str | Path]:
    """What ``draft`` names, one by one."""
    if draft == AUTO:
        return [Lookup.name, *beside(model)]
    if isinstance(draft, Path) or is_folder(draft):
        return [draft]
    text = draft.strip()
    return split(text[1:-1] if text.startswith("(") and text.endswith(")") else text, folders=True) or [draft]


def _below(draft: str | Path) -> str | None:
    """What drafts for a sparse policy that drafts itself, if ``draft`` names such."""
    return DRAFTERS.read(draft)[1].get("draft") if isinstance(draft, str) and _name(draft) == SelfDraft.name else None


def beside(model: Path | None) -> Sequence[Path]:
    """Folders of the drafters that lie beside the ``model``, without those that would change it."""
    found = [] if model is None else sorted((model / BESIDE).glob(f"*/{CONFIG}"))
    return [config.parent for config in found if not (config.parent / ADAPTER).is_dir()]


def _find_one(draft: str | Path, model: Path | None) -> Drafter:
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


def _name(draft: str | Path) -> str | None:
    """The name in ``draft``, None if it is a folder."""
    text = "" if isinstance(draft, Path) else draft.strip()
    name = text.partition(":")[0]
    known = name in DRAFTERS.kinds and (name == text or not is_folder(text))
    return name if known else None
