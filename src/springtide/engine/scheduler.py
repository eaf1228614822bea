"""Which requests' rows join the next pass."""

from __future__ import annotations

from collections import deque

from springtide.engine.memory import Memory
from springtide.engine.request import Request


class Scheduler:
    """First come, first served, as far as ``memory`` has room: every decoding request, and prompts.

    A pass has ``max_rows`` rows, or one chunk of a prompt beside those that decode. A prompt waits for another one that
    begins alike, so that this is computed once.
    """

    def __init__(self, memory: Memory, max_rows: int, max_requests: int) -> None:
        self.memory = memory
        self.max_rows = max_rows
        self.max_requests = max_requests
        self.waiting: deque[Request] = deque()
        self.running: deque[Request] = deque()

    def add(self, request: Request) -> None:
        """Queue a request."""
        self.waiting.append(request)

    def schedule(self) -> list[Request]:
        """The requests of the next pass; empty when all are done."""
        while self.waiting and len(self.running) < self.max_requests:
            if not self.memory.admits(self.waiting[0], self.running):
                break
            self.running.append(self.waiting.popleft())
        batch = [request for request in self.running if not request.prefilling]
        batch += self._prompts(self.max_rows - sum(request.drafter.most_rows for request in batch))
        self.memory.make_room(batch, [*self.running, *self.waiting])
        return batch

    def _prompts(self, room: int) -> list[Request]:
        """Prompts that are read in the next pass, in ``room`` rows."""
        reading: list[Request] = []
        for request in self.running:
            if not request.prefilling or self.memory.waits(request, reading):
                continue
            self.memory.lend(request, self.running)
            rows = request.prefill_end - request.cache.length
            if not reading or rows <= room:
                reading.append(request)
                room -= rows
        return reading

    def retire(self, request: Request) -> None:
        """Take out a request that has ended."""
        (self.running if request in self.running else self.waiting).remove(request)
