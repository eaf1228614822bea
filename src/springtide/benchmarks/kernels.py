"""Time of each attention kernel by itself, against memory and against torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from springtide import kernels
from springtide.benchmarks.contenders import PAUSE, timed
from springtide.benchmarks.traffic import read_bandwidth
from springtide.kernels import KV
from springtide.kernels.reference import gather, scores

KV_HEADS, GROUP, HEAD_DIM = 8, 4, 64  # llama-1b
SCALE = HEAD_DIM**-0.5
LAYERS = 6  # taken in turn, so that nothing is found in the processor's caches
CALLS = 3 * LAYERS  # in a turn


@dataclass(frozen=True)
class Kernel:
    """Median time of a kernel over ``context`` cached tokens and what it reads, ``bytes``, at which speed.

    ``rows`` are query heads that share a KV head: rows of the pass times 4. ``torch_ms`` is the same with torch:
    ``scaled_dot_product_attention`` with the group folded into rows, after ``gather`` for the gathered kernel; or
    scores, softmax and ``topk`` for the selection.
    """

    kernel: str
    rows: int
    context: int
    budget: int | None
    threads: int
    dtype: str
    ms: float
    bytes: int
    gb_per_second: float
    bandwidth: float
    share_of_bandwidth: float
    torch_ms: float
    ratio_to_torch: float


@dataclass(frozen=True)
class Case:
    """A kernel, called with a layer's pages, and its rival, called with its keys and values ``[H_kv, L, D]``."""

    kernel: str
    rows: int
    budget: int | None
    bytes: int
    own: Callable[[KV], object]
    torch: Callable[[Tensor, Tensor], object]


def steps_of(budgets: Sequence[int], turns: int) -> int:
    """How often :func:`run` yields before its results."""
    return (4 + len(budgets)) * turns


def run(context: int, budgets: Sequence[int], turns: int, dtype: torch.dtype) -> Iterator[list[Kernel] | None]:
    """Time dense attention of 4, 16 and 64 rows, gathered attention of each budget, and a selection of the first.

    Kernel and rival take turns. Yields None after every turn, for progress, and the results last.
    """
    bandwidth = read_bandwidth()
    dense = [torch.randn(2, KV_HEADS, context, HEAD_DIM).to(dtype) for _ in range(LAYERS)]
    paged = [KV.of(keys, values) for keys, values in dense]
    results = []
    for case in _cases(context, budgets, dtype):
        own: list[float] = []
        rival: list[float] = []
        for _ in range(turns):
            own += _timed([partial(case.own, kv.seen_by(case.rows // GROUP)) for kv in paged])
            rival += _timed([partial(case.torch, *layer) for layer in dense])
            yield None
        seconds = median(own)
        speed = case.bytes / seconds
        results.append(
            Kernel(
                kernel=case.kernel,
                rows=case.rows,
                context=context,
                budget=case.budget,
                threads=torch.get_num_threads(),
                dtype=str(dtype).removeprefix("torch."),
                ms=seconds * 1e3,
                bytes=case.bytes,
                gb_per_second=speed / 1e9,
                bandwidth=bandwidth / 1e9,
                share_of_bandwidth=speed / bandwidth,
                torch_ms=median(rival) * 1e3,
                ratio_to_torch=seconds / median(rival),
            )
        )
    yield results


def _timed(calls: Sequence[Callable[[], object]]) -> list[float]:
    """The same call for each layer in turn."""
    time.sleep(PAUSE)
    layers = cycle(calls)

    def step() -> None:
        next(layers)()

    step()
    return timed(step, CALLS)


def _cases(context: int, budgets: Sequence[int], dtype: torch.dtype) -> Iterator[Case]:
    token = KV_HEADS * HEAD_DIM * dtype.itemsize  # bytes of a token's keys
    for rows in (1, 4, 16):
        q = torch.randn(rows, KV_HEADS * GROUP, HEAD_DIM).to(dtype)
        yield Case("attend", rows * GROUP, None, 2 * context * token, _attend(q), _folded(q))
    q = torch.randn(1, KV_HEADS * GROUP, HEAD_DIM).to(dtype)
    for budget in budgets:
        index = torch.rand(1, KV_HEADS, context).argsort(-1)[..., :budget].sort(-1).values
        yield Case("attend_gathered", GROUP, budget, 2 * budget * token, _gathered(q, index), _gather_folded(q, index))
    budget = budgets[0]
    yield Case("choose", GROUP, budget, context * token, _choose(q, budget), _top(q, budget))


def _attend(q: Tensor) -> Callable[[KV], object]:
    return lambda kv: kernels.attend(q, kv, SCALE)


def _folded(q: Tensor) -> Callable[[Tensor, Tensor], object]:
    folded = q.view(len(q), KV_HEADS, GROUP, HEAD_DIM).transpose(0, 1).reshape(1, KV_HEADS, -1, HEAD_DIM)
    return lambda keys, values: scaled_dot_product_attention(folded, keys[None], values[None])


def _gathered(q: Tensor, index: Tensor) -> Callable[[KV], object]:
    return lambda kv: kernels.attend_gathered(q, kv, index, SCALE)


def _gather_folded(q: Tensor, index: Tensor) -> Callable[[Tensor, Tensor], object]:
    grouped = q.view(1, KV_HEADS, GROUP, HEAD_DIM)
    return lambda keys, values: scaled_dot_product_attention(grouped, gather(keys, index), gather(values, index))


def _choose(q: Tensor, budget: int) -> Callable[[KV], object]:
    return lambda kv: kernels.choose(q, kv, SCALE, budget, sinks=2, recent=64)


def _top(q: Tensor, budget: int) -> Callable[[Tensor, Tensor], object]:
    return lambda keys, _: kernels.select(scores(q, keys, SCALE).softmax(-1).mean(2), budget)
