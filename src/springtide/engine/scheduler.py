"""Which requests' rows join the next pass."""

from __future__ import annotations

from collections import deque

from springtide.engine.request import Request
from springtide.options import at_least


class Scheduler:
    """First come, first served: every decoding request, and the prompt of one that is still to be read.

    One prompt at a time bounds the rows of a pass, and the others keep decoding beside it.
    """

    def __init__(self, max_requests: int = 16) -> None:
        at_least(max_requests, 1, "max_requests")
        self.max_requests = max_requests
        self.waiting: deque[Request] = deque()
        self.running: deque[Request] = deque()

    def add(self, request: Request) -> None:
        """Queue a request."""
        self.waiting.append(request)

    def schedule(self) -> list[Request]:
        """The requests of the next pass; empty when all are done."""
        while self.waiting and len(self.running) < self.max_requests:
            self.running.append(self.waiting.popleft())
        prefilling = [request for request in self.running if request.prefilling][:1]
        return [request for request in self.running if not request.prefilling] + prefilling

    def retire(self, request: Request) -> None:
        """Take out a request that has ended."""
        (self.running if request in self.running else self.waiting).remove(request)
