"""Time of a decoding step at batch 1, beside what the machine's memory allows and what other projects reach."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import mean, median

import torch

from springtide.attention.policy import Policy
from springtide.benchmarks.contenders import (
    Contender,
    Fill,
    attempt,
    dtype_name,
    filled,
    ratio,
    springtides,
    timed,
)
from springtide.benchmarks.traffic import dense_bytes, read_bandwidth, weight_bytes
from springtide.engine.engine import Engine

TURN = 4  # tokens that a contender decodes before it is the next one's turn


@dataclass(frozen=True)
class Decode:
    """Median time of a step (forward, head, greedy choice, Python) after ``context`` tokens; None if a peer failed.

    ``bytes_per_token``: weights, and the keys and values that the policy must read. ``gb_per_second``: these over the
    time. ``bandwidth``: GB/s that the machine reads. ``floor_ms``: the bytes at that bandwidth. ``ratio_to``: time
    over each peer's.
    """

    contender: str
    policy: str | None
    budget: int | str | None
    context: int
    threads: int
    dtype: str
    ms_per_token: float | None
    tokens_per_second: float | None
    bytes_per_token: float
    gb_per_second: float | None
    bandwidth: float
    floor_ms: float
    ratio_to_floor: float | None
    ratio_to: dict[str, float | None]


def steps_of(contexts: int, contenders: int, steps: int) -> int:
    """How often :func:`decode` yields before its results."""
    return contexts * (1 + contenders * (1 + -(-steps // TURN)))


def decode(
    engine: Engine,
    policies: Sequence[Policy],
    peers: Sequence[Contender],
    contexts: Sequence[int],
    steps: int,
    fill: Fill,
) -> Iterator[list[Decode] | None]:
    """Time ``steps`` tokens after each context; contenders take turns, so that a busy machine slows all of them.

    The first token after the prompt is not timed. Yields None after everything done, for progress, and the results
    last.
    """
    contenders: list[Contender] = [*springtides(engine, policies), *peers]
    model, windows = engine.stack.model, engine.stack.spec.windows
    weights, bandwidth = weight_bytes(model), read_bandwidth(engine.stack.device)
    results = []
    for context in contexts:
        reader = filled(engine, context, fill)
        yield None
        times: dict[Contender, list[float]] = {contender: [] for contender in contenders}
        for contender in contenders:
            if attempt(contender, context, contender.resume, reader) is None:
                del times[contender]
            yield None
        for done in range(0, steps, TURN):
            for contender in list(times):
                seconds = attempt(contender, context, timed, contender.step, min(TURN, steps - done))
                if seconds is None:
                    del times[contender]
                else:
                    times[contender] += seconds
                yield None
        dense = mean(dense_bytes(reader.cache, windows, context + 1 + step) for step in range(steps))
        medians = {contender: 1e3 * median(seconds) for contender, seconds in times.items()}
        for contender in contenders:
            cached = contender.kv_bytes()
            results.append(
                _result(
                    contender,
                    context,
                    dtype=dtype_name(model),
                    ms=medians.get(contender),
                    read=weights + (dense if cached is None else cached),
                    bandwidth=bandwidth,
                    ratio_to={peer.name: ratio(medians.get(contender), medians.get(peer)) for peer in peers},
                )
            )
            attempt(contender, context, contender.forget)
    yield results


def _result(
    contender: Contender,
    context: int,
    *,
    dtype: str,
    ms: float | None,
    read: float,
    bandwidth: float,
    ratio_to: dict[str, float | None],
) -> Decode:
    floor = 1e3 * read / bandwidth
    return Decode(
        contender=contender.name,
        policy=contender.policy,
        budget=contender.budget,
        context=context,
        threads=torch.get_num_threads(),
        dtype=dtype,
        ms_per_token=ms,
        tokens_per_second=ratio(1e3, ms),
        bytes_per_token=read,
        gb_per_second=ratio(read / 1e6, ms),
        bandwidth=bandwidth / 1e9,
        floor_ms=floor,
        ratio_to_floor=ratio(ms, floor),
        ratio_to=ratio_to,
    )
