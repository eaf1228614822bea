"""Which requests are part of a pass."""

from __future__ import annotations

import pytest

from springtide.attention.policy import Policy
from springtide.drafting.drafter import Drafter
from springtide.engine.engine import Engine
from springtide.engine.memory import Memory
from springtide.engine.request import Request
from springtide.engine.scheduler import Scheduler
from springtide.errors import SpringtideError
from springtide.model.stack import Stack
from springtide.rows.sampling import Sampling
from tiny import tiny

STACK = Stack(tiny())


def request(length=3, lends=False):
    made = Request([1] * length, Sampling(), Policy(), Drafter(), STACK.new_cache(), length, length)
    made.lends = lends
    return made


def scheduler_of(*requests, places=16, rows=2):
    scheduler = Scheduler(Memory(STACK, rows), rows, places)
    for each in requests:
        scheduler.add(each)
    return scheduler


def read(request):
    """Its prompt is in the cache."""
    request.cache.length = len(request.tokens)


def test_without_requests_there_is_no_pass():
    assert scheduler_of().schedule() == []


def test_prompts_are_read_together_as_far_as_there_are_rows():
    a, b, c = request(5), request(3), request(2)
    assert scheduler_of(a, b, c, rows=10).schedule() == [a, b, c]
    assert scheduler_of(a, b, c, rows=7).schedule() == [a, c]
    assert scheduler_of(a, b, c, rows=1).schedule() == [a]
    read(a)
    assert scheduler_of(a, b, c, rows=4).schedule() == [a, b]


def test_prompts_that_begin_alike_wait_for_one_another():
    a, b, c = (request(40, lends=True) for _ in range(3))
    c.tokens = [2] * 40
    scheduler = scheduler_of(a, b, c, rows=100)
    assert scheduler.schedule() == [a, c]


def test_prompts_are_read_one_after_the_other_beside_all_that_decode():
    a, b, c = (request() for _ in range(3))
    scheduler = scheduler_of(a, b, c)
    assert scheduler.schedule() == [a]
    a.cache.length = 2  # it takes several passes
    assert scheduler.schedule() == [a]
    read(a)
    assert scheduler.schedule() == [a, b]
    read(b)
    assert scheduler.schedule() == [a, b, c]
    read(c)
    assert scheduler.schedule() == [a, b, c]


def test_a_place_is_taken_when_another_leaves_it_in_the_order_of_coming():
    a, b, c, d = (request() for _ in range(4))
    scheduler = scheduler_of(a, b, c, d, places=2)
    for each in (a, b, c, d):
        read(each)
    assert scheduler.schedule() == [a, b]
    scheduler.retire(a)
    assert scheduler.schedule() == [b, c]
    scheduler.retire(c)
    assert scheduler.schedule() == [b, d]


def test_one_that_waits_may_leave():
    a, b, c = (request() for _ in range(3))
    scheduler = scheduler_of(a, b, c, places=1)
    assert scheduler.schedule() == [a]
    scheduler.retire(b)
    scheduler.retire(a)
    assert scheduler.schedule() == [c]
    assert list(scheduler.running) == [c] and not scheduler.waiting


def test_requests_that_are_alike_are_not_one():
    a, b = request(), request()
    scheduler = scheduler_of(a, b)
    scheduler.schedule()
    scheduler.retire(b)
    assert list(scheduler.running) == [a]


@pytest.mark.parametrize("places", [0, -1])
def test_there_is_a_place_at_least(places):
    with pytest.raises(SpringtideError, match=f"max_requests is {places}, but it must be at least 1"):
        Engine(tiny()).session(max_requests=places)
