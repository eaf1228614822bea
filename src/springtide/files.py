"""The bundled text, and files that are whole or not there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from springtide.errors import SpringtideError

EXCERPT = Path(__file__).parent / "data" / "excerpt.txt"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Another path, to be written in the block, which then takes the place of ``path``.

    Nothing is left of it when the block raises. Raises SpringtideError when the file cannot be written.
    """
    temporary = path.with_name(path.name + ".writing")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise SpringtideError(f"'{path}' cannot be written ({reason(error)}); choose another place.") from None
    finally:
        if path.parent.is_dir():
            temporary.unlink(missing_ok=True)


@contextmanager
def filling(folder: Path) -> Iterator[Path]:
    """Another folder, to be written to in the block, whose files then replace those in ``folder``; others stay.

    Nothing is left of it when the block raises. Raises SpringtideError when a file cannot be written.
    """
    temporary = folder.with_name(folder.name + ".writing")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        for path in sorted(path for path in temporary.rglob("*") if path.is_file()):
            place = folder / path.relative_to(temporary)
            place.parent.mkdir(parents=True, exist_ok=True)
            path.chmod(0o644)  # safetensors lets nobody else read
            os.replace(path, place)
    except (OSError, SafetensorError, RuntimeError) as error:  # RuntimeError is torch.save's
        raise SpringtideError(f"'{folder}' cannot be written ({reason(error)}); choose another place.") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def reason(error: Exception) -> str:
    """What went wrong, in a few words: the system's, or the first sentence of the error, on one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split()) or type(error).__name__
    return text.split(". ")[0].rstrip(".:")
