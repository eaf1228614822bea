"""Which way the next pass is made, plain or drafted in one of several ways: the one that was measured to be fastest."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field, replace
from statistics import median_low

WINDOW = 128  # passes that a judgement rests on: how many tokens they commit differs much
KNOWN = 16  # of them count beside those of a new trial or a longer context, which so outweigh them soon
CLOSE = 1.5  # times as slow as the one in use: an arm that may yet be as fast is tried at once until it is known
RUN = 4  # passes of a trial, the first one counted, of which nothing is learnt
BRIEF = 2  # of one of an arm that is ``HOPELESS``: this many times as slow as the one in use
HOPELESS = 2.0
SHARE = 0.015  # of the time may be lost in trials
SLACK = 0.01  # how much faster another arm must be than the one in use to take its place
TIE = 0.1  # of a trial's time that it is taken to lose at least, so that nobody is tried all the time
STALLED = 8.0  # times the median: a pass that takes longer is another process's doing, and counts as the median


@dataclass
class Arm:
    """One way to make passes.

    ``passes``: the last ones, as (tokens, seconds); ``usual``: the median of these seconds; ``cost``: seconds per
    committed token, 0 until it is known; ``bound``: the cost and half its standard error, which is what an arm must be
    good for to be chosen. ``first``: the first pass after the last change to it; ``idle``: seconds since the last one.
    """

    passes: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=WINDOW))
    usual: float = 0.0
    cost: float = 0.0
    bound: float = 0.0
    first: tuple[int, float] = (0, 0.0)
    idle: float = 0.0

    def weigh(self) -> None:
        """Bring the figures up to date."""
        if not self.passes:
            return
        self.usual = median_low(seconds for _, seconds in self.passes)
        counted = (seconds if seconds < STALLED * self.usual else self.usual for _, seconds in self.passes)
        tokens = sum(tokens for tokens, _ in self.passes)
        self.cost = sum(counted) / tokens
        spread = sum(tokens**2 for tokens, _ in self.passes) / tokens**2 - 1 / len(self.passes)
        self.bound = self.cost * (1 + math.sqrt(max(0.0, spread)) / 2)

    def latest(self, count: int) -> float:
        """Seconds per token of so many passes."""
        latest = list(self.passes)[-count:]
        return sum(seconds for _, seconds in latest) / sum(tokens for tokens, _ in latest)

    def forget(self, kept: int = KNOWN) -> None:
        """Let the passes to come count for more: only the last ones are kept."""
        while len(self.passes) > kept:
            self.passes.popleft()

    def close(self, best: Arm) -> bool:
        """Whether it may be as fast as the arm in use."""
        return self.cost <= CLOSE * best.cost

    def aged(self) -> Arm:
        """What is known of it where much has changed."""
        twin = replace(self, passes=self.passes.copy())
        twin.forget()
        return twin

    def trial(self, best: Arm) -> int:
        """Passes that a trial takes while another arm is in use."""
        return BRIEF if len(self.passes) >= RUN and self.cost > HOPELESS * best.cost else RUN

    def price(self, best: Arm) -> float:
        """Seconds that a trial is thought to lose, with the two changes that it takes, while another arm is in use."""
        if len(self.passes) < KNOWN and self.close(best):
            return 0.0
        passes = self.trial(best)
        lost = (passes - 1) * self.usual * (1 - best.cost / self.cost)
        for tokens, seconds in (self.first, best.first):
            lost += max(0.0, min(seconds, STALLED * self.usual) - tokens * best.cost)
        return max(lost, TIE * passes * self.usual)


@dataclass
class Load:
    """What is known at a number of sequences and a length of the context.

    ``best``: the arm in use. ``arm``: that of the next pass, which may be a trial. ``passes``: made since it changed.
    """

    arms: list[Arm]
    best: int
    arm: int = field(init=False)
    passes: int = 0

    def __post_init__(self) -> None:
        self.arm = self.best

    def longer(self) -> Load:
        """What is known of a context twice as long."""
        return Load([arm.aged() for arm in self.arms], self.best)

    def record(self, tokens: int, seconds: float, first: bool) -> None:
        """A pass was made, which may be the ``first`` after a change."""
        used = self.arms[self.arm]
        if first:
            used.first = tokens, seconds
        else:
            used.passes.append((tokens, seconds))
        for arm in self.arms:
            arm.idle += used.usual
        used.idle = 0.0
        self.passes += 1
        if self.passes % (RUN if self.arm == self.best else used.trial(self.arms[self.best])) == 0:
            used.weigh()
            self._judge()

    def _judge(self) -> None:
        """Go on with the arm, or change to the fastest, or to one whose trial is due."""
        arms, best = self.arms, self.arms[self.best]
        known = [number for number, arm in enumerate(arms) if arm.cost]
        fastest = min(known, key=lambda number: arms[number].bound, default=self.best)
        if arms[fastest].bound * (1 + SLACK) < best.cost:
            self.best, best = fastest, arms[fastest]
        share = SHARE / (len(arms) - 1)
        used = arms[self.arm]
        if used.cost and used is not best and used.latest(self.passes - 1) * (1 + SLACK) < best.cost:
            return  # the trial goes on: it may have become faster
        others = [number for number in range(len(arms)) if number not in (self.best, self.arm)]
        due = [number for number in others if arms[number].price(best) <= share * arms[number].idle]
        chosen = max(due, key=lambda number: arms[number].idle, default=self.best)
        if chosen != self.arm:
            self.arm, self.passes = chosen, 0
            if chosen != self.best:
                arms[chosen].forget(KNOWN if arms[chosen].close(best) else RUN)


class Governor:
    """Chooses among arms, plain decoding and the ``ways`` of a drafter, by the passes that were measured.

    For each number of sequences and each length of the context (both joined by powers of two) it begins with the first
    way, tries every other arm, and from then on takes the one that costs least for a committed token. The others are
    tried again for a few passes, whenever what that is thought to lose is no more than their part of ``SHARE`` of the
    time since: so the slower an arm is, the more rarely, and all trials together lose no more than ``SHARE``. Where the
    context has doubled, it begins with what is known of the shorter one. The first pass after a change tells nothing:
    some drafters have nothing to propose after a plain pass.
    """

    def __init__(self, ways: int = 1) -> None:
        self._arms = 1 + ways
        self._loads: dict[tuple[int, int], Load] = {}
        self._load = self._new()
        self._last, self._first = 0, True

    def choose(self, sequences: int, context: int) -> int:
        """The arm of the next pass, over that many sequences of ``context`` tokens: 0 is plain, ``n`` way ``n - 1``."""
        key = sequences.bit_length(), context.bit_length()
        if key not in self._loads:
            half = self._loads.get((key[0], key[1] - 1))
            self._loads[key] = self._new() if half is None else half.longer()
        self._load = self._loads[key]
        self._last, self._first = self._load.arm, self._load.arm != self._last
        return self._load.arm

    def record(self, tokens: int, seconds: float) -> None:
        """The pass that :meth:`choose` was asked about committed ``tokens`` (at least one) in ``seconds``."""
        self._load.record(tokens, seconds, self._first)

    @property
    def best(self) -> int | None:
        """The arm that is fastest where the last pass was, as measured; None before plain passes were."""
        return None if self.gain is None else self._load.best

    @property
    def gain(self) -> float | None:
        """How many times as fast the fastest way is there as plain decoding, as measured; None before both were."""
        plain, *drafted = (arm.cost for arm in self._load.arms)
        known = [cost for cost in drafted if cost]
        return plain / min(known) if plain and known else None

    def _new(self) -> Load:
        return Load([Arm() for _ in range(self._arms)], best=1)
