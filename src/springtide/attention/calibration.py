"""The file ``springtide.json`` beside a model: what calibration found out about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from springtide.errors import SpringtideError

FILE = "springtide.json"


def read_calibration(folder: Path) -> dict[str, Any] | None:
    """The content of the folder's ``springtide.json``, None if there is none.

    Raises SpringtideError if it is not what :mod:`springtide.evaluation.calibrate` writes.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        layout = content["tidal"]
        layers = [*layout["full"], *layout["select"]]
        if not layout["select"] or not all(isinstance(layer, int) for layer in layers):
            raise ValueError("the layers are not whole numbers")
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise SpringtideError(
            f"'{path}' is broken ({error}); run `springtide calibrate` again or delete the file."
        ) from None
    return content
