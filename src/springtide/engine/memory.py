"""Rows that requests share: a prompt that begins as another one did is not computed again."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from springtide.engine.request import Request
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
    """What a session remembers of requests that ended; the least recently used goes first.

    ``most``: bytes of it (default: a quarter of the machine's memory).
    """

    def __init__(self, rope: Rope, most: int | None = None) -> None:
        self.rope = rope
        self.most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4 if most is None else most
        self._kept: list[Prefix] = []  # the most recently used last

    def lend(self, request: Request, running: Iterable[Request]) -> None:
        """Give a request, of which nothing was computed yet, the rows of one that ended or runs and begins alike."""
        wanted = Prefix.of(request, request.shareable, self.rope)
        others = [*self._kept, *(self._of(other) for other in running if other is not request)]
        common = [wanted.common(other) for other in others]
        best = max(range(len(others)), key=common.__getitem__, default=0)
        if not others or common[best] < LEAST:
            return
        request.cache = others[best].cache.fork(common[best])
        request.lent = common[best]
        if best < len(self._kept):
            self._kept.append(self._kept.pop(best))

    def keep(self, request: Request) -> None:
        """Take over what a request that ended leaves to others."""
        own = self._of(request)
        own.cache.crop(len(own.tokens))
        request.release()
        if len(own.tokens) < LEAST:
            return
        self._kept = [known for known in self._kept if own.common(known) < len(known.tokens)]  # it has those too
        if all(known.common(own) < len(own.tokens) for known in self._kept):
            self._kept.append(own)
        while self._kept and self.nbytes > self.most:
            del self._kept[0]

    def _of(self, request: Request) -> Prefix:
        return Prefix.of(request, request.cache.exact, self.rope)

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""
        return sum(prefix.cache.nbytes for prefix in self._kept)
