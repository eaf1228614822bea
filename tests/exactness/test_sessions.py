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

from drafters import VOCAB, Letters, hidden_transfer, longspec, medusa, self_draft, several
from springtide.drafting.drafter import Drafter
from springtide.drafting.lookup import Lookup
from springtide.engine.engine import Engine
from springtide.engine.request import Request
from springtide.errors import SpringtideError
from springtide.kernels import PAGE
from springtide.rows.cache import Cache
from stepping import poison, prefilled
from tiny import random_tokens, tiny

LAYERS, COUNT, EOS = 4, 10, 5
STEM, OTHER = random_tokens(26, vocab=VOCAB), random_tokens(9, seed=2, vocab=VOCAB)
LONG = random_tokens(70, seed=3, vocab=VOCAB)
PROMPTS = (STEM[:1], STEM[:12], STEM, [*STEM[:12], *OTHER], [*STEM[:25], *OTHER[:2]], OTHER, LONG)  # some begin alike
TIDAL = "tidal:budget=5,full=0,select=1"
QUEST = "quest:budget=4,page=4,skip=1"  # its rows depend on each other, so that drafts show in its output
POLICIES = ("dense", TIDAL, f"{TIDAL},correct=3", QUEST, "streaming:budget=5,sinks=2")
DRAFTERS: dict[str, Drafter] = {
    "none": Drafter(),
    "lookup": Lookup(),
    "medusa": medusa(),
    "hidden transfer": hidden_transfer(1, 2, 2, depth=LAYERS),
    "self": self_draft("streaming:budget=5,sinks=2"),
    "self over medusa": self_draft("oracle:budget=5,skip=1", medusa()),
    "longspec": longspec(),
    "several": several(1, 2, 2, depth=LAYERS),
}
SAMPLINGS = (
    {},
    {"temperature": 0.9, "seed": 1},
    {"temperature": 1.3, "top_p": 0.9, "repetition_penalty": 2.0, "seed": 2},
)


@pytest.fixture(autouse=True)
def no_costs(monkeypatch):
    """Rows are not measured: engines must make the same drafts, which show under some policies."""
    monkeypatch.setattr("springtide.engine.engine.cost_of_rows", lambda stack, policy: lambda rows: 10 + rows)


@dataclass(frozen=True)
class Target:
    """A model, and pages of ``page`` slots: as many as the caller has while an engine is made, and while it is used."""

    name: str
    page: int

    def policy(self, text: str) -> str:
        """Without the first layer, where that one has a sliding window."""
        return text.replace("full=0,", "") if self.name == "gemma3_text" else text


@cache
def engine(target: Target, adaptive: bool = False) -> Engine:
    model = tiny(target.name, torch.float64, vocab_size=VOCAB, num_hidden_layers=LAYERS)
    made = Engine(model, Letters())
    made.adaptive, made.eos = adaptive, frozenset([EOS])
    return made


@cache
def alone(
    target: Target, prompt: tuple[int, ...], policy: str, sampling: int, drafter: str = "none", count: int = COUNT
) -> list[int]:
    """The output as it is without stop strings and ends of sequence."""
    options = {"policy": target.policy(policy), "draft": DRAFTERS[drafter], "ignore_eos": True, **SAMPLINGS[sampling]}
    return engine(target).generate(prompt, max_tokens=count, **options).token_ids


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

    def expected(self, target: Target, prompt: tuple[int, ...]) -> tuple[list[int], str, str]:
        """Tokens, text and finish reason."""
        drafts_show = self.policy == QUEST and self.drafter != "none"
        own = (self.drafter, self.max_tokens) if drafts_show else ()  # drafts are no deeper than max_tokens
        full = alone(target, prompt, self.policy, self.sampling, *own)
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

    ``pages`` are what memory there is, None for no bound; the machine has ``spare`` bytes.
    """

    turns: list[Turn]
    chunk: int
    places: int
    pages: int | None
    spare: int
    target: Target
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
).filter(lambda join: (join.policy, join.drafter) != (QUEST, "several"))  # it is refused
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
    spare=st.sampled_from([0, 2**16, 2**40]),
    target=st.builds(Target, st.sampled_from(["qwen3", "gemma3_text"]), st.sampled_from([4, 4, PAGE])),
    adaptive=st.booleans(),
)


@dataclass(eq=False)
class Known:
    """What the outside knows of a request: how it came, and what its events said."""

    join: Join
    target: Target
    prompt: tuple[int, ...]
    request: Request
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    reusable: bool = True

    def check(self) -> None:
        """It has what its events said, which is how its output begins alone."""
        expected, text, reason = self.join.expected(self.target, self.prompt)
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
        self.target, self.places = schedule.target, schedule.places
        self.engine = engine(schedule.target, schedule.adaptive)
        sizes = self.engine.stack.page_bytes.values()
        self.limit = None if schedule.pages is None else schedule.pages * sum(sizes)
        self.session = self.engine.session(self.limit, max_requests=schedule.places)
        self.known: list[Known] = []

    def join(self, join: Join) -> None:
        ended = [known for known in self.known if known.finish_reason is not None and known.reusable]
        old = ended[join.reuse % len(ended)] if ended and join.reuse is not None else None
        prompt = PROMPTS[join.prompt]
        if old is not None and join.reuse % 3:
            prompt = [*old.request.tokens, *OTHER[: join.prompt]]
        options = SAMPLINGS[join.sampling] | {
            "policy": self.target.policy(join.policy),
            "draft": DRAFTERS[join.drafter],
            "max_tokens": join.max_tokens,
            "stop": join.stop or (),
            "ignore_eos": join.ignore_eos,
            "reuse": None if old is None else old.request,
        }
        started = self.engine.start(prompt, **options)
        started.lends = not join.admitted
        fits = self.limit is None or self.needs(started) <= self.limit
        try:
            request = self.session.admit(started)
        except SpringtideError:
            assert not fits, "refused for want of memory alone"
            return
        assert fits or self.target.name == "gemma3_text", "windows need less"
        self.known.append(Known(join, self.target, tuple(prompt), request))
        if old is not None:
            old.reusable = False
            self.check_exact(request)
            assert request.cache.length == request.cache.exact < len(prompt)

    def needs(self, request: Request) -> int:
        """Bytes that a request may come to take: its pages and one that it copies."""
        slots, page = request.output_start + request.sampling.max_tokens, self.target.page
        pages = -(-(slots + request.drafter.most_rows) // page) + 1
        if request.drafter.branch_rows:
            pages += -(-request.drafter.branch_rows // page) + 1
        stack = self.engine.stack
        states = request.policy.remembered(slots, stack.spec) * stack.slot_bytes + request.drafter.memory(slots)
        return pages * sum(stack.page_bytes.values()) + states

    @property
    def branches(self) -> bool:
        """Whether a request's drafter runs passes of its own."""
        return any(known.request.drafter.branch_rows for known in self.known)

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
                assert all(part.isfinite().all() for part in cache.read(layer, self.start(cache, layer), cache.length))
            poison(cache, LAYERS)

    def check_exact(self, request: Request) -> None:
        """What counts as written densely is what a dense prompt of these tokens writes."""
        if count := request.cache.exact:
            for layer, expected in enumerate(prefilled(self.engine, request.tokens[:count])):
                start = self.start(request.cache, layer)
                for got, wanted in zip(request.cache.read(layer, start, count), expected, strict=True):
                    torch.testing.assert_close(got, wanted[:, start:], atol=1e-10, rtol=0)

    def start(self, cache: Cache, layer: int) -> int:
        """The first slot of a layer that is still there."""
        return cache.released[cache.pool.windows[layer]] * self.target.page

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
        for name, value in {"RUN": 2, "SHARE": 5.0}.items():
            patch.setattr(f"springtide.engine.governor.{name}", value)
        patch.setattr("springtide.engine.memory.LEAST", 4)
        patch.setattr("springtide.engine.memory.machine_memory", lambda: schedule.spare)
        for module in ("loop", "memory"):
            patch.setattr(f"springtide.engine.{module}.GIVEN_ROWS", 4)
        for module in ("kernels.kv", "rows.cache", "rows.pool", "engine.memory", "model.stack"):
            patch.setattr(f"springtide.{module}.PAGE", schedule.target.page)
        patch.setattr("stepping.PAGE", schedule.target.page)
        # Where drafts show in the output, trees must not depend on how busy the machine is.
        patch.setattr("springtide.engine.engine.cost_of_rows", lambda stack, policy: lambda rows: 1 + rows / 16)
        patch.setattr("springtide.drafting.longspec.LongSpec._level_time", lambda drafter: 1 / 16)
        stack = engine(schedule.target, schedule.adaptive).stack
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
                assert len(heads) <= 1 or sitting.branches, "the LM head runs once a pass"
        while sitting.unfinished:
            sitting.step()
        assert sitting.session.step() == [] == sitting.session.unfinished
        sitting.session.forget()
        assert sitting.session.memory == 0
        pool = sitting.engine.stack.pool
        del sitting
        assert pool.used == 0, "all pages are given back"
