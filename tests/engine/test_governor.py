"""When drafting is left out: by made-up times, and with no effect on the output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import pytest
import torch

from guesses import Guesses
from springtide.attention.policy import Policy
from springtide.drafting.drafter import Drafter
from springtide.drafting.lookup import Lookup
from springtide.engine.engine import Engine
from springtide.engine.governor import KNOWN, RUN, Governor
from springtide.engine.loop import Loop
from springtide.rows.sampling import Sampling
from stepping import check_cache, passes, steps
from tiny import random_tokens, tiny

PROMPT = random_tokens(29)
TRIED = KNOWN + RUN  # passes in which an arm comes to be known


@dataclass
class Way:
    """An arm that is made up: a pass takes ``seconds`` of its context, and commits a token and those that are right.

    ``depth`` tokens are drafted, each of them right with probability ``right`` if the one before it is; none in the
    first pass after a change of arm.
    """

    seconds: Callable[[int], float]
    depth: int = 0
    right: float = 0.0

    def __post_init__(self):
        self.mean = sum(self.right**step for step in range(self.depth + 1))

    def cost(self, context):
        """Seconds per token."""
        return self.seconds(context) / self.mean

    def tokens(self, random):
        return next((step for step in range(self.depth) if random.random() >= self.right), self.depth) + 1


def way(seconds, depth=0, right=0.0):
    """One that takes as long whatever the context."""
    return Way(lambda context: seconds, depth, right)


def slower(factor, right=0.5):
    """One that takes ``factor`` times as long as plain decoding for a token, whatever the context."""
    drafted = way(1.0, 3, right)
    return Way(lambda context: factor * plain(context) * drafted.mean, 3, right)


def steady(factor):
    """The same, with two tokens in every pass."""
    return Way(lambda context: 2 * factor * plain(context), 1, 1.0)


def plain(context):
    """Seconds of a plain pass: at 16,384 tokens attention takes as long as all the rest."""
    return 1 + context / 16384


PLAIN = Way(plain)


@dataclass
class Run:
    """Passes that a governor chose the arms of."""

    arms: list[Way]
    sequences: int = 1
    context: float = 1000
    growth: float = 0.0  # of the context, with a token
    noise: float = 0.0
    stall: Callable[[int], float] = lambda number: 1.0  # times what a pass takes
    governor: Governor | None = None
    random: Random = field(default_factory=lambda: Random(0))
    used: list[int] = field(default_factory=list)
    contexts: list[int] = field(default_factory=list)
    seconds: float = 0.0
    fixed: list[float] = field(default_factory=list)  # seconds that each arm alone would have taken

    def __post_init__(self):
        self.governor = self.governor or Governor(len(self.arms) - 1)
        self.fixed = [0.0] * len(self.arms)

    def go(self, passes):
        """Make so many more."""
        for _ in range(passes):
            context = int(self.context)
            number = self.governor.choose(self.sequences, context)
            arm, costs = self.arms[number], [other.cost(context) for other in self.arms]
            fresh = self.used[-1:] != [number]
            tokens = self.sequences * (1 if fresh else arm.tokens(self.random))
            seconds = arm.seconds(context) * max(0.3, self.random.gauss(1, self.noise))
            self.governor.record(tokens, seconds * self.stall(len(self.used)))
            self.used.append(number)
            self.contexts.append(context)
            self.context += tokens * self.growth
            self.seconds += seconds
            self.fixed = [all + tokens * cost / self.sequences for all, cost in zip(self.fixed, costs, strict=True)]
        return self

    def forget(self):
        """Count from here on."""
        self.seconds, self.fixed, self.used, self.contexts = 0.0, [0.0] * len(self.arms), self.used[-1:], []
        return self

    def share(self, number):
        return self.used.count(number) / len(self.used)


# Cost

BAD = {
    "one": [1.5],
    "nearly as fast": [1.02],
    "very slow": [20.0],
    "three": [1.1, 2.0, 5.0],
    "ten": [1.02, 1.05, 1.1, 1.2, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0],
    "ten nearly as fast": [1.05] * 10,
    "ten very slow": [10.0] * 10,
}


@pytest.mark.parametrize("factors", BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("growth", [0.0, 1.0], ids=["", "growing"])
@pytest.mark.parametrize("noise", [0.0, 0.2], ids=["", "noisy"])
def test_drafting_that_does_not_pay_costs_less_than_3_percent(factors, growth, noise):
    """Once every arm is known, which takes ``TRIED`` passes each, here from contexts of 1,000 tokens to 9,000."""
    run = Run([PLAIN, *map(slower, factors)], growth=growth, noise=noise).go(TRIED * (len(factors) + 1)).forget()
    run.go(8000)
    assert run.seconds < 1.03 * run.fixed[0]
    assert {number for number, factor in enumerate([0, *factors]) if factor < 3} <= {*run.used}, "they are tried again"


@pytest.mark.parametrize("bad", [[], [1.5], [1.02, 1.1, 1.3, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0]], ids=len)
@pytest.mark.parametrize("factor", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("growth", [0.0, 1.0], ids=["", "growing"])
@pytest.mark.parametrize("noise", [0.0, 0.2], ids=["", "noisy"])
def test_where_one_way_is_fast_all_takes_within_5_percent_of_it_alone(bad, factor, growth, noise):
    arms = [PLAIN, *map(slower, bad), slower(factor, right=0.7)]
    run = Run(arms, growth=growth, noise=noise).go(TRIED * len(arms)).forget().go(4000)
    assert run.seconds < 1.05 * run.fixed[-1]
    assert run.governor.best == len(arms) - 1
    assert growth or run.governor.gain == pytest.approx(1 / factor, rel=0.25)


def test_two_ways_that_are_as_fast_do_not_take_turns():
    """For a pass is lost whenever they do."""
    run = Run([PLAIN, slower(0.5), slower(0.5)], noise=0.2).go(5000)
    assert run.seconds < 1.05 * run.fixed[1]


@pytest.mark.parametrize("way", [Way(plain), Way(lambda context: 1.005 * plain(context))])
def test_a_drafter_that_does_neither_good_nor_harm_stays(way):
    run = Run([PLAIN, way]).go(2000)
    assert run.share(1) > 0.7 and run.seconds < 1.02 * run.fixed[0]


# Change


def test_every_arm_is_tried_at_once_drafts_first():
    run = Run([PLAIN, steady(3.0), steady(0.5), steady(2.0)]).go(4 * RUN)
    assert run.used == [1] * RUN + [0] * RUN + [2] * RUN + [3] * RUN
    run.forget().go(50)
    assert {*run.used[1:]} == {2}


@pytest.mark.parametrize(("from_factor", "to_factor", "within"), [(0.4, 3.0, 60), (1.5, 0.5, 400), (5.0, 0.5, 1200)])
def test_it_switches_off_and_on_as_the_text_changes(from_factor, to_factor, within):
    run = Run([PLAIN, slower(from_factor)]).go(1000)
    run.arms[1] = slower(to_factor)
    run.go(within)
    assert run.governor.best == (1 if to_factor < 1 else 0)


@pytest.mark.parametrize("others", [0, 2, 9])
def test_a_way_that_pays_in_longer_contexts_alone_is_found_there(others):
    """At 1,000 tokens it takes 1.6 times as long as plain decoding, and from 20,500 on 0.8 times: it is in use then."""
    late = Way(lambda context: 4.0 + 0.25 * plain(context), 3, 0.7)
    run = Run([PLAIN, *[slower(2.0)] * others, late], growth=2.0).go(300)
    assert run.governor.best == 0
    while late.cost(run.context) > 0.8 * plain(run.context):
        run.go(50)
    assert run.governor.best == len(run.arms) - 1


# Contexts and numbers of sequences


def test_every_load_is_judged_by_itself():
    governor = Governor()
    for _ in range(3):
        one = Run([PLAIN, slower(0.5)], governor=governor).go(300)
        eight = Run([PLAIN, slower(2.5)], sequences=8, governor=governor).go(300)
        assert one.share(1) > 0.9 and eight.share(1) < 0.1
    assert not governor.choose(15, 1000) and governor.choose(16, 1000), (
        "powers of two are judged together, a new one starts drafted"
    )


def test_a_context_twice_as_long_begins_with_what_is_known():
    run = Run([PLAIN, slower(3.0), slower(0.5), slower(2.0)]).go(300)
    run.context = 1100
    assert run.forget().go(50).share(2) == 1
    run.context = 30000
    assert {*run.forget().go(50).used} == {0, 1, 2, 3}, "but one much longer with nothing"


# Stalls


@pytest.mark.parametrize("factor", [0.5, 1.3])
def test_passes_that_are_held_up_decide_nothing(factor):
    """A tenth of all of them, for thirty times as long."""
    held_up = Random(1)
    run = Run([PLAIN, slower(factor)], stall=lambda number: 30 if held_up.random() < 0.1 else 1).go(2000)
    assert run.share(int(factor < 1)) > 0.9
    assert run.seconds < 1.05 * min(run.fixed)


@pytest.mark.parametrize("at", range(3 * RUN))
def test_one_pass_that_is_held_up_tips_no_judgement(at):
    run = Run([PLAIN, steady(2.0), steady(0.6)], stall=lambda number: 10 if number == at else 1).go(3 * RUN + 50)
    assert {*run.used[3 * RUN :]} == {2}


@pytest.mark.parametrize("best", [0, 1])
def test_one_pass_that_is_held_up_later_changes_nothing_either(best):
    usual = Run([PLAIN, way((1.1, 0.9)[best])], context=0, noise=0.02).go(600)
    for at in range(500, 550):
        run = Run(usual.arms, context=0, noise=0.02, stall=lambda number, at=at: 10 if number == at else 1).go(600)
        assert run.governor.best == best and run.share(best) == pytest.approx(usual.share(best), abs=0.02)


def test_the_first_pass_of_an_arm_is_not_counted():
    governor = Governor()
    governor.choose(1, 1000)
    governor.record(1000, 1.5)
    assert Run([PLAIN, slower(1.5)], governor=governor).go(30).share(1) < 0.5


# In the loop


@dataclass
class ByTurns(Governor):
    """Changes its mind at every pass."""

    ways: int = 1
    asked: int = 0
    told: int = 0
    best = gain = None

    def choose(self, sequences, context):
        self.asked += 1
        return int(self.asked % 3 == 0)

    def record(self, tokens, seconds):
        self.told += 1


class Named(Guesses):
    """A drafter that may be left out."""

    name = "guesses"


class Watched(Named):
    """Counts what it is asked for."""

    passes = kept = 0

    @property
    def grows(self):
        self.passes += 1
        return ()

    def commit(self, segment, hidden, kept):
        assert hidden.shape == (len(segment.tokens), 32)
        self.kept += len(kept)


def model(**overrides):
    return tiny("qwen3", torch.float64, **overrides)


@pytest.mark.parametrize("policy", ["dense", "tidal:budget=7,full=0,select=1,correct=5"])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "top_p": 0.9, "seed": 3}], ids=["greedy", "sampled"])
def test_the_output_is_the_same(policy, options):
    expected = Engine(model(), policy=policy).generate(PROMPT, max_tokens=40, **options).token_ids
    for kind in ("oracle", "mixed"):
        engine = Engine(model(), policy=policy, drafter=Named([PROMPT + expected], kind))
        sequence = engine.start(PROMPT, Sampling(40, **options))
        for _ in steps(engine, sequence, governor=ByTurns):
            if policy == "dense":
                check_cache(engine, sequence)
        assert sequence.output == expected


def test_a_drafter_that_is_left_out_is_asked_for_nothing_but_sees_what_was_kept():
    expected = Engine(model()).generate(PROMPT, max_tokens=40).token_ids
    engine = Engine(model(), drafter=Watched([PROMPT + expected], "oracle"))
    governor = ByTurns()
    sequence = engine.start(PROMPT, Sampling(40))
    list(steps(engine, sequence, governor=lambda ways: governor))
    assert engine.drafter.calls == engine.drafter.passes - 1 == governor.asked // 3 > 1
    assert engine.drafter.kept >= len(PROMPT) + 39


def test_prompts_are_not_counted():
    engine = Engine(model(), drafter=Named([], "random"))
    governor = ByTurns()
    loop = Loop(engine.stack, engine.eos, lambda ways: governor)
    first, second = (engine.start(PROMPT, Sampling(40)) for _ in range(2))
    loop.step([first])
    assert governor.told == 0
    loop.step([first])
    assert governor.told == 1
    loop.step([first, second])
    assert governor.told == 1, "one of them was still read"
    loop.step([first, second])
    assert governor.told == 2
    given = engine.start(PROMPT, Sampling(40), prefill=9)
    for _ in range(2):
        loop.step([given])
    assert governor.told == 2, "and given tokens are decoded"


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.8, "accept": "typical"},
        {"policy": "quest:budget=4,page=4,skip=1"},
        {"policy": "tidal:budget=7,full=0,select=1,rows=root"},
    ],
    ids=["typical acceptance", "quest", "a root that selects"],
)
def test_where_drafts_show_in_the_output_they_are_never_left_out(options):
    """Or it would depend on time, and on what other requests took."""
    prompt = random_tokens(29, vocab=7)
    engine = Engine(model(vocab_size=7), drafter=Lookup(), adaptive=False)
    expected = engine.generate(prompt, max_tokens=40, **options)
    assert expected.stats.accepted_tokens
    sequence, governor = engine.start(prompt, max_tokens=40, **options), ByTurns()
    list(steps(engine, sequence, governor=lambda ways: governor))
    assert sequence.output == expected.token_ids and governor.asked == governor.told == 0
    # A neighbour under another policy shares the drafter.
    batch = [engine.start(prompt, max_tokens=40, **options), engine.start(prompt, max_tokens=40)]
    list(passes(engine, batch, governor=lambda ways: governor))
    assert batch[0].output == expected.token_ids and batch[1].output == engine.generate(prompt, max_tokens=40).token_ids


@pytest.mark.parametrize(("kind", "least", "most"), [("wrong", 1, 20), ("oracle", 9, 18)])
def test_wrong_guesses_switch_drafting_off(kind, least, most):
    """A row costs a tenth of a pass here, so that eight wrong ones nearly double it."""
    now = 0.0

    class Ticking(Policy):
        def reads(self, layer, q, segment):
            nonlocal now
            now += 0.25 * (1 + 0.1 * segment.rows)
            return super().reads(layer, q, segment)

    expected = Engine(model()).generate(PROMPT, max_tokens=100).token_ids
    engine = Engine(model(), policy=Ticking(), drafter=Named([PROMPT + expected], kind))
    sequence = engine.start(PROMPT, Sampling(100))
    list(steps(engine, sequence, governor=Governor, clock=lambda: now))
    assert sequence.output == expected
    assert least <= engine.drafter.calls <= most


def test_an_engine_is_adaptive_unless_told_otherwise(monkeypatch):
    made = []
    monkeypatch.setattr("springtide.engine.engine.Governor", lambda ways: made.append(ByTurns()) or made[-1])
    assert Engine(model(), drafter=Lookup()).generate(PROMPT, max_tokens=9).token_ids
    assert made[0].told
    Engine(model(), drafter=Lookup(), adaptive=False).generate(PROMPT, max_tokens=9)
    Engine(model(), drafter=Drafter()).generate(PROMPT, max_tokens=9)
    assert len(made) == 1, "without a drafter there is nothing to leave out"
