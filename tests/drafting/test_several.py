"""Several drafters as one: each is asked when its way is wanted, and knows what was committed meanwhile."""

from __future__ import annotations

from copy import copy

import pytest
import torch

from drafters import VOCAB, hidden_transfer, medusa, several
from springtide.drafting.lookup import Lookup
from springtide.drafting.several import Several, States
from springtide.engine.engine import Engine
from springtide.engine.governor import Governor
from springtide.errors import SpringtideError
from springtide.rows.sampling import Sampling
from stepping import passes
from tiny import random_tokens, tiny

PROMPT = random_tokens(29, vocab=VOCAB)


@pytest.fixture(autouse=True)
def no_costs(monkeypatch):
    """Rows are not measured: any tree does."""
    monkeypatch.setattr("springtide.engine.engine.cost_of_rows", lambda stack, policy: lambda rows: 10 + rows)


def engine(drafter=None):
    return Engine(tiny("qwen3", torch.float64, vocab_size=VOCAB), drafter=drafter)


def always(arms):
    """A governor that takes these arms, one after the other, and then the last one."""

    left = list(arms)

    class Always(Governor):
        def choose(self, sequences, context):
            return left.pop(0) if len(left) > 1 else left[0]

        def record(self, tokens, seconds):
            pass

    return Always


def test_its_ways_are_those_of_all():
    both = several(1, 2, 2)
    assert list(both.ways) == ["hidden-transfer", "medusa", "lookup", "self, 4 tokens", "self, 2 tokens"]
    assert [both.using(way).name for way in range(5)] == ["hidden-transfer", "medusa", "lookup", "self", "self"]
    nested = Several((Lookup(), Several((medusa(), hidden_transfer(1, 2, 2)))))
    assert list(nested.ways) == ["lookup", "medusa", "hidden-transfer"]
    assert [nested.using(way).name for way in range(3)] == list(nested.ways)


def test_it_takes_what_its_drafters_take():
    under = engine(several(1, 2, 2))
    parts = under.drafter.drafters
    assert under.drafter.most_rows == max(part.most_rows for part in parts)
    assert under.drafter.memory(1000) == sum(part.memory(1000) for part in parts) > 0
    assert under.drafter.gain is None
    tuned = under.drafter_of(several(1, 2, 2))
    assert tuned.gain == max(part.gain for part in tuned.drafters[:2])


@pytest.mark.parametrize("way", range(3))
def test_each_drafts_as_if_it_were_alone(way):
    """Passes, drafts and what was accepted, once the drafter has seen a pass of its own."""
    both = several(1, 2, 2)
    found = []
    for drafter, arm in ((both.drafters[way], 1), (both, 1 + way)):
        under = engine(drafter)
        request = under.start(PROMPT, Sampling(40, temperature=0.8))
        list(passes(under, [request], governor=always([1 if way == 0 else 0, arm])))
        found.append((request.output, request.passes, request.drafted, request.accepted))
    assert found[0][0] == found[1][0] and found[0][3] > 0
    if way:
        assert found[0] == found[1]


def test_those_that_wait_know_what_is_committed():
    """After a change each drafts as after a prompt of these tokens, but for the one that drafts in the pass itself."""
    under = engine(several(1, 2, 2))
    request = under.start(PROMPT, Sampling(24, temperature=0.8))
    list(zip(range(9), passes(under, [request], governor=always([1, 3, 0, 2, 1, 0, 3, 0])), strict=False))
    fresh = under.start(request.tokens[:-1], Sampling(24, temperature=0.8))
    list(zip(range(1), passes(under, [fresh]), strict=False))
    for way in (1, 2):
        request.way = fresh.way = way
        drafts = [under.drafter.propose([own.view(9)])[0] for own in (request, fresh)]
        assert drafts[0] == drafts[1] and drafts[0].tokens[1:]


def test_rows_of_one_are_not_taken_for_those_of_another():
    """The one that waits adds no rows, and learns nothing from those that another one added."""
    under = engine(several(1, 2, 2))
    other = hidden_transfer(0, 1, 3).resolve(under.stack)
    request = under.start(PROMPT, Sampling(24))
    loop = passes(under, [request], governor=always([1]))
    next(loop), next(loop)
    state, hidden = request.draft[0], torch.zeros(4, 32, dtype=torch.float64)
    for drafter, learns in ((under.drafter.using(0), True), (other, False)):
        under.drafter.commit(request.segment("decode", 5, [1], [-1], outputs=1, drafter=drafter), hidden, [0])
        assert (state.last is not None) is learns


def test_a_fork_has_states_of_its_own():
    states = States([[1], None, Lookup().new_state()])
    twin = copy(states)
    assert isinstance(twin, States) and twin[0] == [1] and twin[0] is not states[0] and twin[2] is not states[2]
    assert states.nbytes == states[2].nbytes > 0


@pytest.mark.parametrize(
    ("drafters", "message"),
    [
        ((), "There are no drafters"),
        ((Lookup(), medusa(), Lookup(ngram=3)), "Two of the drafters are 'lookup'; give one"),
    ],
)
def test_what_cannot_be_chosen_from_is_refused(drafters, message):
    with pytest.raises(SpringtideError, match=message):
        Several(drafters)
