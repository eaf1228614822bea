"""The user's folders, as the XDG Base Directory Specification has them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def cache_home() -> Path:
    """For what can be made again: ``$XDG_CACHE_HOME/springtide``, which is ``~/.cache/springtide`` unless it is set."""
    return _home("XDG_CACHE_HOME", ".cache")


def data_home() -> Path:
    """For what took the user's time: ``$XDG_DATA_HOME/springtide``, ``~/.local/share/springtide`` unless it is set."""
    return _home("XDG_DATA_HOME", ".local/share")


def _home(variable: str, default: str) -> Path:
    wanted = os.environ.get(variable, "")
    if os.path.isabs(wanted):  # the specification has others ignored
        return Path(wanted) / "springtide"
    try:
        return Path.home() / default / "springtide"
    except RuntimeError:  # a user without a home, as in some containers
        return Path(tempfile.gettempdir()) / f"springtide-{os.getuid()}"
