"""Policies and drafters by name, written ``name`` or ``name:option=value,option=value``.

The value of an option may itself be of that form, in parentheses: ``self:policy=(tidal:budget=256),tokens=6``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, get_type_hints

from springtide.errors import SpringtideError
from springtide.options import options, read

T = TypeVar("T")

REGISTRIES: dict[str, Registry[Any]] = {}  # by noun


class Registry(Generic[T]):
    """Dataclasses by the names that users give them.

    Attributes:
        noun: what they are, ``"policy"``; there is one registry for it.
        kinds: the classes; their options are their fields, see :mod:`springtide.options`.
    """

    def __init__(self, noun: str, kinds: Mapping[str, type[T]]) -> None:
        self.noun = noun
        self.kinds = dict(kinds)
        REGISTRIES[noun] = self

    def parse(self, text: str, **defaults: Any) -> T:
        """What ``text`` describes; ``defaults`` are for options that it leaves out, where the class has them.

        Raises SpringtideError for an unknown name, option or value.
        """
        name, values = self.read(text)
        cls = self.kinds[name]
        known = {option.name for option in options(cls)}
        return cls(**{name: value for name, value in defaults.items() if name in known} | values)

    def read(self, text: str) -> tuple[str, dict[str, Any]]:
        """The name in ``text``, and the values of the options that it gives; raises SpringtideError."""
        name, colon, rest = text.strip().partition(":")
        if name not in self.kinds:
            raise SpringtideError(f"Unknown {self.noun} '{name}': choose one of {', '.join(self.kinds)}.")
        types = get_type_hints(self.kinds[name], include_extras=True)
        known = [option.name for option in options(self.kinds[name])]
        title = f"{self.noun.capitalize()} '{name}'"
        if colon and not rest.strip():
            raise SpringtideError(f"{title}: write '{name}:OPTION=VALUE', or '{name}' without the colon.")
        values: dict[str, Any] = {}
        for item in _cut(rest) if colon else ():
            key, equals, value = (part.strip() for part in item.partition("="))
            if key in values:
                raise SpringtideError(f"{title}: '{key}' is given twice; give it once.")
            if key and key not in known:
                listed = ", ".join(known) if known else "none"
                raise SpringtideError(f"{title} has no option '{key}'; its options are: {listed}.")
            if not key or not equals or not value:
                raise SpringtideError(f"{title}: write '{key or 'OPTION'}=VALUE', not '{item.strip()}'.")
            values[key] = read(types[key], value, f"{name}: {key}")
        return name, values


@dataclass(frozen=True)
class Nested:
    """Annotates the type of an option that is given in the form of this module, such as ``(tidal:budget=256)``.

    ``noun`` says which registry reads it, so that rooms which do not import each other can name each other's things.
    ``late``: the text stays one, for whoever knows what it may name beside.
    """

    noun: str
    late: bool = False

    def parse(self, text: str) -> Any:
        """What ``text`` describes; the parentheses may be left out of a name alone. Raises SpringtideError."""
        inner = text[1:-1] if text.startswith("(") and text.endswith(")") else text
        if self.late:
            return inner
        if inner is text and ":" in text:
            raise SpringtideError(f"A {self.noun} with options that is itself an option's value is written '({text})'.")
        return REGISTRIES[self.noun].parse(inner)


def split(text: str, folders: bool = False) -> list[str]:
    """Cut ``"dense,tidal:budget=64,sinks=4,quest"`` at its commas, less those between options and in parentheses.

    ``folders``: what is a folder's path stays whole, whatever is in it. Raises SpringtideError for parentheses that do
    not match.
    """
    parts: list[str] = []
    pieces = _cut(text)
    while pieces:
        count = next((n for n in range(len(pieces), 0, -1) if folders and is_folder(",".join(pieces[:n]))), 1)
        part = ",".join(pieces[:count]).strip()
        del pieces[:count]
        if parts and ":" in parts[-1] and re.match(r"[\w-]+\s*=", part):
            parts[-1] += f",{part}"
        elif part:
            parts.append(part)
    return parts


def is_folder(text: str) -> bool:
    """Whether ``text``, of any length, is the path of a folder that exists."""
    return bool(text.strip()) and os.path.isdir(os.path.expanduser(text.strip()))


def _cut(text: str) -> list[str]:
    """``text`` cut at the commas that are not in parentheses."""
    parts, depth = [""], 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if depth < 0:
            break
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    if depth != 0:
        raise SpringtideError(f"The parentheses in '{text.strip()}' do not match; close each one that is opened.")
    return parts
