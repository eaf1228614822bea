"""From logits to a token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor

from springtide.errors import SpringtideError

Acceptance = Literal["exact", "typical"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen and when to stop.

    Attributes:
        max_tokens: most tokens to generate.
        temperature: 0 takes the most probable token; else logits are divided by it.
        top_p: sample among the most probable tokens whose probabilities reach this sum (1 keeps all).
        top_k: sample among this many most probable tokens (0 keeps all).
        min_p: drop tokens less probable than this share of the most probable one (0 keeps all).
        repetition_penalty: divides positive and multiplies negative logits of tokens seen so far (1 changes nothing).
        seed: noise is keyed by seed and position, so the same request gives the same text in any batch.
        stop: text that ends the output; it is not part of it.
        ignore_eos: go on after the end-of-sequence token.
        accept: which tokens of a draft are kept. "exact" leaves the output as it is without a drafter; "typical" is
            lossy: it keeps what is probable enough, and needs a temperature (see :mod:`springtide.drafting.accept`).
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    accept: Acceptance = "exact"

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop))
        for holds, rule in (
            (self.max_tokens >= 1, "max_tokens must be at least 1"),
            (self.temperature >= 0, "temperature must be 0 (greedy) or more"),
            (0 < self.top_p <= 1, "top_p must be above 0 and at most 1"),
            (self.top_k >= 0, "top_k must be 0 (off) or more"),
            (0 <= self.min_p <= 1, "min_p must be between 0 and 1"),
            (self.repetition_penalty > 0, "repetition_penalty must be above 0"),
            (all(self.stop), "a stop string must not be empty"),
            (self.accept in get_args(Acceptance), f"accept must be one of {', '.join(get_args(Acceptance))}"),
            (
                self.accept != "typical" or self.temperature > 0,
                "typical acceptance needs a temperature above 0; set one, or accept exactly",
            ),
        ):
            if not holds:
                raise SpringtideError(f"Sampling: {rule}.")

    @classmethod
    def of(cls, **options: Any) -> Self:
        """From keyword arguments; raises SpringtideError for a name that does not exist."""
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                raise SpringtideError(f"Unknown generation option '{name}'; the options are: {', '.join(known)}.")
        return cls(**options)


def sample(logits: Tensor, sampling: Sampling, history: Sequence[int], position: int) -> int:
    """The token at ``position``, given ``logits [V]`` and the tokens before it.

    Sampling adds Gumbel noise to the log-probabilities and takes the largest: a draw from the distribution that
    depends on nothing but seed and position, so that drafting and batching do not change it.
    """
    if sampling.temperature == 0.0:
        return int(_penalised(logits, sampling.repetition_penalty, history).argmax())
    log_probs = distribution(logits, sampling, history)
    return int((log_probs.cpu() + gumbel(len(logits), sampling.seed, position)).argmax())


def distribution(logits: Tensor, sampling: Sampling, history: Sequence[int]) -> Tensor:
    """Log-probabilities ``[V]`` (fp64) that a token is drawn from after ``history``; the temperature is above 0."""
    logits = _penalised(logits, sampling.repetition_penalty, history)
    return filtered(logits.double() / sampling.temperature, sampling)


def filtered(logits: Tensor, sampling: Sampling) -> Tensor:
    """Log-probabilities ``[V]`` after top-k, top-p and min-p in this order (transformers' order); dropped: -inf."""
    if 0 < sampling.top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[-1], -torch.inf)
    if sampling.top_p < 1.0:
        probs, order = logits.softmax(-1).sort(descending=True)
        beyond = probs.cumsum(-1) - probs >= sampling.top_p
        logits = logits.index_fill(0, order[beyond], -torch.inf)
    if sampling.min_p > 0.0:
        probs = logits.softmax(-1)
        logits = logits.masked_fill(probs < sampling.min_p * probs.max(), -torch.inf)
    return logits.log_softmax(-1)


def gumbel(size: int, seed: int, position: int) -> Tensor:
    """Standard Gumbel noise ``[size]`` (fp64, CPU) that seed and position determine."""
    generator = torch.Generator().manual_seed(hash((seed, position)) & (2**63 - 1))
    return -torch.empty(size, dtype=torch.float64).exponential_(generator=generator).log()


def _penalised(logits: Tensor, penalty: float, history: Sequence[int]) -> Tensor:
    if penalty == 1.0:
        return logits
    seen, logits = torch.tensor(sorted(set(history)), device=logits.device), logits.double()
    values = logits[seen]
    return logits.index_copy(0, seen, torch.where(values > 0, values / penalty, values * penalty))
