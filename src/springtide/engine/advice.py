"""The file ``advice.json`` beside a model: which drafters were measured to be fastest with it on one machine.

It is written by :mod:`springtide.benchmarks.advise`, and read where a drafter is named ``auto``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from springtide.drafting.drafter import Drafter
from springtide.drafting.several import Several
from springtide.engine.drafters import find_drafter
from springtide.errors import SpringtideError
from springtide.files import reason, replacing
from springtide.model.cost import machine, weights
from springtide.model.source import homes
from springtide.model.stack import Stack

FILE = "advice.json"
VERSION = 1
AGAIN = "run `springtide advise` again or delete the file"


def write(stack: Stack, drafters: Sequence[str], contexts: Sequence[dict[str, Any]]) -> Path:
    """Keep what is advised: ``drafters`` by their names, and what was fastest at each of the ``contexts``.

    It holds for these weights on this machine. Returns the file; raises SpringtideError when it cannot be written.
    """
    path = homes(stack.model)[0] / FILE
    content = {
        "version": VERSION,
        "model": weights(stack),
        "machine": machine(stack),
        "drafters": list(drafters),
        "contexts": list(contexts),
    }
    with replacing(path, make=True) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path


def advised(stack: Stack, model: Path | None) -> Drafter | None:
    """The drafters that are advised for these weights on this machine, as one; None where there is no advice for them.

    Where the advice is to draft nothing, it is plain decoding. ``model``: the folder beside which named drafters lie.
    Raises SpringtideError for a broken file, and for drafters that are not there any more.
    """
    path = next((folder / FILE for folder in homes(stack.model) if (folder / FILE).exists()), None)
    names = None if path is None else _names(path, stack)
    if names is None:
        return None
    try:
        drafters = [find_drafter(name, model) for name in names]
    except SpringtideError as error:
        raise SpringtideError(f"The advice in '{path}' cannot be used ({reason(error)}); {AGAIN}.") from None
    if not drafters:
        return Drafter()
    return drafters[0] if len(drafters) == 1 else Several(tuple(drafters))


def _names(path: Path, stack: Stack) -> list[str] | None:
    """The drafters that the file names; None if it is for others."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != VERSION:
            raise ValueError("it is of another version of Springtide")
        names, place = content["drafters"], (content["model"], content["machine"])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("drafters are no list of names")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SpringtideError(f"The advice in '{path}' cannot be used ({reason(error)}); {AGAIN}.") from None
    return names if place == (weights(stack), machine(stack)) else None
