"""Perplexity of held-out text, teacher-forced through the decode path, and how far predictions are from dense ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
) -> Iterator[Callable[[], list[Perplexity]]]:
    """Score the second half of ``windows`` windows of ``length`` tokens spread over ``text``.

    The first half of a window is read once as a prompt; each policy decodes the second half from a copy of that cache,
    all of them side by side. Yields after every scored token what gives the rows of those so far.
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
    scored: list[Tensor] = []  # of each token: [policy, 2], its loss and the divergence from dense predictions

    def rows() -> list[Perplexity]:
        losses, divergences = torch.stack(scored).unbind(-1)
        values = losses.mean(0).exp().tolist()
        found = []
        for i, (name, policy) in enumerate(zip(labels(policies), policies, strict=True)):
            ratio = kl = curve = None
            if dense is not None:
                own = divergences[:, i]
                ratio, kl, curve = values[i] / values[dense], own.mean().item(), _curve(own, length - half)
            found.append(Perplexity(name, policy.budget_at(length), len(scored), values[i], ratio, kl, curve))
        return found

    for window in range(windows):
        start = round(window * (len(text) - length) / max(1, windows - 1))
        tokens = text[start : start + length]
        reader = engine.read(tokens[:half])
        streams = [_rows(engine.using(policy).predictions(tokens, half, reader.fork())) for policy in policies]
        for token, logits in zip(tokens[half:], zip(*streams, strict=True), strict=True):
            predicted = torch.stack(logits).log_softmax(-1)
            truth = predicted[dense or 0]  # of no meaning where dense was not measured
            divergences = (truth.exp() * (truth - predicted)).sum(-1)
            scored.append(torch.stack([-predicted[:, token], divergences], -1).double().cpu())
            yield rows


def _rows(blocks: Iterator[Tensor]) -> Iterator[Tensor]:
    """The rows of blocks ``[n, V]``, one by one."""
    for block in blocks:
        yield from block


def _curve(divergences: Tensor, decoded: int) -> list[tuple[int, float]]:
    """Means over stretches of the ``decoded`` tokens of each window; the last stretch and window may be shorter."""
    places, reached = torch.arange(len(divergences)) % decoded, min(decoded, len(divergences))
    ends = [min(start + STRETCH, reached) for start in range(0, reached, STRETCH)]
    return [(end, divergences[places // STRETCH == number].mean().item()) for number, end in enumerate(ends)]
