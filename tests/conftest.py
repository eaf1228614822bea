"""What holds for all tests."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before it is read, so that no test asks for a network

from folders import save_model
from springtide import cli

NUMBERS = count()


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def home(cache, monkeypatch):
    """The user's folders, anew for every test; but what rows cost is measured once, since it takes a second."""
    folder = cache / f"home-{next(NUMBERS)}"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.setenv("XDG_DATA_HOME", str(folder / "data"))
    monkeypatch.setattr("springtide.model.cost.place", lambda: cache / "costs.json")
    return folder


@pytest.fixture
def calibrations(home):
    """Where brief calibrations are kept."""
    return home / "cache" / "springtide" / "calibrations"


@dataclass
class Result:
    code: int
    out: str
    err: str

    def refused(self, *parts: str) -> Result:
        """It ended with code 2, and one line on standard error that holds every one of ``parts``."""
        assert self.code == 2
        assert self.out == ""
        assert self.err.startswith("springtide: ") and self.err.endswith(".\n") and self.err.count("\n") == 1
        assert all(part in self.err for part in parts), self.err
        return self


Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch, capsys) -> Run:
    """Run the command line; ``stdin`` is text or bytes, None for a terminal at which nobody types."""

    def run(*arguments: object, stdin: str | bytes | None = None) -> Result:
        raw = stdin.encode() if isinstance(stdin, str) else stdin or b""
        typed = io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8")
        monkeypatch.setattr(typed, "isatty", lambda: stdin is None, raising=False)
        monkeypatch.setattr("sys.stdin", typed)
        monkeypatch.setattr("sys.argv", ["springtide", *map(str, arguments)])
        capsys.readouterr()
        code: object = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        assert isinstance(code, int)
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def fresh(tmp_path) -> Path:
    """A model folder to break."""
    return save_model(tmp_path / "model")
