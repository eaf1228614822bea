"""The file ``springtide.json`` beside a model: what calibration found out about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from springtide.errors import SpringtideError

FILE = "springtide.json"
VERSION = 2


def read_calibration(folder: Path) -> dict[str, Any] | None:
    """The content of the folder's ``springtide.json``, None if there is none.

    Raises SpringtideError if it is not what :mod:`springtide.evaluation.calibrate` writes.
    """
    return read_file(folder / FILE)


def read_file(path: Path) -> dict[str, Any] | None:
    """The same of a file of any name."""
    if not path.is_file():
        return None
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version, layout = content.get("version", 1), content["tidal"]
        if not isinstance(version, int):
            raise ValueError("its version is not a whole number")
        layers = [*layout["full"], *layout["select"]]
        if not layout["select"] or not all(isinstance(layer, int) for layer in layers):
            raise ValueError("the layers are not whole numbers")
        for pair in layout.get("full_heads", ()):
            if len(pair) != 2 or not all(isinstance(number, int) for number in pair):
                raise ValueError("full_heads are not pairs of a layer and a head")
        for layer, sets in layout.get("map", {}).items():
            if not layer.isdigit() or not all(isinstance(head, int) for head in sets):
                raise ValueError("the map is not lists of whole numbers")
    except (ValueError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise SpringtideError(
            f"'{path}' is broken ({error}); run `springtide calibrate` again or delete the file."
        ) from None
    if version > VERSION:
        raise SpringtideError(
            f"'{path}' is of a newer version of Springtide; update Springtide, or run `springtide calibrate` again."
        )
    return content
