"""The bundled text, and files that are whole or not there."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from springtide.errors import SpringtideError

EXCERPT = Path(__file__).parent / "data" / "excerpt.txt"


@contextmanager
def replacing(path: Path, advice: str = "choose another place", make: bool = False) -> Iterator[Path]:
    """Another path, to be written in the block, which then takes the place of the file ``path``.

    It may become a folder where there is no ``path`` yet. ``make``: the folder that ``path`` lies in, too. Nothing is
    left of it when the block raises. Raises SpringtideError, ending with the ``advice``, when it cannot be written.
    """
    with _beside(path, advice, make) as folder:
        temporary = folder / path.name
        yield temporary
        _move(temporary, path)


@contextmanager
def filling(folder: Path, advice: str = "choose another place") -> Iterator[Path]:
    """Another folder, to be written to in the block, whose files then replace those in ``folder``; others stay.

    Nothing is left of it when the block raises. Raises SpringtideError, ending with the ``advice``, when a file cannot
    be written.
    """
    with _beside(folder, advice, make=True) as temporary:
        yield temporary
        for path in sorted(path for path in temporary.rglob("*") if path.is_file()):
            place = folder / path.relative_to(temporary)
            place.parent.mkdir(parents=True, exist_ok=True)
            path.chmod(0o644)  # safetensors lets nobody else read
            _move(path, place)


@contextmanager
def _beside(path: Path, advice: str, make: bool) -> Iterator[Path]:
    """A folder beside ``path``, of another name than any process has given one, that is gone after the block."""
    folder = None
    try:
        if make:
            path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{path.name}.", suffix=".writing", dir=path.parent))
        yield folder
    except (OSError, SafetensorError, RuntimeError) as error:
        if type(error) is RuntimeError and "iostream error" not in str(error):  # which is what torch.save raises
            raise
        raise SpringtideError(f"'{path}' cannot be written ({reason(error)}); {advice}.") from None
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _move(source: Path, target: Path) -> None:
    """Rename, once the disk has all of a file."""
    if source.is_file():
        with source.open("rb") as file:
            os.fsync(file.fileno())
    os.replace(source, target)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file that was fetched; raises SpringtideError if it is missing or broken."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no JSON object")
    except (ValueError, OSError) as error:
        raise SpringtideError(f"'{path}' is broken ({reason(error)}); get it again.") from None
    return content


def reason(error: Exception) -> str:
    """What went wrong, in a few words: the system's, or the first sentence of the error, on one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split()) or type(error).__name__
    return text.split(". ")[0].rstrip(".:")
