"""Drafting that switches itself off while it does not pay, and on again."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from statistics import median_low

WINDOW = 32  # passes that a judgement rests on
START = 8  # drafted passes before the first plain ones
RUN = 4  # passes that a way is kept for at least
SHARE = 0.02  # of the time may go into trying the other way
SLACK = 0.03  # how much slower drafting may be: near a tie it stays, since it may find more to draft any moment
STALLED = 2.0  # times the median is what a pass counts at most: more is another process's doing


@dataclass
class Way:
    """Drafting or not: ``passes``, the last ones, as (tokens, seconds); ``idle``: seconds of the other since."""

    passes: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=WINDOW))
    idle: float = 0.0

    @property
    def usual(self) -> float:
        """Seconds that a pass usually takes; 0 if none was made."""
        return median_low([seconds for _, seconds in self.passes]) if self.passes else 0.0

    @property
    def cost(self) -> float:
        """Seconds per committed token; 0 if none was, so that what is unknown is tried."""
        most, tokens = STALLED * self.usual, sum(tokens for tokens, _ in self.passes)
        return sum(min(seconds, most) for _, seconds in self.passes) / tokens if tokens else 0.0


@dataclass
class Load:
    """What is known at a number of sequences. ``passes`` were made since drafting was last switched on or off."""

    drafting: bool = True
    passes: int = 0
    ways: dict[bool, Way] = field(default_factory=lambda: {True: Way(), False: Way()})


class Governor:
    """Takes the faster of drafting and plain decoding, by the passes that were measured.

    For each number of sequences (joined by powers of two) it starts drafted, tries plain passes, and from then on
    takes what costs less for a committed token. The other way is tried again once its trial takes no more than
    ``SHARE`` of the time since the last one. The first pass after a change does not count: some drafters have nothing
    to propose after a plain pass.
    """

    def __init__(self) -> None:
        self._loads: dict[int, Load] = {}

    def drafts(self, sequences: int) -> bool:
        """Whether the next pass over that many sequences is to be drafted."""
        return self._load(sequences).drafting

    def record(self, sequences: int, tokens: int, seconds: float) -> None:
        """A pass over ``sequences``, made as :meth:`drafts` said, committed ``tokens`` in ``seconds``."""
        load = self._load(sequences)
        used, other = load.ways[load.drafting], load.ways[not load.drafting]
        if load.passes:
            used.passes.append((tokens, seconds))
        load.passes += 1
        used.idle = 0.0
        other.idle += used.usual
        if load.passes >= (RUN if other.passes else START):
            pays = load.ways[True].cost <= (1 + SLACK) * load.ways[False].cost
            due = RUN * other.usual < SHARE * other.idle
            if pays != load.drafting or due:
                load.drafting, load.passes = not load.drafting, 0

    def gain(self, sequences: int) -> float | None:
        """How many times as fast drafting is as plain decoding, as measured; None before both were."""
        ways = self._load(sequences).ways
        return ways[False].cost / ways[True].cost if ways[True].cost and ways[False].cost else None

    def _load(self, sequences: int) -> Load:
        return self._loads.setdefault(sequences.bit_length(), Load())
