"""One prompt that is being read and completed, and what it knows of itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

from torch import Tensor

from springtide.attention.policy import Policy, State
from springtide.drafting.drafter import Drafter, View
from springtide.engine.text import Detokenizer
from springtide.rows.cache import Cache
from springtide.rows.sampling import Logprob, Sampling, Seen, logprobs
from springtide.rows.segment import Kind, PromptEmbeds, Segment
from springtide.rows.spec import Rope

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass
class Stats:
    """Figures of one request.

    ``cached_tokens`` of the prompt were not computed: another request had done so. ``ttft_ms``: from the request to its
    first token, None if there is none. ``tpot_ms``: mean time of a token after it, None likewise.
    ``kv_bytes_per_token``: mean bytes of the KV cache read for a token after the prompt, None likewise. ``passes``: of
    the model, after the prompt's. ``drafted_tokens`` were tried in them, ``accepted_tokens`` kept.
    ``acceptance_length``: mean tokens that such a pass gave, its own one counted; None if there was none.
    ``predicted_gain``: how many times as fast as plain decoding the drafter was thought to be, by its accuracy and what
    rows cost; ``measured_gain``: what the passes took (the drafter is left out while that is below 1); None where it is
    not known. ``fastest``: what the last passes showed to be so, a way of the drafter or "none"; None likewise.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    ttft_ms: float | None
    tpot_ms: float | None
    tokens_per_second: float | None
    kv_bytes_per_token: float | None
    passes: int
    drafted_tokens: int
    accepted_tokens: int
    acceptance_length: float | None
    predicted_gain: float | None
    measured_gain: float | None
    fastest: str | None


@dataclass(frozen=True)
class Decision:
    """What a pass gave a request: nodes of its tree that stay, and a token for each of them.

    ``text`` has become final with them. ``accepted`` of the tokens, the first ones, were drafted.
    """

    path: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    accepted: int = 0


@dataclass(eq=False)
class Request:
    """Tokens, how they are computed, and all that is needed to go on: cache, policy's state, drafter's state.

    ``embeds`` gives the first rows as vectors; their tokens hold their places. ``tokens[:cache.length]`` are in the
    cache. Tokens before ``prefill_end`` are computed as a prompt; later ones, and all generated ones, as decoding. A
    request that ``lends`` shares rows with others of its session, and leaves its own to them when it ends; those of its
    first ``lent`` tokens were another's. One session at most has ``admitted`` it. ``output_start`` is where the output
    begins. ``writer`` turns it into text. Of the tokens that were ``drafted``, ``accepted`` are in the output; it took
    ``passes`` passes after the prompt's, and ``drafting`` seconds to propose their drafts. ``from_draft`` says of each
    token of the output whether it was drafted. The last draft was made in that ``way`` of its drafter; ``fastest`` is
    the governor's arm that is, as measured.

    With a ``watch`` nothing is generated: it is called with the logits ``[n, V]`` that predict the tokens from
    ``prefill_end`` on, n at a time, and the request ends with its tokens. ``meter`` is called with every sparse read,
    ``record`` with the logits ``[n, V]`` by which tokens were chosen, before these are appended, and the n tokens.
    """

    tokens: list[int]
    sampling: Sampling
    policy: Policy
    drafter: Drafter
    cache: Cache
    prefill_end: int
    output_start: int
    embeds: PromptEmbeds | None = None
    writer: Detokenizer | None = None
    watch: Callable[[Tensor], None] | None = None
    meter: Callable[..., None] | None = None
    record: Callable[[Tensor, list[int]], None] | None = None
    state: State = field(init=False)
    draft: Any = field(init=False)
    seen: Seen = field(init=False)
    lent: int = 0
    lends: bool = False
    admitted: bool = False
    finish_reason: FinishReason | None = None
    started: float = field(default_factory=time.perf_counter)
    first_token: float | None = None
    last_token: float | None = None
    decode_bytes: int = 0
    decoded: int = 0
    drafted: int = 0
    accepted: int = 0
    passes: int = 0
    drafting: float = 0.0
    from_draft: list[bool] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    way: int = 0
    measured_gain: float | None = None
    fastest: int | None = None

    def __post_init__(self) -> None:
        self.state = self.policy.new_state()
        self.draft = self.drafter.new_state()
        self.seen = Seen(self.tokens)

    @property
    def output(self) -> list[int]:
        """Tokens that were generated."""
        return self.tokens[self.output_start :]

    @property
    def text(self) -> str:
        """The output's text as far as it is final; empty without a tokenizer."""
        return "" if self.writer is None else self.writer.text

    @property
    def span(self) -> int:
        """Positions that the tokens take."""
        return len(self.tokens) + self.gaps

    @property
    def gaps(self) -> int:
        """Positions that no row has."""
        return 0 if self.embeds is None else self.embeds.gaps

    @property
    def shareable(self) -> int:
        """How many of its first tokens may come from another request: what comes after is to be computed here."""
        return min(len(self.tokens) - 1, self.prefill_end - (self.watch is not None))

    @property
    def prefilling(self) -> bool:
        """Whether prompt tokens are still to be computed."""
        return self.cache.length < self.prefill_end

    def view(self, depth: int) -> View:
        """What the drafter sees when it is asked for a tree of that depth."""
        return View(self.tokens, depth, self.draft, self.cache, self.policy, self.state, self.gaps, self.way, self)

    def segment(self, kind: Kind, start: int, tokens: list[int], parents: list[int], **options: Any) -> Segment:
        """Rows of this request that follow its first ``start`` tokens."""
        return Segment(
            self.cache,
            start,
            tokens,
            parents,
            kind,
            self.policy,
            self.state,
            draft=self.draft,
            prefill_end=self.prefill_end,
            embeds=self.embeds,
            meter=self.meter,
            **options,
        )

    def until_reread(self, rope: Rope) -> int | None:
        """How many tokens may be committed before :meth:`reread` is due; None for no limit."""
        if not rope.reread or self.prefill_end + self.gaps > rope.trained:
            return None
        return rope.trained - self.gaps - self.cache.length

    def reread(self) -> None:
        """Forget the cache: the tokens that were in it, and the next one, are a prompt that is still to be computed."""
        self.prefill_end = self.cache.length + 1
        self.cache.crop(0)
        self.state = self.policy.new_state()

    def choose(self, logits: Tensor, decision: Decision) -> None:
        """Take note of the logits ``[n, V]`` of the tree's nodes by which the tokens of ``decision`` were chosen."""
        if self.sampling.logprobs is not None:
            self.logprobs += logprobs(logits[decision.path], decision.tokens, self.sampling.logprobs)
        if self.record is not None:
            self.record(logits[decision.path], decision.tokens)

    def gain(self, decision: Decision, bytes_read: int, drafted: int, now: float) -> None:
        """Append what a pass gave that read ``bytes_read`` of the cache and tried ``drafted`` tokens."""
        if not decision.tokens:
            return
        if self.output:
            self.decode_bytes += bytes_read
            self.passes += 1
            self.decoded += len(decision.tokens)
        else:
            self.first_token = now
        self.last_token = now
        self.drafted += drafted
        self.tokens += decision.tokens
        self.seen.add(decision.tokens)
        self.accepted += decision.accepted
        self.from_draft += [place < decision.accepted for place in range(len(decision.tokens))]
        self.finish_reason = decision.finish_reason

    def fork(self) -> Self:
        """An independent request that goes on from the same tokens."""
        twin = copy(self)
        twin.tokens, twin.from_draft = list(self.tokens), list(self.from_draft)
        twin.logprobs, twin.admitted = list(self.logprobs), False
        twin.cache, twin.state, twin.draft = self.cache.fork(), self.state.fork(), copy(self.draft)
        twin.seen = self.seen.fork()
        twin.writer = copy(self.writer)
        return twin

    def branch(self, policy: Policy, state: State, drafter: Drafter, draft: Any, count: int) -> Self:
        """A request for ``count`` tokens more, under another policy and drafter, of which nothing will stay."""
        twin = copy(self)
        twin.tokens, twin.seen, twin.from_draft = list(self.tokens), self.seen.fork(), []
        twin.cache, twin.policy, twin.state = self.cache.fork(), policy, state
        twin.drafter, twin.draft = drafter, draft
        twin.sampling = replace(self.sampling, max_tokens=len(self.output) + count, stop=(), logprobs=None)
        twin.writer = twin.watch = twin.meter = twin.record = None
        twin.decode_bytes = 0
        twin.finish_reason = None if count else "length"
        return twin

    def release(self) -> None:
        """Give up cache and states; tokens and figures stay."""
        self.cache = self.cache.fork(0)
        self.state, self.draft = self.policy.new_state(), None

    def stats(self) -> Stats:
        """Figures up to now."""
        count = len(self.output)
        first, last = self.first_token or self.started, self.last_token or self.started
        tpot = (last - first) / (count - 1) if count > 1 else None
        return Stats(
            prompt_tokens=self.output_start,
            cached_tokens=self.lent,
            completion_tokens=count,
            ttft_ms=None if self.first_token is None else 1e3 * (first - self.started),
            tpot_ms=None if tpot is None else 1e3 * tpot,
            tokens_per_second=1 / tpot if tpot else None,
            kv_bytes_per_token=self.decode_bytes / self.decoded if self.decoded else None,
            passes=self.passes,
            drafted_tokens=self.drafted,
            accepted_tokens=self.accepted,
            acceptance_length=self.decoded / self.passes if self.passes else None,
            predicted_gain=self.drafter.gain,
            measured_gain=self.measured_gain,
            fastest=None if self.fastest is None else (Drafter.name, *self.drafter.ways)[self.fastest],
        )
