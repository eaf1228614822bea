"""The file ``springtide.json`` beside a model: what calibration found out about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from springtide.errors import SpringtideError
from springtide.files import reason

FILE = "springtide.json"
VERSION = 2


def read_calibration(folder: Path) -> dict[str, Any] | None:
    """The content of the folder's ``springtide.json``, None if there is none.

    Raises SpringtideError if it is not what :mod:`springtide.evaluation.calibrate` writes.
    """
    return read_file(folder / FILE)


def read_file(path: Path) -> dict[str, Any] | None:
    """The same of a file of any name."""
    if path.is_dir():
        raise SpringtideError(f"'{path}' is a folder, but must be the file that calibration writes; move it away.")
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpringtideError(f"'{path}' cannot be read ({reason(error)}); make it readable, or delete it.") from None
    except UnicodeDecodeError:
        raise _broken(path, "it is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise _broken(path, f"it is no JSON, line {error.lineno}") from None
    fault = _fault(content)
    if fault is not None:
        raise _broken(path, fault)
    if content.get("version", 1) > VERSION:
        raise SpringtideError(
            f"'{path}' is of a newer version of Springtide; update Springtide, or run `springtide calibrate` again."
        )
    found: dict[str, Any] = content
    return found


def _broken(path: Path, fault: str) -> SpringtideError:
    return SpringtideError(f"'{path}' is broken ({fault}); run `springtide calibrate` again or delete the file.")


def _fault(content: Any) -> str | None:
    """What keeps the content from being a calibration of this version, None if it is one or of a newer version."""
    if not isinstance(content, dict):
        return "it holds no JSON object"
    version, layout = content.get("version", 1), content.get("tidal")
    if type(version) is not int:
        return "its version is not a whole number"
    if version > VERSION:
        return None
    if not isinstance(layout, dict):
        return "it has no layers for tidal"
    for role in ("full", "select"):
        if not _numbers(layout.get(role)):
            return f"{role} is no list of layers"
    if not layout["select"]:
        return "no layer selects"
    pairs, heads = layout.get("full_heads", []), layout.get("map", {})
    if not isinstance(pairs, list) or not all(_numbers(pair) and len(pair) == 2 for pair in pairs):
        return "full_heads are no pairs of a layer and a head"
    if not isinstance(heads, dict) or not all(key.isdigit() and _numbers(own) for key, own in heads.items()):
        return "map holds no lists of KV heads by layer"
    return None


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int for number in value)
