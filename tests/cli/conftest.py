"""What the tests of the command line share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import springtide
from folders import BOOK, PROMPT, save_drafter, save_model
from springtide.attention.calibration import VERSION


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory) -> Path:
    folder = save_model(tmp_path_factory.mktemp("calibrated"))
    tidal = {"full": [0], "select": [1], "map": {"2": [1, 0], "3": [1, 1]}}
    (folder / "springtide.json").write_text(json.dumps({"version": VERSION, "tidal": tidal}))
    return folder


@pytest.fixture(scope="module")
def book(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text(BOOK, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def expected(folder) -> springtide.Output:
    return springtide.load(folder).generate(PROMPT, max_tokens=12)


@pytest.fixture(scope="module")
def drafter(folder, tmp_path_factory) -> Path:
    return save_drafter(tmp_path_factory.mktemp("drafter"), folder)


@pytest.fixture
def no_loading(monkeypatch) -> None:
    """The command must end before it loads a model."""
    monkeypatch.setattr("springtide.loading.load", lambda *_, **__: pytest.fail("loaded a model"))
