"""Which sequences' rows join the next pass."""

from __future__ import annotations

from collections import deque

from springtide.engine.request import Request


class Scheduler:
    """First come, first served: every decoding sequence, and the prompt of one that is still to be read.

    One prompt at a time bounds the rows of a pass, and the others keep decoding beside it.
    """

    def __init__(self, max_sequences: int = 16) -> None:
        self.max_sequences = max_sequences
        self.waiting: deque[Request] = deque()
        self.running: deque[Request] = deque()

    def add(self, sequence: Request) -> None:
        """Queue a sequence."""
        self.waiting.append(sequence)

    def schedule(self) -> list[Request]:
        """The sequences of the next pass; empty when all are done."""
        while self.waiting and len(self.running) < self.max_sequences:
            self.running.append(self.waiting.popleft())
        prefilling = [sequence for sequence in self.running if sequence.prefilling][:1]
        return [sequence for sequence in self.running if not sequence.prefilling] + prefilling

    def retire(self, sequence: Request) -> None:
        """Take out a sequence that has finished."""
        self.running.remove(sequence)
