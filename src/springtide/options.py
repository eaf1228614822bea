"""Options of policies and drafters: fields of a dataclass, each with the sentence that documents it."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import Field, dataclass, field, fields
from numbers import Integral
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self, Union, get_args, get_origin

from springtide.errors import SpringtideError


def option(default: Any, help: str) -> Any:
    """A dataclass field with the sentence that documents it wherever options are listed.

    Its type may be int, float, bool, a Literal, a class of this module, or None beside them; a tuple of them, joined by
    ``+``; or ``Annotated[Any, Nested("policy")]``, see :class:`springtide.registry.Nested`.
    """
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
        if not text.endswith("%"):
            raise ValueError(text)
        return cls(_finite(text[:-1]))

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


class Size(int):
    """A number of bytes, written ``2GiB``, ``512MiB`` or ``100MB``."""

    units: ClassVar[dict[str, int]] = {
        **{f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", start=1)},
        **{f"{prefix}B": 1000**power for power, prefix in enumerate("kMGT", start=1)},
        "B": 1,
    }

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``2GiB``; raises ValueError for a number without a unit, and for anything else."""
        unit = next((unit for unit in cls.units if text.endswith(unit)), None)
        if unit is None or (number := _finite(text.removesuffix(unit))) < 0:
            raise ValueError(text)
        return cls(round(number * cls.units[unit]))

    def __str__(self) -> str:
        """In the largest unit of which it is a whole number."""
        fitting = {unit: size for unit, size in self.units.items() if self % size == 0 and self >= size}
        unit = max(fitting, key=fitting.__getitem__, default="B")
        return f"{self // self.units[unit]}{unit}"


def read(kind: Any, text: str, where: str) -> Any:
    """``text`` as a value of an option's type ``kind``; raises SpringtideError, which names the option as ``where``."""
    try:
        return _value(kind, text)
    except ValueError:
        raise SpringtideError(f"{where} is '{text}', but it must be {_form(kind)}.") from None


def spelled(value: Any) -> str:
    """The text that :func:`read` reads as ``value``; for an empty tuple, which has none, ``-``."""
    if isinstance(value, tuple) and not isinstance(value, KVHead):
        return "+".join(map(spelled, value)) or "-"
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _value(kind: Any, text: str) -> Any:
    """Raises ValueError for what is no such value."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        for each in sorted(inner, key=lambda each: each is not NoneType):
            with suppress(ValueError):
                return _value(each, text)
        raise ValueError(text)
    if origin is tuple:
        return tuple(_value(inner[0], part) for part in text.split("+"))
    if origin is Literal:
        return _among({str(value): value for value in inner}, text)
    if origin is Annotated:
        return inner[1].parse(text)
    return _KINDS[kind][0](text)


def _form(kind: Any, plural: bool = False) -> str:
    """What the text of such a value is, for messages."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return ", or ".join(_form(each, plural) for each in inner if each is not NoneType)
    if origin is tuple:
        return f"{_form(inner[0], plural=True)} joined by +"
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    _, one, several = _KINDS[kind]
    return several if plural else one


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(text)
    return number


def _among(values: dict[str, Any], text: str) -> Any:
    if text not in values:
        raise ValueError(text)
    return values[text]


_KINDS: dict[Any, tuple[Callable[[str], Any], str, str]] = {  # how each is read, and what one and several are called
    int: (int, "a whole number", "whole numbers"),
    float: (_finite, "a number", "numbers"),
    bool: (lambda text: _among({"true": True, "false": False}, text), "true or false", "true or false"),
    NoneType: (lambda text: _among({"none": None}, text), "none", "none"),
    Share: (Share.parse, "a share such as 5%", "shares such as 5%"),
    KVHead: (KVHead.parse, "a head as layer.head", "heads as layer.head"),
    Size: (Size.parse, "a size such as 512MiB or 2GiB", "sizes such as 512MiB or 2GiB"),
}


def amount(value: int | Share, whole: int) -> int:
    """``value`` tokens, or that share of ``whole``."""
    return value.of(whole) if isinstance(value, Share) else value


def at_least(value: int | Share, low: int, name: str) -> None:
    """Raise SpringtideError unless ``value`` of the option ``name`` is a whole number, at least ``low``.

    A share must be above 0 % where ``low`` is above 0, and at most 100 %.
    """
    if isinstance(value, Share):
        if not 0 <= value.percent <= 100 or (low > 0 and value.percent == 0):
            above = "above 0%" if low > 0 else "at least 0%"
            raise SpringtideError(f"{name} is {value}, but a share must be {above} and at most 100%.")
    elif not isinstance(value, Integral):
        raise SpringtideError(f"{name} is {value!r}, but it must be a whole number.")
    elif value < low:
        raise SpringtideError(f"{name} is {value}, but it must be at least {low}.")
