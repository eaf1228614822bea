"""Requests that come and go, and share passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from springtide.engine.loop import Loop
from springtide.engine.memory import Memory
from springtide.engine.request import FinishReason, Request
from springtide.engine.scheduler import Scheduler
from springtide.errors import SpringtideError


@dataclass(frozen=True)
class Event:
    """What a pass gave a request: ``token_ids`` and the ``text`` that has become final with them.

    Both are empty while its prompt is read. ``finish_reason`` is set in its last event.
    """

    request: Request
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None


class Session:
    """Requests of one engine that share passes, each with its own policy, drafter, sampling and limits.

    ``step`` runs one pass for all of them. What several requests begin with is computed and stored once, also after the
    first of them has ended. A session belongs to one thread; an engine may have many sessions.
    """

    def __init__(self, loop: Loop, start: Callable[..., Request], memory: Memory, max_requests: int) -> None:
        self._loop, self._start, self._memory = loop, start, memory
        self._scheduler = Scheduler(memory, loop.max_rows, max_requests)

    def add(self, prompt: str | Sequence[int], **options: Any) -> Request:
        """Queue a prompt (text or token ids), with the options of ``start`` and ``encode`` of the engine.

        Raises SpringtideError for a bad prompt or option, and for a request that is too large for the session's memory.
        """
        request = self._start(prompt, **options)
        request.lends = True
        return self.admit(request)

    def admit(self, request: Request) -> Request:
        """Queue a request that the engine has started; its cache stays its own when it has ended.

        Raises SpringtideError for one that has ended, is part of a session already or of another engine, or is too
        large.
        """
        if not isinstance(request, Request):
            raise SpringtideError("Give a request that engine.start returned, or add a prompt.")
        if request.finish_reason is not None or request.admitted:
            raise SpringtideError("The request has ended, or is part of a session already; start another one.")
        if request.cache.pool is not self._loop.stack.pool:
            raise SpringtideError("The request is of another engine; start it with the engine of this session.")
        self._memory.check(request)
        self._scheduler.add(request)
        request.admitted = True
        return request

    def step(self) -> list[Event]:
        """One pass: an event for each request that was part of it; none if there is nothing to do."""
        batch = self._scheduler.schedule()
        if not batch:
            return []
        events = []
        for request, decision in self._loop.step(batch):
            events.append(Event(request, decision.text, decision.tokens, request.finish_reason))
            if request.finish_reason is not None:
                self._scheduler.retire(request)
                if request.lends:
                    self._memory.keep(request)
        return events

    def run(self) -> Iterator[Event]:
        """Step until every request has ended."""
        while self.unfinished:
            yield from self.step()

    def cancel(self, request: Request) -> None:
        """End a request at once: it gains no more tokens, and its memory is free.

        Raises SpringtideError for one that has ended already or is not of this session.
        """
        if request not in self.unfinished:
            raise SpringtideError("The request has ended already, or is not of this session; cancel one that runs.")
        request.finish_reason = "cancelled"
        self._scheduler.retire(request)
        request.release()

    def forget(self) -> None:
        """Free what is kept of requests that ended."""
        self._memory.clear()

    @property
    def memory(self) -> int:
        """Bytes that caches and states of policies and drafters take; what requests share is counted once."""
        return self._memory.used(self.unfinished)

    @property
    def unfinished(self) -> list[Request]:
        """Requests that run or wait, in the order in which they came."""
        return [*self._scheduler.running, *self._scheduler.waiting]
