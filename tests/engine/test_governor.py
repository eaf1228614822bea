"""When drafting is left out: by made-up times, and with no effect on the output."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import pytest
import torch

from guesses import Guesses
from springtide.attention.policy import Policy
from springtide.drafting.drafter import Drafter
from springtide.drafting.lookup import Lookup
from springtide.engine.engine import Engine
from springtide.engine.governor import Governor
from springtide.engine.loop import Loop
from springtide.rows.sampling import Sampling
from stepping import check_cache, passes, steps
from tiny import random_tokens, tiny

PROMPT = random_tokens(29)
PLAIN = (1, 1.0)  # tokens and seconds of a pass


def run(drafted, plain=PLAIN, passes=2000, governor=None, sequences=1, noise=0.0, seed=0):
    """Seconds per token, and the share of passes that were drafted."""
    governor, random = governor or Governor(), Random(seed)
    total = seconds = drafts = 0
    for _ in range(passes):
        drafting = governor.drafts(sequences)
        tokens, time = drafted if drafting else plain
        time *= max(0.5, random.gauss(1, noise))
        governor.record(sequences, tokens, time)
        total, seconds, drafts = total + tokens, seconds + time, drafts + drafting
    return seconds / total, drafts / passes


def test_it_starts_drafted_and_learns_what_a_plain_pass_costs():
    governor = Governor()
    assert governor.drafts(1)
    _, share = run((1, 5.0), passes=50, governor=governor)
    assert not governor.drafts(1) and share < 0.2
    governor = Governor()
    _, share = run((4, 1.5), passes=50, governor=governor)
    assert governor.drafts(1) and 0.9 < share < 1


@pytest.mark.parametrize("noise", [0.0, 0.2])
@pytest.mark.parametrize("drafted", [(1, 1.1), (1, 4.0), (1, 20.0), (2, 3.0), (2, 1.5), (4, 1.2), (9, 2.0)])
def test_the_faster_way_is_taken_and_trying_the_other_costs_less_than_2_percent(drafted, noise):
    governor = Governor()
    run(drafted, passes=50, governor=governor, noise=noise)
    best = min(drafted[1] / drafted[0], 1.0)
    cost, share = run(drafted, governor=governor, noise=noise, passes=5000)
    assert cost < best * 1.02 * (1.01 if noise else 1.0)
    assert 0 < share < 1, "the other way is tried now and then"


def test_a_drafter_that_does_neither_good_nor_harm_stays():
    assert run(PLAIN)[1] > 0.9 and run((1, 1.01))[1] > 0.9


def test_it_switches_off_and_on_as_the_text_changes():
    governor = Governor()
    assert run((4, 1.5), governor=governor)[1] > 0.9
    assert run((1, 1.5), governor=governor)[1] < 0.1
    run((4, 1.5), governor=governor, passes=1000)
    assert governor.drafts(1)


def test_every_load_is_judged_by_itself():
    governor = Governor()
    for _ in range(3):
        assert run((3, 1.5), governor=governor, passes=300, sequences=1)[1] > 0.9
        assert run((24, 20.0), (8, 2.0), governor=governor, passes=300, sequences=8)[1] < 0.1
    assert not governor.drafts(15) and governor.drafts(16), (
        "powers of two are judged together, a new one starts drafted"
    )


def test_a_pass_that_was_held_up_decides_nothing_for_long():
    def stalling(tokens, seconds):
        """A tenth of all passes take thirty times as long."""
        random = Random(1)
        governor = Governor()
        share = 0
        for _ in range(1000):
            drafting = governor.drafts(1)
            took = (seconds if drafting else 1.0) * (30 if random.random() < 0.1 else 1)
            governor.record(1, tokens if drafting else 1, took)
            share += drafting / 1000
        return share

    assert stalling(4, 1.5) > 0.95 and stalling(1, 1.5) < 0.1


def test_the_first_pass_of_its_kind_is_not_counted():
    governor = Governor()
    governor.record(1, 1000, 1.5)
    assert run((1, 1.5), governor=governor, passes=30)[1] < 0.5


# In the loop


@dataclass
class ByTurns(Governor):
    """Changes its mind at every pass."""

    asked: int = 0
    told: int = 0

    def drafts(self, sequences):
        self.asked += 1
        return self.asked % 3 == 0

    def record(self, sequences, tokens, seconds):
        self.told += 1

    def gain(self, sequences):
        return None


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
    list(steps(engine, sequence, governor=lambda: governor))
    assert engine.drafter.calls == engine.drafter.passes - 1 == governor.asked // 3 > 1
    assert engine.drafter.kept >= len(PROMPT) + 39


def test_prompts_are_not_counted():
    engine = Engine(model(), drafter=Named([], "random"))
    governor = ByTurns()
    loop = Loop(engine.stack, engine.eos, lambda: governor)
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
    list(steps(engine, sequence, governor=lambda: governor))
    assert sequence.output == expected.token_ids and governor.asked == governor.told == 0
    # A neighbour under another policy shares the drafter.
    batch = [engine.start(prompt, max_tokens=40, **options), engine.start(prompt, max_tokens=40)]
    list(passes(engine, batch, governor=lambda: governor))
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
    monkeypatch.setattr("springtide.engine.engine.Governor", lambda: made.append(ByTurns()) or made[-1])
    assert Engine(model(), drafter=Lookup()).generate(PROMPT, max_tokens=9).token_ids
    assert made[0].told
    Engine(model(), drafter=Lookup(), adaptive=False).generate(PROMPT, max_tokens=9)
    Engine(model(), drafter=Drafter()).generate(PROMPT, max_tokens=9)
    assert len(made) == 1, "without a drafter there is nothing to leave out"
