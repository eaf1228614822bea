"""What holds for all tests."""

from __future__ import annotations

from itertools import count

import pytest

NUMBERS = count()


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def no_costs_at_home(cache, monkeypatch):
    """What rows cost is not kept in the user's home."""
    monkeypatch.setattr("springtide.model.cost.FILE", cache / "costs.json")


@pytest.fixture(autouse=True)
def calibrations(cache, monkeypatch):
    """Where brief calibrations are kept: not in the user's home, and anew for every test."""
    folder = cache / f"calibrations-{next(NUMBERS)}"
    monkeypatch.setattr("springtide.loading.CALIBRATIONS", folder)
    return folder
