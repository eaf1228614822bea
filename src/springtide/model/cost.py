"""What a pass of several rows costs on this machine: measured for each model, kept, and checked before it is used."""

from __future__ import annotations

import json
import platform
import time
from bisect import bisect
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import springtide
from springtide.attention.policy import Policy
from springtide.errors import SpringtideError
from springtide.files import replacing
from springtide.kernels import native
from springtide.model.stack import Stack
from springtide.places import cache_home

ROWS = (1, 2, 4, 8, 16, 32, 64)
CONTEXT = 128  # tokens in the cache
PASSES = 8  # timed for each number of rows
CHECKED, CHECKS = (1, 16), 3  # numbers of rows by which kept costs are checked, and how often before they are given up
TOLERANCE = 1.25  # times as slow, or as fast, as what was kept


def place() -> Path:
    """Where costs are kept."""
    return cache_home() / "costs.json"


def cost_of_rows(stack: Stack, policy: Policy) -> Callable[[float], float]:
    """Milliseconds of a pass (forward and LM head) after a short context, by its number of rows.

    Measured at ``ROWS`` rows, with straight lines through the points, when this machine has not seen the model under
    the policy (resolved) before, and kept in the user's cache. They are measured anew when a few passes disagree with
    what was kept, which may be of a time when the machine was busy.
    """
    known, name = _read(), key(stack, policy)
    if not _sound(known.get(name)) or not _holds(stack, policy, known[name]):
        known[name] = measure(stack, policy)
        _write(_read() | {name: known[name]})  # read again: another process may have written meanwhile
    return lines(ROWS, known[name])


def when_asked(measure: Callable[[], Callable[[float], float]]) -> Callable[[float], float]:
    """What ``measure`` gives, which takes a second and so waits until the first cost is asked for."""
    known = cache(measure)
    return lambda rows: known()(rows)


def key(stack: Stack, policy: Policy) -> str:
    """Everything that a cost depends on."""
    return ", ".join((weights(stack), machine(stack), f"springtide {springtide.__version__}", repr(policy)))


def weights(stack: Stack) -> str:
    """Which model it is."""
    return f"{stack.model.config.model_type} {stack.fingerprint} of {stack.spec.num_layers} layers"


def machine(stack: Stack) -> str:
    """What the model runs on: processor, dtype, threads and kernels."""
    level = native.level()
    return ", ".join(
        (
            torch.cuda.get_device_name(stack.device) if stack.device.type == "cuda" else _processor(),
            str(stack.model.dtype).removeprefix("torch."),
            f"{torch.get_num_threads()} threads",
            f"{level.name if level else 'torch'} kernels",
        )
    )


@cache
def _processor() -> str:
    """The processor's name, as Linux and others give it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def measure(stack: Stack, policy: Policy, counts: Sequence[int] = ROWS, passes: int = PASSES) -> list[float]:
    """Milliseconds of a pass of each of ``counts`` rows, which ascend up to 64 at most.

    The best of several ``passes`` by turns: what else runs only adds to them.
    """
    context = max(1, min(CONTEXT, stack.spec.context_limit - max(ROWS)))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(stack.spec.vocab_size, (context + max(ROWS),), generator=generator).tolist()
    cache, seconds = stack.read(tokens[:context]), {rows: list[float]() for rows in counts}
    for rows in tqdm([*counts] * passes, desc="timing passes", leave=False, disable=None, delay=2):
        parents = [(row - 1) // 2 for row in range(rows)]  # a binary tree; row 0 follows the prefix: -1
        start = time.perf_counter()
        stack.peek(cache, policy, tokens[context : context + rows], parents).argmax(-1).tolist()
        seconds[rows].append(time.perf_counter() - start)
    return list(accumulate((1e3 * min(seconds[rows]) for rows in counts), max))  # more rows never cost less


def lines(xs: Sequence[float], ys: Sequence[float]) -> Callable[[float], float]:
    """Straight lines through points, going on beyond the first and the last one; ``xs`` ascend."""

    def value(x: float) -> float:
        right = min(max(bisect(xs, x), 1), len(xs) - 1)
        slope = (ys[right] - ys[right - 1]) / (xs[right] - xs[right - 1])
        return ys[right - 1] + slope * (x - xs[right - 1])

    return value


def _holds(stack: Stack, policy: Policy, costs: Sequence[float]) -> bool:
    """Whether passes take about what ``costs``, those of ``ROWS``, say; they are not given up for one slow moment."""
    kept = [costs[ROWS.index(rows)] for rows in CHECKED]
    for _ in range(CHECKS):
        now = measure(stack, policy, CHECKED, passes=2)
        if all(1 / TOLERANCE < new / old < TOLERANCE for new, old in zip(now, kept, strict=True)):
            return True
    return False


def _sound(costs: Any) -> bool:
    return isinstance(costs, list) and len(costs) == len(ROWS) and all(isinstance(x, float) and x > 0 for x in costs)


def _read() -> dict[str, Any]:
    """The costs that were kept; none if the file is missing or broken, since they can be measured again."""
    try:
        content = json.loads(place().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write(costs: dict[str, Any]) -> None:
    try:
        with replacing(place(), make=True) as temporary:
            temporary.write_text(json.dumps(costs, indent=2) + "\n", encoding="utf-8")
    except SpringtideError:
        pass  # where nothing can be kept, costs are measured each time
