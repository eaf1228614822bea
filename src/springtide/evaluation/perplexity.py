"""Perplexity of held-out text, teacher-forced through the decode path."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from springtide.attention.policy import Policy
from springtide.engine.engine import Engine
from springtide.errors import SpringtideError
from springtide.evaluation.report import labels


@dataclass(frozen=True)
class Perplexity:
    """Perplexity over ``tokens`` scored tokens; ``ratio_to_dense`` is None where dense was not measured."""

    policy: str
    budget: int | None
    tokens: int
    perplexity: float
    ratio_to_dense: float | None


def perplexity(
    engine: Engine, text: list[int], policies: Sequence[Policy], length: int, windows: int
) -> Iterator[list[Perplexity] | None]:
    """Score the second half of ``windows`` windows of ``length`` tokens spread over ``text``.

    The first half of a window is read once as a prompt; each policy decodes the second half from a copy of that cache.
    Yields None after every window and policy, for progress, and the result last.
    """
    if length < 2:
        raise SpringtideError(f"A length of {length} leaves nothing to predict; use 2 or more.")
    limit = engine.stack.spec.context_limit
    if length >= limit:
        raise SpringtideError(f"The model's context holds {limit} tokens; use a --length below that, not {length}.")
    if len(text) < length:
        raise SpringtideError(f"The text has {len(text)} tokens, but a window needs {length}; use a shorter --length.")
    half = length // 2
    losses: list[list[torch.Tensor]] = [[] for _ in policies]
    for window in range(windows):
        start = round(window * (len(text) - length) / max(1, windows - 1))
        tokens = text[start : start + length]
        reader = engine.read(tokens[:half])
        for policy, found in zip(policies, losses, strict=True):
            found.append(-engine.using(policy).score(tokens, prefill=half, reuse=reader.fork()))
            yield None
    values = [math.exp(torch.cat(found).double().mean().item()) for found in losses]
    dense = next((v for p, v in zip(policies, values, strict=True) if p.name == "dense"), None)
    count = windows * (length - half)
    yield [
        Perplexity(name, getattr(p, "budget", None), count, value, None if dense is None else value / dense)
        for name, p, value in zip(labels(policies), policies, values, strict=True)
    ]
