"""Options of policies and drafters: fields of a dataclass, each with the sentence that documents it."""

from __future__ import annotations

import math
from dataclasses import Field, dataclass, field, fields
from typing import Any, NamedTuple, Self

from springtide.errors import SpringtideError


def option(default: Any, help: str) -> Any:
    """A dataclass field with the sentence that documents it wherever options are listed."""
    return field(default=default, metadata={"help": help})


def options(cls: type[Any]) -> list[Field[Any]]:
    """The fields of a dataclass that are options; calibration sets others."""
    return [each for each in fields(cls) if "help" in each.metadata]


@dataclass(frozen=True)
class Share:
    """A number of tokens given as a percentage of others: ``5%`` of the context."""

    percent: float

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``5%``; raises ValueError for anything else."""
        if not text.endswith("%") or not math.isfinite(percent := float(text[:-1])):
            raise ValueError(text)
        return cls(percent)

    def of(self, tokens: int) -> int:
        """The share of ``tokens``, rounded up."""
        return math.ceil(self.percent * tokens / 100 - 1e-9)

    def __str__(self) -> str:
        return f"{self.percent:g}%"


class KVHead(NamedTuple):
    """A KV head of a layer, written ``layer.head``, both counted from 0."""

    layer: int
    head: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``8.2``; raises ValueError for anything else."""
        layer, head = text.split(".")
        return cls(int(layer), int(head))

    def __str__(self) -> str:
        return f"{self.layer}.{self.head}"


def amount(value: int | Share, whole: int) -> int:
    """``value`` tokens, or that share of ``whole``."""
    return value.of(whole) if isinstance(value, Share) else value


def at_least(value: int | Share, low: int, name: str) -> None:
    """Raise SpringtideError unless ``value`` of the option ``name`` is at least ``low``.

    A share must be above 0 % where ``low`` is above 0, and at most 100 %.
    """
    if isinstance(value, Share):
        if not 0 <= value.percent <= 100 or (low > 0 and value.percent == 0):
            above = "above 0%" if low > 0 else "at least 0%"
            raise SpringtideError(f"{name} is {value}, but a share must be {above} and at most 100%.")
    elif value < low:
        raise SpringtideError(f"{name} is {value}, but it must be at least {low}.")
