"""Whatever joins, leaves or is cancelled beside it, a request's output is the one that it has alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drafters import VOCAB, Letters, hidden_transfer, medusa
from springtide.drafting.drafter import Drafter
from springtide.drafting.lookup import Lookup
from springtide.engine.engine import Engine
from springtide.engine.request import Request
from springtide.errors import SpringtideError
from springtide.kernels import PAGE
from stepping import poison, prefilled
from tiny import random_tokens, tiny

LAYERS, COUNT, EOS = 3, 10, 5
STEM, OTHER = random_tokens(26, vocab=VOCAB), random_tokens(9, seed=2, vocab=VOCAB)
PROMPTS = (STEM[:1], STEM[:12], STEM, [*STEM[:12], *OTHER], [*STEM[:25], *OTHER[:2]], OTHER)  # some begin alike
TIDAL = "tidal:budget=5,full=0,select=1"
QUEST = "quest:budget=4,page=4,skip=1"  # its rows depend on each other, so that drafts show in its output
POLICIES = ("dense", TIDAL, f"{TIDAL},correct=3", QUEST, "streaming:budget=5,sinks=2")
DRAFTERS: dict[str, Drafter] = {
    "none": Drafter(),
    "lookup": Lookup(),
    "medusa": medusa(),
    "hidden transfer": hidden_transfer(1, 2, 2, depth=LAYERS),
}
SAMPLINGS = (
    {},
    {"temperature": 0.9, "seed": 1},
    {"temperature": 1.3, "top_p": 0.9, "repetition_penalty": 2.0, "seed": 2},
)


@cache
def engine(adaptive: bool = False, page: int = PAGE) -> Engine:
    """The caller has pages of ``page`` slots, while this is made and as long as it is used."""
    made = Engine(tiny("qwen3", torch.float64, vocab_size=VOCAB, num_hidden_layers=LAYERS), Letters())
    made.adaptive, made.eos = adaptive, frozenset([EOS])
    return made


@cache
def alone(
    prompt: tuple[int, ...], policy: str, sampling: int, page: int, drafter: str = "none", count: int = COUNT
) -> list[int]:
    """The output as it is without stop strings and ends of sequence."""
    options = {"policy": policy, "draft": DRAFTERS[drafter], "ignore_eos": True, **SAMPLINGS[sampling]}
    return engine(page=page).generate(prompt, max_tokens=count, **options).token_ids


# Schedules


@dataclass(frozen=True)
class Join:
    """A request to come. ``reuse`` picks one that has ended, whose cache is taken over; mostly it is a turn more.

    What the session ``admitted``, instead of starting it, keeps its cache.
    """

    prompt: int
    policy: str
    drafter: str
    sampling: int
    max_tokens: int
    stop: str
    ignore_eos: bool
    reuse: int | None
    admitted: bool

    def expected(self, prompt: tuple[int, ...], page: int) -> tuple[list[int], str, str]:
        """Tokens, text and finish reason."""
        drafts_show = self.policy == QUEST and self.drafter != "none"
        own = (self.drafter, self.max_tokens) if drafts_show else ()  # drafts are no deeper than max_tokens
        full = alone(prompt, self.policy, self.sampling, page, *own)
        text = Letters().decode(full)
        ends = [(self.max_tokens, 1, self.max_tokens, "length")]  # tokens, what counts first, letters, why
        if not self.ignore_eos and EOS in full:
            ends.append((full.index(EOS) + 1, 0, full.index(EOS) + 1, "stop"))
        if self.stop and self.stop in text:
            ends.append((text.index(self.stop) + len(self.stop), -1, text.index(self.stop), "stop"))
        count, _, letters, reason = min(ends)
        return full[:count], text[:letters], reason


@dataclass(frozen=True)
class Turn:
    """What happens between passes, and how many there are then."""

    join: Join | None
    cancel: int | None
    passes: int


@dataclass(frozen=True)
class Schedule:
    """``chunk``: prompt rows in a pass. ``places``: requests that run at a time.

    ``pages`` are what memory there is, None for no bound; each of them has ``page`` slots.
    """

    turns: list[Turn]
    chunk: int
    places: int
    pages: int | None
    page: int
    adaptive: bool


joins = st.builds(
    Join,
    prompt=st.integers(0, len(PROMPTS) - 1),
    policy=st.sampled_from(POLICIES),
    drafter=st.sampled_from(list(DRAFTERS)),
    sampling=st.integers(0, len(SAMPLINGS) - 1),
    max_tokens=st.integers(1, COUNT),
    stop=st.sampled_from(["", "", "", "g", "ec", "gg", "def"]),
    ignore_eos=st.booleans(),
    reuse=st.one_of(st.none(), st.none(), st.integers(0, 9)),
    admitted=st.sampled_from([False, False, True]),
)
turns = st.builds(
    Turn,
    join=st.one_of(joins, joins, st.none()),
    cancel=st.one_of(st.none(), st.none(), st.integers(0, 9)),
    passes=st.integers(0, 4),
)
schedules = st.builds(
    Schedule,
    turns=st.lists(turns, min_size=1, max_size=7),
    chunk=st.sampled_from([5, 16, 1024]),
    places=st.sampled_from([1, 2, 16]),
    pages=st.one_of(st.none(), st.integers(2, 20), st.integers(12, 40)),
    page=st.sampled_from([4, 4, PAGE]),
    adaptive=st.booleans(),
)


@dataclass(eq=False)
class Known:
    """What the outside knows of a request: how it came, and what its events said."""

    join: Join
    prompt: tuple[int, ...]
    page: int
    request: Request
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    reusable: bool = True

    def check(self) -> None:
        """It has what its events said, which is how its output begins alone."""
        expected, text, reason = self.join.expected(self.prompt, self.page)
        assert (self.request.output, self.request.text) == (self.tokens, self.text)
        assert self.request.finish_reason == self.finish_reason
        assert self.tokens == expected[: len(self.tokens)] and text.startswith(self.text)
        if self.finish_reason not in (None, "cancelled"):
            assert (self.tokens, self.text, self.finish_reason) == (expected, text, reason)
        self.check_statistics()

    def check_statistics(self) -> None:
        stats, drafted = self.request.stats(), self.request.from_draft
        assert stats.completion_tokens == len(self.tokens) == len(drafted)
        assert sum(drafted) == stats.accepted_tokens <= stats.drafted_tokens
        # Each pass gives one token of its own, the first one with the prompt, but where the end cuts it.
        cut = drafted[-1:] == [True]
        assert stats.passes == max(0, drafted.count(False) - 1 + cut)
        assert not any(drafted[:1]) and (not cut or self.finish_reason in ("length", "stop"))
        if stats.passes:
            assert stats.acceptance_length == pytest.approx((len(self.tokens) - 1) / stats.passes)
        assert self.join.drafter != "none" or stats.drafted_tokens == 0


class Sitting:
    """A session whose requests are watched."""

    def __init__(self, schedule: Schedule) -> None:
        self.page, self.places = schedule.page, schedule.places
        self.engine = engine(schedule.adaptive, schedule.page)
        self.limit = None if schedule.pages is None else schedule.pages * self.engine.stack.page_bytes
        self.session = self.engine.session(self.limit, max_requests=schedule.places)
        self.known: list[Known] = []

    def join(self, join: Join) -> None:
        ended = [known for known in self.known if known.finish_reason is not None and known.reusable]
        old = ended[join.reuse % len(ended)] if ended and join.reuse is not None else None
        prompt = PROMPTS[join.prompt]
        if old is not None and join.reuse % 3:
            prompt = [*old.request.tokens, *OTHER[: join.prompt]]
        options = SAMPLINGS[join.sampling] | {
            "policy": join.policy,
            "draft": DRAFTERS[join.drafter],
            "max_tokens": join.max_tokens,
            "stop": join.stop or (),
            "ignore_eos": join.ignore_eos,
            "reuse": None if old is None else old.request,
        }
        started = self.engine.start(prompt, **options)
        started.lends = not join.admitted
        if not self.fits(started):
            with pytest.raises(SpringtideError, match="but cache_memory is"):
                self.session.admit(started)
            return
        request = self.session.admit(started)
        self.known.append(Known(join, tuple(prompt), self.page, request))
        if old is not None:
            old.reusable = False
            self.check_exact(request)
            assert request.cache.length == request.cache.exact < len(prompt)

    def fits(self, request: Request) -> bool:
        """Whether there is memory for the request alone."""
        slots = request.output_start + request.sampling.max_tokens
        pages = -(-(slots + request.drafter.most_rows) // self.page) + 1  # one that it shares is copied
        needed = pages * self.engine.stack.page_bytes + request.drafter.memory(slots)
        return self.limit is None or needed <= self.limit

    def cancel(self, number: int) -> None:
        if running := self.unfinished:
            known = running[number % len(running)]
            self.check_exact(known.request)
            self.session.cancel(known.request)
            known.finish_reason = "cancelled"

    def step(self) -> None:
        """A pass, and what it says of those that were part of it."""
        before = self.unfinished
        events = self.session.step()
        told = [event.request for event in events]
        assert len({*told}) == len(told) <= self.places
        assert {known.request for known in before if known.tokens} <= {*told} <= {known.request for known in before}
        assert told or not before, "nothing stands still"
        for known in before:
            for event in events:
                if event.request is known.request:
                    known.tokens += event.token_ids
                    known.text += event.text
                    known.finish_reason = event.finish_reason
            if known.finish_reason is not None:
                self.check_exact(known.request)
        self.check()

    def check(self) -> None:
        assert self.limit is None or self.session.memory <= self.limit
        assert self.session.unfinished == [known.request for known in self.unfinished]
        for known in self.known:
            known.check()
            if known.reusable:
                self.check_cache(known.request)
            assert known.finish_reason != "cancelled" or not known.request.cache.nbytes

    def check_cache(self, request: Request) -> None:
        """What is committed can be used, and nothing else is."""
        cache = request.cache
        assert cache.exact <= cache.length <= len(request.tokens) - 1 or not request.output
        if cache.length:
            for layer in range(LAYERS):
                assert all(part.isfinite().all() for part in cache.read(layer, 0, cache.length))
            poison(cache, LAYERS)

    def check_exact(self, request: Request) -> None:
        """What counts as written densely is what a dense prompt of these tokens writes."""
        if count := request.cache.exact:
            for layer, expected in enumerate(prefilled(self.engine, request.tokens[:count])):
                for got, wanted in zip(request.cache.read(layer, 0, count), expected, strict=True):
                    torch.testing.assert_close(got, wanted, atol=1e-10, rtol=0)

    @property
    def unfinished(self) -> list[Known]:
        return [known for known in self.known if known.finish_reason is None]


@contextmanager
def counted_heads(schedule: Schedule) -> Iterator[list[int]]:
    """Rows of each time that the LM head was run; with the schedule's chunks, and a governor that decides quickly."""
    rows: list[int] = []

    def count(hidden: torch.Tensor) -> torch.Tensor:
        rows.append(len(hidden))
        return logits(hidden)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("springtide.engine.loop.CHUNK", schedule.chunk)
        for name in ("START", "RUN"):
            patch.setattr(f"springtide.engine.governor.{name}", 1)
        patch.setattr("springtide.engine.memory.LEAST", 4)
        for module in ("kernels.kv", "rows.cache", "rows.pool", "engine.memory", "model.stack"):
            patch.setattr(f"springtide.{module}.PAGE", schedule.page)
        patch.setattr("stepping.PAGE", schedule.page)
        stack = engine(schedule.adaptive, schedule.page).stack
        logits = stack.logits
        patch.setattr(stack, "logits", count)
        yield rows


@settings(deadline=None, max_examples=300)
@given(schedules)
def test_each_output_is_the_one_alone(schedule):
    with torch.inference_mode(), counted_heads(schedule) as heads:
        sitting = Sitting(schedule)
        for turn in schedule.turns:
            if turn.join is not None:
                sitting.join(turn.join)
            if turn.cancel is not None:
                sitting.cancel(turn.cancel)
            sitting.check()
            for _ in range(turn.passes):
                heads.clear()
                sitting.step()
                assert len(heads) <= 1, "the LM head runs once a pass"
        while sitting.unfinished:
            sitting.step()
        assert sitting.session.step() == [] == sitting.session.unfinished
        sitting.session.forget()
        assert sitting.session.memory == 0
        pool = sitting.engine.stack.pool
        del sitting
        assert pool.used == 0, "all pages are given back"
