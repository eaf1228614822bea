"""Attention policies by name."""

from __future__ import annotations

from springtide.attention.baselines import Oracle, Quest, Streaming
from springtide.attention.policy import Policy
from springtide.attention.tidal import Tidal
from springtide.options import Share, at_least, read
from springtide.registry import Registry

POLICIES: Registry[Policy] = Registry("policy", {cls.name: cls for cls in (Policy, Tidal, Quest, Streaming, Oracle)})


def parse_policy(text: str, budget: int | Share | None = None) -> Policy:
    """A policy from ``name`` or ``name:option=value,option=value``, see :mod:`springtide.registry`.

    ``budget`` is used by policies that have one and whose text does not set it. Raises SpringtideError for an
    unknown name, option or value.
    """
    return POLICIES.parse(text, **({} if budget is None else {"budget": budget}))


def parse_budget(text: str) -> int | Share:
    """``"256"`` tokens or ``"5%"`` of the context, from ``--budget``. Raises SpringtideError for anything else."""
    budget: int | Share = read(int | Share, text.strip(), "--budget")
    at_least(budget, 1, "--budget")
    return budget
