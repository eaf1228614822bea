"""Options of policies and drafters: fields of a dataclass, each with the sentence that documents it."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from springtide.errors import SpringtideError


def option(default: Any, help: str) -> Any:
    """A dataclass field with the sentence that documents it wherever options are listed."""
    return field(default=default, metadata={"help": help})


def at_least(value: int, low: int, owner: str, name: str) -> None:
    """Raise SpringtideError unless ``value`` of the option ``name`` of ``owner`` is at least ``low``."""
    if value < low:
        raise SpringtideError(f"{owner}: {name} is {value}, but it must be at least {low}.")
