"""What holds for all tests."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def no_costs_at_home(cache, monkeypatch):
    """What rows cost is not kept in the user's home."""
    monkeypatch.setattr("springtide.engine.cost.FILE", cache / "costs.json")
