"""The user's folders, wherever they are."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from springtide.places import cache_home, data_home

HOMES = {"XDG_CACHE_HOME": (cache_home, ".cache"), "XDG_DATA_HOME": (data_home, ".local/share")}


@pytest.mark.parametrize("variable", HOMES)
def test_a_folder_that_is_named(variable, tmp_path, monkeypatch):
    monkeypatch.setenv(variable, str(tmp_path))
    assert HOMES[variable][0]() == tmp_path / "springtide"


@pytest.mark.parametrize("variable", HOMES)
@pytest.mark.parametrize("value", [None, "", "relative/folder"])
def test_else_those_at_home(variable, value, tmp_path, monkeypatch):
    monkeypatch.delenv(variable)
    if value is not None:
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("HOME", str(tmp_path))
    home, default = HOMES[variable]
    assert home() == tmp_path / default / "springtide"


def test_a_machine_without_homes(monkeypatch):
    for variable in HOMES:
        monkeypatch.delenv(variable)
    monkeypatch.setattr(Path, "home", homeless)
    own = Path(tempfile.gettempdir()) / f"springtide-{os.getuid()}"
    assert cache_home() == data_home() == own


def homeless():
    raise RuntimeError("Could not determine home directory.")


def test_nothing_looks_for_a_home_when_it_is_imported():
    """In a process of its own, in which whoever asks for a home gets an error."""
    modules = "loading", "model.cost", "benchmarks.peers", "cli", "evaluation.brief", "integrations.transformers"
    code = (
        "from pathlib import Path\n"
        "def homeless(): raise RuntimeError('Could not determine home directory.')\n"
        "Path.home = homeless\n" + "\n".join(f"import springtide.{name}" for name in modules)
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
