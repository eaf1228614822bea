"""The memory of a session: what its requests may take, and the rows that they share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from springtide.engine.loop import GIVEN_ROWS
from springtide.engine.request import Request
from springtide.errors import SpringtideError
from springtide.kernels import PAGE
from springtide.model.stack import Stack
from springtide.options import Size
from springtide.rows.cache import Cache
from springtide.rows.pool import machine_memory
from springtide.rows.segment import PromptEmbeds
from springtide.rows.spec import Rope

LEAST = 16  # tokens that are worth sharing


@dataclass(frozen=True, eq=False)
class Prefix:
    """Tokens, and the cache that holds their rows as a dense pass writes them.

    ``embeds`` gives the first rows as vectors; ``reach`` is the length that rotary frequencies were for, see ``Rope``.
    """

    tokens: NDArray[np.int64]
    cache: Cache
    embeds: PromptEmbeds | None
    reach: int

    @classmethod
    def of(cls, request: Request, count: int, rope: Rope) -> Prefix:
        """The first ``count`` tokens of a request, of its prompt alone where frequencies depend on the length."""
        count = min(count, request.prefill_end) if rope.trained else count
        tokens = np.array(request.tokens[:count], dtype=np.int64)
        gaps = 0 if request.embeds is None else request.embeds.gaps
        return cls(tokens, request.cache, request.embeds, rope.shortest(request.prefill_end + gaps))

    def common(self, other: Prefix) -> int:
        """How many tokens both begin with, whose rows are the same."""
        if self.embeds is not other.embeds or self.reach != other.reach:
            return 0
        count = min(len(self.tokens), len(other.tokens))
        differs = self.tokens[:count] != other.tokens[:count]
        return int(differs.argmax()) if differs.any() else count

    def covers(self, other: Prefix) -> bool:
        """Whether whoever could go on from the other one can go on from this as well."""
        return self.common(other) == len(other.tokens) and self.cache.reaches(len(other.tokens))


class Memory:
    """What requests of a session take and share, and what is kept of those that ended.

    ``limit``: bytes that pages of caches, and states of policies and drafters, may take. Every request that runs has
    reserved what it may come to take, in layers with a sliding window no more than its rows see. What is there beyond
    that, pages that windows have left behind and rows of requests that ended, stays until its memory is wanted. Without
    a limit all requests may run, and it is wanted once half of the machine's memory is taken.
    """

    def __init__(self, stack: Stack, chunk: int, limit: int | None = None) -> None:
        self.stack, self.spec, self.chunk = stack, stack.spec, chunk
        self.limit = limit
        self._kept: list[Prefix] = []  # the most recently used last

    def check(self, request: Request) -> None:
        """Raise SpringtideError for a request that would not fit if it were alone."""
        needed = self._reserved([request])
        if self.limit is not None and needed > self.limit:
            raise SpringtideError(
                f"The request may come to take {_mebibytes(needed)} of memory, for {self._slots(request)} tokens, but "
                f"cache_memory is {Size(self.limit)}; raise it, shorten the prompt or lower max_tokens."
            )

    def admits(self, request: Request, running: Sequence[Request]) -> bool:
        """Whether there is room for a request beside those that run; it then shares what it begins with."""
        own = request.cache
        self.lend(request, running)
        if self.limit is not None and self._reserved([*running, request]) > self.limit:
            request.cache, request.lent = own, 0
            return False
        return True

    def make_room(self, batch: Sequence[Request], requests: Sequence[Request]) -> None:
        """Give back what is wanted for the rows of the next pass, which are those of ``batch``, of all ``requests``."""
        growth = sum(map(self._growth, batch))
        if not growth:
            return
        limit = self.limit or machine_memory() // 2
        if self.used(requests) + growth > limit:
            for request in requests:
                cache = request.cache
                cache.release(cache.exact if request.policy.most_refreshed else cache.length)
            for prefix in self._kept:
                prefix.cache.release(prefix.cache.length)
        while self._kept and self.used(requests) + growth > limit:
            del self._kept[0]

    def lend(self, request: Request, running: Sequence[Request]) -> None:
        """Give a request of which nothing was computed yet the rows of one that ended or runs and begins alike."""
        if not request.lends or request.cache.length > request.lent:
            return
        wanted = self._prefix(request, request.shareable)
        others = [*self._kept, *(self._prefix(other) for other in running if other is not request)]
        common = [wanted.common(other) for other in others]
        common = [n if other.cache.reaches(n) else 0 for n, other in zip(common, others, strict=True)]
        best = max(range(len(others)), key=common.__getitem__, default=0)
        if not others or common[best] < max(LEAST, request.lent + 1):
            return
        request.cache = others[best].cache.fork(common[best])
        request.lent = common[best]
        if best < len(self._kept):
            self._kept.append(self._kept.pop(best))

    def waits(self, request: Request, reading: Sequence[Request]) -> bool:
        """Whether a prompt had better wait, because one of those that are read begins as it does."""
        if not reading or not request.lends:
            return False
        wanted = self._prefix(request, request.shareable)
        most = max(wanted.common(self._prefix(other, other.prefill_end)) for other in reading)
        return most >= max(LEAST, request.cache.length + 1)

    def keep(self, request: Request) -> None:
        """Take over what a request that ended leaves to others."""
        own = self._prefix(request)
        request.release()
        if len(own.tokens) < LEAST or not own.cache.reaches(len(own.tokens)):
            return
        own.cache.crop(len(own.tokens))
        self._kept = [known for known in self._kept if not own.covers(known)]
        if not any(known.covers(own) for known in self._kept):
            self._kept.append(own)

    def clear(self) -> None:
        """Forget what was kept."""
        self._kept.clear()

    def used(self, requests: Sequence[Request]) -> int:
        """Bytes of pages, also of what is kept, each counted once, and of policies' and drafters' states."""
        states = sum(request.state.nbytes + getattr(request.draft, "nbytes", 0) for request in requests)
        return self._held([*(request.cache for request in requests), *(prefix.cache for prefix in self._kept)]) + states

    def _held(self, caches: Sequence[Cache]) -> int:
        """Bytes of the pages that caches have."""
        return sum(
            size * len({page for cache in caches for page in cache.held(window)})
            for window, size in self.stack.page_bytes.items()
        )

    def _growth(self, request: Request) -> int:
        """Bytes of the pages that the next pass takes for a request, at most; those that it copies are among them."""
        cache, slots = request.cache, self._slots(request) + request.drafter.most_rows
        first = request.policy.resume(cache, request.prefilling) // PAGE
        last = -(-min(cache.length + self._rows(request), slots) // PAGE)
        return sum(
            size
            * (max(0, last - len(cache.tables[window])) + cache.shared(window, first, last) + _branch_pages(request))
            for window, size in self.stack.page_bytes.items()
        )

    def _rows(self, request: Request) -> int:
        """Rows that a pass has for a request, at most."""
        return max(self.chunk if request.prefilling else GIVEN_ROWS, request.drafter.most_rows)

    def _reserved(self, requests: Sequence[Request]) -> int:
        """Bytes that requests may come to take together, without what no row sees any more."""
        total = sum(map(self._states, requests))
        for window, size in self.stack.page_bytes.items():
            pages = sum(self._most_pages(request, window) for request in requests)
            if window is None and not self.spec.rope.reread:  # what they share they go on sharing
                held = [page for request in requests for page in request.cache.held(window)]
                pages -= len(held) - len({*held})
            total += size * pages
        return total

    def _states(self, request: Request) -> int:
        """Bytes that the states of a request's policy and drafter may come to take."""
        tokens = self._slots(request)
        slots = request.policy.remembered(tokens, self.spec)
        return slots * self.stack.slot_bytes + request.drafter.memory(tokens)

    def _most_pages(self, request: Request, window: int | None) -> int:
        """Pages that a request may come to have; one more, since it copies a shared one that it goes on in."""
        most = -(-(self._slots(request) + request.drafter.most_rows) // PAGE) + 1
        most += _branch_pages(request)
        if window is None:
            return most
        rows = max(self.chunk, GIVEN_ROWS, request.drafter.most_rows) + request.policy.most_refreshed
        return min(most, (window + rows) // PAGE + 3 + _branch_pages(request))

    def _slots(self, request: Request) -> int:
        """Tokens that a request may come to have."""
        more = 0 if request.watch is not None else request.sampling.max_tokens
        return min(request.output_start + more, self.spec.context_limit)

    def _prefix(self, request: Request, count: int | None = None) -> Prefix:
        return Prefix.of(request, request.cache.exact if count is None else count, self.spec.rope)


def _branch_pages(request: Request) -> int:
    """Pages that a draft on a branch of the cache takes; one more, since it copies a shared one that it goes on in."""
    rows = request.drafter.branch_rows
    return -(-rows // PAGE) + 1 if rows else 0


def _mebibytes(count: int) -> str:
    """A size that ``count`` bytes fit into, to a tenth."""
    return f"{math.ceil(count / 2**20 * 10) / 10:,.1f}MiB"
