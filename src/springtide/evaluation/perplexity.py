"""Perplexity of held-out text, teacher-forced through the decode path, and how far predictions are from dense ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from springtide.attention.policy import Policy
from springtide.engine.engine import Engine
from springtide.errors import SpringtideError
from springtide.evaluation.report import labels

STRETCH = 128  # decoded tokens whose divergences make one point of the curve


@dataclass(frozen=True)
class Perplexity:
    """Perplexity over ``tokens`` scored tokens.

    ``kl_to_dense`` is the mean KL divergence of the predictions from dense ones, in nats a token, and ``kl_curve`` the
    same for each stretch of decoded tokens, ``[tokens decoded so far, KL]``. Like ``ratio_to_dense`` they are None
    where dense was not measured.
    """

    policy: str
    budget: int | None
    tokens: int
    perplexity: float
    ratio_to_dense: float | None
    kl_to_dense: float | None
    kl_curve: list[tuple[int, float]] | None


def perplexity(
    engine: Engine, text: list[int], policies: Sequence[Policy], length: int, windows: int
) -> Iterator[list[Perplexity] | None]:
    """Score the second half of ``windows`` windows of ``length`` tokens spread over ``text``.

    The first half of a window is read once as a prompt; each policy decodes the second half from a copy of that cache,
    all of them side by side. Yields None after every scored token, for progress, and the result last.
    """
    if length < 2:
        raise SpringtideError(f"A length of {length} leaves nothing to predict; use 2 or more.")
    limit = engine.stack.spec.context_limit
    if length >= limit:
        raise SpringtideError(f"The model's context holds {limit} tokens; use a --length below that, not {length}.")
    if len(text) < length:
        raise SpringtideError(f"The text has {len(text)} tokens, but a window needs {length}; use a shorter --length.")
    half = length // 2
    dense = next((i for i, policy in enumerate(policies) if policy.name == "dense"), None)
    losses = torch.zeros(windows, length - half, len(policies), dtype=torch.float64)
    divergences = torch.zeros_like(losses)
    for window in range(windows):
        start = round(window * (len(text) - length) / max(1, windows - 1))
        tokens = text[start : start + length]
        reader = engine.read(tokens[:half])
        streams = [_rows(engine.using(policy).predictions(tokens, half, reader.fork())) for policy in policies]
        for place, rows in enumerate(zip(*streams, strict=True)):
            predicted = torch.stack(rows).log_softmax(-1)
            losses[window, place] = -predicted[:, tokens[half + place]]
            if dense is not None:
                truth = predicted[dense]
                divergences[window, place] = (truth.exp() * (truth - predicted)).sum(-1)
            yield None
    values = losses.mean((0, 1)).exp().tolist()
    results = []
    for i, (name, policy) in enumerate(zip(labels(policies), policies, strict=True)):
        ratio = kl = curve = None
        if dense is not None:
            ratio, kl, curve = values[i] / values[dense], divergences[..., i].mean().item(), _curve(divergences[..., i])
        results.append(
            Perplexity(name, policy.budget_at(length), windows * (length - half), values[i], ratio, kl, curve)
        )
    yield results


def _rows(blocks: Iterator[Tensor]) -> Iterator[Tensor]:
    """The rows of blocks ``[n, V]``, one by one."""
    for block in blocks:
        yield from block


def _curve(divergences: Tensor) -> list[tuple[int, float]]:
    """Means over windows and stretches of ``divergences [windows, decoded]``; the last stretch may be shorter."""
    means = divergences.mean(0)
    starts = range(0, len(means), STRETCH)
    return [(min(start + STRETCH, len(means)), means[start : start + STRETCH].mean().item()) for start in starts]
