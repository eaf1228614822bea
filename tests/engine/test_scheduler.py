"""Which requests are part of a pass."""

from __future__ import annotations

import pytest

from springtide.attention.policy import Policy
from springtide.drafting.drafter import Drafter
from springtide.engine.request import Request
from springtide.engine.scheduler import Scheduler
from springtide.errors import SpringtideError
from springtide.rows.cache import Cache
from springtide.rows.pool import Pool
from springtide.rows.sampling import Sampling


def request(length=3):
    return Request([1] * length, Sampling(), Policy(), Drafter(), Cache(Pool(1)), length, length)


def scheduler_of(*requests, places=16):
    scheduler = Scheduler(places)
    for each in requests:
        scheduler.add(each)
    return scheduler


def read(request):
    """Its prompt is in the cache."""
    request.cache.length = len(request.tokens)


def test_without_requests_there_is_no_pass():
    assert scheduler_of().schedule() == []


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
        Scheduler(places)
