"""One sequence that is being read or written, and what it knows of itself."""

from __future__ import annotations

import time
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from springtide.attention.policy import State
from springtide.rows.cache import Cache
from springtide.rows.sampling import Sampling
from springtide.rows.segment import PromptEmbeds

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass
class Stats:
    """Figures of one request.

    ``ttft_ms``: from the request to its first token. ``tpot_ms``: mean time of a token after the first, None if there
    is none. ``kv_bytes_per_token``: mean bytes of the KV cache read for a token after the prompt, None likewise.
    ``passes``: of the model, after the prompt's. ``drafted_tokens`` were tried in them, ``accepted_tokens`` kept.
    ``acceptance_length``: mean tokens that such a pass gave, its own one counted; None if there was none.
    """

    prompt_tokens: int
    completion_tokens: int
    ttft_ms: float
    tpot_ms: float | None
    tokens_per_second: float | None
    kv_bytes_per_token: float | None
    passes: int
    drafted_tokens: int
    accepted_tokens: int
    acceptance_length: float | None


@dataclass
class Request:
    """Tokens, their cache and the policy's state: everything that is needed to go on, in one place.

    ``state`` is the policy's and ``draft`` the drafter's. ``embeds`` gives the first rows as vectors; their tokens hold
    their places. ``tokens[:cache.length]`` are in the cache. Tokens before
    ``prefill_end`` are computed as a prompt; later ones, and all generated ones, as decoding. ``output_start`` is where
    the present request's output begins. Of the tokens that were ``drafted``, ``accepted`` are in the output; it took
    ``passes`` passes after the prompt's. ``from_draft`` says of each token of the output whether it was drafted.
    """

    tokens: list[int]
    cache: Cache
    state: State
    draft: Any
    sampling: Sampling
    prefill_end: int
    output_start: int
    embeds: PromptEmbeds | None = None
    finish_reason: FinishReason | None = None
    text: str = ""
    started: float = field(default_factory=time.perf_counter)
    first_token: float | None = None
    last_token: float | None = None
    decode_bytes: int = 0
    decoded: int = 0
    drafted: int = 0
    accepted: int = 0
    passes: int = 0
    from_draft: list[bool] = field(default_factory=list)

    @property
    def output(self) -> list[int]:
        return self.tokens[self.output_start :]

    @property
    def span(self) -> int:
        """Positions that the tokens take."""
        return len(self.tokens) + (0 if self.embeds is None else self.embeds.gaps)

    @property
    def prefilling(self) -> bool:
        """Whether prompt tokens are still to be computed."""
        return self.cache.length < self.prefill_end

    def crop(self, length: int) -> None:
        """Forget what is cached of the tokens from position ``length`` on; the tokens themselves stay."""
        self.cache.crop(length)
        self.state.crop(self.cache.length)

    def fork(self) -> Request:
        """An independent sequence that goes on from the same tokens."""
        return replace(
            self,
            tokens=list(self.tokens),
            cache=self.cache.fork(),
            state=copy(self.state),
            draft=copy(self.draft),
            from_draft=list(self.from_draft),
        )

    def stats(self) -> Stats:
        """Figures up to now."""
        count = len(self.output)
        first, last = self.first_token or self.started, self.last_token or self.started
        tpot = (last - first) / (count - 1) if count > 1 else None
        return Stats(
            prompt_tokens=self.output_start,
            completion_tokens=count,
            ttft_ms=1e3 * (first - self.started),
            tpot_ms=None if tpot is None else 1e3 * tpot,
            tokens_per_second=1 / tpot if tpot else None,
            kv_bytes_per_token=self.decode_bytes / self.decoded if self.decoded else None,
            passes=self.passes,
            drafted_tokens=self.drafted,
            accepted_tokens=self.accepted,
            acceptance_length=(count - 1) / self.passes if self.passes else None,
        )
