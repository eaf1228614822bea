"""Attention policies by name."""

from __future__ import annotations

import types
from typing import Any, Literal, get_args, get_origin, get_type_hints

from springtide.attention.baselines import Oracle, Quest, Streaming
from springtide.attention.policy import Policy
from springtide.attention.tidal import Tidal
from springtide.errors import SpringtideError
from springtide.options import KVHead, Share, at_least, options

POLICIES: dict[str, type[Policy]] = {cls.name: cls for cls in (Policy, Tidal, Quest, Streaming, Oracle)}


def parse_policy(text: str, budget: int | Share | None = None) -> Policy:
    """A policy from ``name`` or ``name:option=value,option=value``; lists of layers are joined by ``+``.

    ``budget`` is used by policies that have one and whose text does not set it. Raises SpringtideError for an
    unknown name, option or value.
    """
    name, _, rest = text.strip().partition(":")
    if name not in POLICIES:
        raise SpringtideError(f"Unknown policy '{name}': choose one of {', '.join(POLICIES)}.")
    cls = POLICIES[name]
    types_by_name = get_type_hints(cls)
    known = [option.name for option in options(cls)]
    values: dict[str, Any] = {}
    for item in filter(None, rest.split(",")):
        key, equals, value = (part.strip() for part in item.partition("="))
        if key not in known:
            listed = ", ".join(known) if known else "none"
            raise SpringtideError(f"Policy '{name}' has no option '{key}'; its options are: {listed}.")
        if not equals or not value:
            raise SpringtideError(f"Policy '{name}': write '{key}=VALUE', not '{item}'.")
        values[key] = _convert(f"{name}: {key}", types_by_name[key], value)
    if budget is not None and "budget" in known:
        values.setdefault("budget", budget)
    return cls(**values)


def split_policies(text: str) -> list[str]:
    """Cut ``"dense,tidal:budget=64,sinks=4,quest"`` into policies: a part with ``=`` and no ``:`` goes on the last."""
    parts: list[str] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        if "=" in part and ":" not in part and parts:
            parts[-1] += "," + part
        else:
            parts.append(part)
    return parts


def parse_budget(text: str) -> int | Share:
    """``"256"`` tokens or ``"5%"`` of the context, from ``--budget``. Raises SpringtideError for anything else."""
    budget: int | Share = _convert("--budget", int | Share, text.strip())
    at_least(budget, 1, "--budget")
    return budget


def _convert(where: str, kind: Any, value: str) -> Any:
    shares = False
    if get_origin(kind) is types.UnionType:
        if value == "none" and type(None) in get_args(kind):
            return None
        shares = Share in get_args(kind)
        kind = next(option for option in get_args(kind) if option not in (type(None), Share))
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise SpringtideError(f"{where} is '{value}', but it must be one of {', '.join(get_args(kind))}.")
        return value
    try:
        if shares and "%" in value:
            return Share.parse(value)
        if get_origin(kind) is tuple:
            read = KVHead.parse if get_args(kind)[0] is KVHead else int
            return tuple(read(part) for part in value.split("+"))
        return int(value)
    except ValueError:
        wanted = "a whole number"
        if get_origin(kind) is tuple:
            wanted = "heads as layer.head joined by +" if get_args(kind)[0] is KVHead else "whole numbers joined by +"
        wanted += ", or a share such as 5%" if shares else ""
        raise SpringtideError(f"{where} is '{value}', but it must be {wanted}.") from None
