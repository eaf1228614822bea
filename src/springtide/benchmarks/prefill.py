"""Time to read a prompt and choose the token after it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch

from springtide.attention.policy import Policy
from springtide.benchmarks.contenders import (
    Contender,
    attempt,
    dtype_name,
    random_prompt,
    ratio,
    springtides,
    timed,
)
from springtide.benchmarks.traffic import prefill_flops
from springtide.engine.engine import Engine

WARM_UP = 64  # tokens read first, so that what is done once (compiling, allocating) is not timed


@dataclass(frozen=True)
class Prefill:
    """Median time to read ``context`` random tokens; None if a peer failed.

    ``tflops``: 10^12 floating-point operations a second, where dense causal attention is counted whatever the policy.
    ``ratio_to``: time over each peer's.
    """

    contender: str
    policy: str | None
    budget: int | str | None
    context: int
    threads: int
    dtype: str
    seconds: float | None
    tokens_per_second: float | None
    tflops: float | None
    ratio_to: dict[str, float | None]


def steps_of(contexts: int, contenders: int, repeats: int) -> int:
    """How often :func:`prefill` yields before its results."""
    return contexts * contenders * (1 + repeats)


def prefill(
    engine: Engine, policies: Sequence[Policy], peers: Sequence[Contender], contexts: Sequence[int], repeats: int
) -> Iterator[list[Prefill] | None]:
    """Time ``repeats`` readings of each context; contenders take turns.

    Yields None after every reading, for progress, and the results last.
    """
    contenders: list[Contender] = [*springtides(engine, policies), *peers]
    model = engine.stack.model
    results = []
    for context in contexts:
        tokens = random_prompt(engine, context)
        operations = prefill_flops(model, engine.stack.spec.windows, context)
        times: dict[Contender, list[float]] = {contender: [] for contender in contenders}
        for contender in contenders:
            if attempt(contender, context, contender.read, tokens[:WARM_UP]) is None:
                del times[contender]
            attempt(contender, context, contender.forget)
            yield None
        for _ in range(repeats):
            for contender in list(times):
                seconds = attempt(contender, context, timed, partial(contender.read, tokens), 1)
                if seconds is None:
                    del times[contender]
                else:
                    times[contender] += seconds
                attempt(contender, context, contender.forget)
                yield None
        medians = {contender: median(seconds) for contender, seconds in times.items()}
        for contender in contenders:
            taken = medians.get(contender)
            results.append(
                Prefill(
                    contender=contender.name,
                    policy=contender.policy,
                    budget=contender.budget,
                    context=context,
                    threads=torch.get_num_threads(),
                    dtype=dtype_name(model),
                    seconds=taken,
                    tokens_per_second=ratio(context, taken),
                    tflops=ratio(operations / 1e12, taken),
                    ratio_to={peer.name: ratio(taken, medians.get(peer)) for peer in peers},
                )
            )
    yield results
