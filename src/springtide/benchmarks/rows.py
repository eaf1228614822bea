"""Time of one pass of several rows at the end of a long context: what trying drafted tokens costs."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch

from springtide.attention.policy import Policy
from springtide.benchmarks.contenders import PAUSE, Fill, dtype_name, filled, random_prompt, timed
from springtide.engine.engine import Engine
from springtide.evaluation.report import labels

Cell = tuple[Policy, int]  # a kind of pass: how its rows attend, and how many they are


@dataclass(frozen=True)
class Rows:
    """Median time of a pass (forward and head) of ``rows`` rows after ``context`` tokens."""

    policy: str
    budget: int | str | None
    context: int
    rows: int
    threads: int
    dtype: str
    ms: float
    ratio_to_one_row: float


def steps_of(policies: int, counts: Sequence[int], passes: int) -> int:
    """How often :func:`rows` yields before its results."""
    return 1 + policies * len({1, *counts}) * passes


def rows(
    engine: Engine, policies: Sequence[Policy], counts: Sequence[int], context: int, passes: int, fill: Fill
) -> Iterator[list[Rows] | None]:
    """Time ``passes`` passes for each number of rows, and for one row, by turns.

    Yields None after everything done, for progress, and the results last.
    """
    counts = sorted({1, *counts})
    cells = [(policy, count) for policy in policies for count in counts]
    medians = yield from median_ms(engine, cells, context, passes, fill)
    yield [
        Rows(
            policy=name,
            budget=policy.named_budget,
            context=context,
            rows=count,
            threads=torch.get_num_threads(),
            dtype=dtype_name(engine.stack.model),
            ms=medians[policy, count],
            ratio_to_one_row=medians[policy, count] / medians[policy, 1],
        )
        for policy, name in zip(policies, labels(policies), strict=True)
        for count in counts
    ]


def median_ms(
    engine: Engine, cells: Sequence[Cell], context: int, passes: int, fill: Fill, pause: float = PAUSE
) -> Generator[None, None, dict[Cell, float]]:
    """Median milliseconds of ``passes`` passes of each kind after ``context`` tokens; the kinds take turns.

    Before each pass there is a ``pause`` of so many seconds. Without one they are as fast as while decoding.
    The rows are a chain, as of one drafted continuation, and none of them stays in the cache. What a policy makes once
    for a sequence is there before, as while decoding. Yields after the context is there, and after every pass.
    """
    reader = filled(engine, context, fill)
    yield
    states = {policy: policy.new_state() for policy, _ in cells}

    def peek(policy: Policy, count: int) -> None:
        tokens, chain = random_prompt(engine, count), range(-1, count - 1)
        engine.stack.peek(reader.cache, policy, tokens, chain, state=states[policy]).argmax(-1).tolist()

    for cell in cells:
        peek(*cell)  # not timed: the first pass of a kind allocates
    seconds: dict[Cell, list[float]] = {cell: [] for cell in cells}
    for _ in range(passes):
        for cell in cells:
            time.sleep(pause)
            seconds[cell] += timed(partial(peek, *cell), 1)
            yield
    return {cell: 1e3 * median(own) for cell, own in seconds.items()}
