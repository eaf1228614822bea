"""Lossless decoding with drafts by a sparse policy: what passes cost is measured, how much is accepted is stated.

In a round the sparse policy drafts g tokens on a branch of the cache. One dense pass of g + 1 rows tries them, gives a
token of its own, and writes their rows anew, so that text and cache are those of dense decoding. Below the sparse
policy there may be a drafter that costs nothing, such as lookup, which gives each sparse pass tau tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from springtide.attention.policy import Policy
from springtide.benchmarks.contenders import Fill, dtype_name
from springtide.benchmarks.rows import median_ms
from springtide.engine.engine import Engine
from springtide.errors import SpringtideError
from springtide.evaluation.report import labels
from springtide.model.cost import lines
from springtide.options import option
from springtide.registry import Registry

ROWS = (1, 2, 4, 8, 16, 32)  # of the dense passes that are timed; others lie on lines between them
MOST = 1024  # rows of a pass


@dataclass(frozen=True)
class Drafts:
    """Drafts by a sparse policy, of which so many are said to be accepted."""

    tau: float = option(1.0, "tokens that a sparse pass gives, by a drafter below it that costs nothing; 1: none")
    rows: int | None = option(None, "rows of a sparse pass (default: 1 for tau=1, else twice tau, rounded up)")
    tokens: int | None = option(None, "tokens drafted for a dense pass (default: as pays most, up to 31)")
    accept: tuple[float, ...] = option(
        (0.7, 0.8, 0.9, 0.95, 1.0), "probabilities that dense attention agrees with a drafted token"
    )

    def __post_init__(self) -> None:
        for name, most in (("tau", MOST), ("rows", MOST), ("tokens", MOST - 1)):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= most:
                raise SpringtideError(f"sim: {name} is {value:g}, but it must be at least 1 and at most {most}.")
        for accept in self.accept:
            if not 0 < accept <= 1:
                raise SpringtideError(f"sim: accept is {accept:g}, but it must be above 0 and at most 1.")
        if self.rows is not None and self.rows < self.tau:
            raise SpringtideError(
                f"sim: {self.rows} rows give no more than {self.rows} tokens, but tau is {self.tau:g}; give more rows."
            )

    @property
    def sparse_rows(self) -> int:
        """Rows of a sparse pass."""
        chosen = 1 if self.tau == 1 else min(math.ceil(2 * self.tau), MOST)
        return chosen if self.rows is None else self.rows

    @property
    def dense_rows(self) -> tuple[int, ...]:
        """Rows of the dense passes that are to be timed, ascending, one row among them."""
        return ROWS if self.tokens is None else (1, self.tokens + 1)

    def rounds(self, draft_ms: float, verify_ms: Callable[[float], float]) -> list[Round]:
        """A round for each number of tokens that may be drafted, by what a sparse and a dense pass take."""
        choices = range(1, ROWS[-1]) if self.tokens is None else [self.tokens]
        return [Round(n, math.ceil(n / self.tau - 1e-9), draft_ms, verify_ms(n + 1)) for n in choices]


SIMULATED: Registry[Drafts] = Registry("simulated drafter", {"sim": Drafts})


def parse_drafts(text: str) -> Drafts:
    """Read ``sim:tau=3,accept=0.8+0.9``; raises SpringtideError."""
    if text.strip().partition(":")[0] not in SIMULATED.kinds:
        raise SpringtideError(
            f"bench decode times steps, so that --draft takes 'sim' with its options, not '{text}'; "
            "what drafters gain is measured by `springtide eval drafts`."
        )
    return SIMULATED.parse(text)


@dataclass(frozen=True)
class Round:
    """``tokens`` are drafted in so many sparse ``passes``, and tried in a dense one; milliseconds of a pass of each."""

    tokens: int
    passes: int
    draft_ms: float
    verify_ms: float

    @property
    def ms(self) -> float:
        return self.passes * self.draft_ms + self.verify_ms

    def gives(self, accept: float) -> float:
        """Expected tokens: what is drafted counts up to the first that is not accepted, and the dense pass adds one."""
        return sum(accept**place for place in range(self.tokens + 1))

    def ms_per_token(self, accept: float) -> float:
        return self.ms / self.gives(accept)

    def break_even(self, dense_ms: float) -> float | None:
        """The acceptance at which a token takes ``dense_ms``: 0 if none is needed, None if 1 is not enough."""
        needed, low, high = self.ms / dense_ms, 0.0, 1.0
        if needed <= self.gives(low):
            return low
        if needed > self.gives(high):
            return None
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if self.gives(middle) < needed else (low, middle)
        return high


def best(rounds: Sequence[Round], accept: float) -> Round:
    """The round whose tokens take the least time."""
    return min(rounds, key=lambda each: each.ms_per_token(accept))


def break_even(rounds: Sequence[Round], dense_ms: float) -> float | None:
    """The least acceptance at which one of the rounds is no slower than dense decoding; None if none ever is."""
    found = (each.break_even(dense_ms) for each in rounds)
    return min((accept for accept in found if accept is not None), default=None)


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """What drafts by a sparse policy gain after ``context`` tokens if the share ``accept`` of them is accepted.

    ``tau``, ``rows``: tokens that a sparse pass gives, and rows that it has. ``tokens`` are drafted in so many
    ``passes``. Median milliseconds: ``dense_ms`` of a dense pass of one row, ``sparse_ms`` of a sparse one,
    ``draft_ms`` of a sparse pass of ``rows`` rows, ``verify_ms`` of a dense one of ``tokens + 1`` rows, which lies on
    the lines through ``measured_ms``, pairs of rows and milliseconds. ``speedup``: ``dense_ms`` over ``ms_per_token``.
    ``break_even``: the acceptance at which it is 1, with the best number of tokens if none is given; 0 if it always
    is more, None if it never is.
    """

    simulated: bool = True
    policy: str
    budget: int | str | None
    context: int
    threads: int
    dtype: str
    tau: float
    rows: int
    accept: float
    tokens: int
    passes: int
    dense_ms: float
    sparse_ms: float
    draft_ms: float
    verify_ms: float
    measured_ms: list[tuple[int, float]]
    tokens_per_round: float
    ms_per_token: float
    speedup: float
    break_even: float | None


def steps_of(contexts: int, policies: int, drafts: Drafts, passes: int) -> int:
    """How often :func:`simulated` yields before its results."""
    return contexts * (1 + passes * (len(drafts.dense_rows) + policies * len({1, drafts.sparse_rows})))


def simulated(
    engine: Engine, policies: Sequence[Policy], drafts: Drafts, contexts: Sequence[int], passes: int, fill: Fill
) -> Iterator[list[Simulated] | None]:
    """Time ``passes`` passes of each kind after each context, by turns, for each of the sparse ``policies``.

    Yields None after everything done, for progress, and the results last.
    """
    dense, rows = engine.resolve("dense"), drafts.sparse_rows
    cells = [(dense, count) for count in drafts.dense_rows]
    cells += [(policy, count) for policy in policies for count in sorted({1, rows})]
    results = []
    for context in contexts:
        ms = yield from median_ms(engine, cells, context, passes, fill)
        measured = [(count, ms[dense, count]) for count in drafts.dense_rows]
        verify_ms = lines(*zip(*measured, strict=True))
        for policy, name in zip(policies, labels(policies), strict=True):
            rounds = drafts.rounds(ms[policy, rows], verify_ms)
            for accept in drafts.accept:
                chosen = best(rounds, accept)
                results.append(
                    Simulated(
                        policy=name,
                        budget=policy.named_budget,
                        context=context,
                        threads=torch.get_num_threads(),
                        dtype=dtype_name(engine.stack.model),
                        tau=drafts.tau,
                        rows=rows,
                        accept=accept,
                        tokens=chosen.tokens,
                        passes=chosen.passes,
                        dense_ms=ms[dense, 1],
                        sparse_ms=ms[policy, 1],
                        draft_ms=chosen.draft_ms,
                        verify_ms=chosen.verify_ms,
                        measured_ms=measured,
                        tokens_per_round=chosen.gives(accept),
                        ms_per_token=chosen.ms_per_token(accept),
                        speedup=ms[dense, 1] / chosen.ms_per_token(accept),
                        break_even=break_even(rounds, ms[dense, 1]),
                    )
                )
    yield results
