"""The memory of a session: what its requests may take, and the rows that they share."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from springtide.engine.request import Request
from springtide.errors import SpringtideError
from springtide.kernels import PAGE
from springtide.model.stack import Stack
from springtide.rows.cache import Cache
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


class Memory:
    """What requests of a session take and share, and what is kept of those that ended.

    ``limit``: bytes that pages of caches and drafters' states may take. Every request that runs has reserved what it
    may come to take, and what is kept may have the rest; the least recently used goes first. Without a limit all
    requests may run, and a quarter of the machine's memory may be kept.
    """

    def __init__(self, stack: Stack, limit: int | None = None) -> None:
        self.spec, self.page_bytes = stack.spec, stack.page_bytes
        self.limit = limit
        self._kept: list[Prefix] = []  # the most recently used last

    def check(self, request: Request) -> None:
        """Raise SpringtideError for a request that would not fit if it were alone."""
        needed = self._reserved([request])
        if self.limit is not None and needed > self.limit:
            raise SpringtideError(
                f"The request may come to take {_mebibytes(needed)} of memory, for {self._slots(request)} tokens, but "
                f"cache_memory is {_mebibytes(self.limit)}; raise it, shorten the prompt or lower max_tokens."
            )

    def admits(self, request: Request, running: Sequence[Request]) -> bool:
        """Whether there is room for a request beside those that run; it then shares what it begins with."""
        own = request.cache
        self.lend(request, running)
        if self.limit is not None and self._reserved([*running, request]) > self.limit:
            request.cache, request.lent = own, 0
            return False
        self._trim([*running, request])
        return True

    def lend(self, request: Request, running: Sequence[Request]) -> None:
        """Give a request of which nothing was computed yet the rows of one that ended or runs and begins alike."""
        if not request.lends or request.cache.length > request.lent:
            return
        wanted = self._prefix(request, request.shareable)
        others = [*self._kept, *(self._prefix(other) for other in running if other is not request)]
        common = [wanted.common(other) for other in others]
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

    def keep(self, request: Request, running: Sequence[Request]) -> None:
        """Take over what a request that ended leaves to others."""
        own = self._prefix(request)
        own.cache.crop(len(own.tokens))
        request.release()
        if len(own.tokens) >= LEAST:
            self._kept = [known for known in self._kept if own.common(known) < len(known.tokens)]  # it has those too
            if all(known.common(own) < len(own.tokens) for known in self._kept):
                self._kept.append(own)
        self._trim(running)

    def clear(self) -> None:
        """Forget what was kept."""
        self._kept.clear()

    def used(self, running: Sequence[Request]) -> int:
        """Bytes that pages and drafters' states take, each page counted once."""
        caches = [request.cache for request in running] + [prefix.cache for prefix in self._kept]
        drafts = sum(getattr(request.draft, "nbytes", 0) for request in running)
        return self.page_bytes * len(_pages(caches)) + drafts

    def _trim(self, running: Sequence[Request]) -> None:
        """Forget what was kept as long as it takes more than there is to spare."""
        held = _pages(request.cache for request in running)
        spare = _machine() // 4 if self.limit is None else self.limit - self._reserved(running)
        while self._kept and self.page_bytes * len(_pages(x.cache for x in self._kept) - held) > spare:
            del self._kept[0]

    def _reserved(self, requests: Sequence[Request]) -> int:
        """Bytes that requests may come to take together."""
        growth = sum(max(0, self._most_pages(request) - len(request.cache.table)) for request in requests)
        drafts = sum(request.drafter.memory(self._slots(request)) for request in requests)
        return self.page_bytes * (growth + len(_pages(request.cache for request in requests))) + drafts

    def _most_pages(self, request: Request) -> int:
        """Pages that a request may come to have; one more, since it copies a shared one that it goes on in."""
        return -(-(self._slots(request) + request.drafter.most_rows) // PAGE) + 1

    def _slots(self, request: Request) -> int:
        """Tokens that a request may come to have."""
        more = 0 if request.watch is not None else request.sampling.max_tokens
        return min(request.output_start + more, self.spec.context_limit)

    def _prefix(self, request: Request, count: int | None = None) -> Prefix:
        return Prefix.of(request, request.cache.exact if count is None else count, self.spec.rope)


def _pages(caches: Iterable[Cache]) -> set[int]:
    return {page for cache in caches for page in cache.table}


def _machine() -> int:
    """Bytes of memory that the machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"
