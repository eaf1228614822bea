"""The keys and values of one sequence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from springtide.kernels import PAGE, Pages
from springtide.rows.pool import Pool


class Cache:
    """Post-RoPE keys and values of every layer, in the dtype that the model writes, on pages of a pool.

    Slot ``i < length`` holds the sequence's token ``i``; it lies on page ``table[i // PAGE]``. A pass writes its rows
    at the slots that follow its prefix; they count only once :meth:`commit` says so, and the next pass overwrites what
    was not committed. Writing below ``length`` refreshes tokens in place. Pages are taken as the cache grows, without
    copying anything, and given back when it is cropped or dropped. Forks share pages until one of them writes there.

    ``exact`` counts the leading tokens whose rows are as a dense pass would have written them.
    """

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.length = 0
        self.exact = 0
        self.table: tuple[int, ...] = ()

    def __del__(self) -> None:
        self.pool.drop(self.table)

    def reserve(self, start: int, stop: int, keys: Tensor) -> None:
        """Have pages of its own for slots ``start .. stop``, in the format of ``keys [H_kv, n, D]``.

        Raises :class:`springtide.rows.pool.PoolFullError`.
        """
        self.pool.fit(keys)
        pages = -(-stop // PAGE)
        shared = [i for i in range(start // PAGE, min(pages, len(self.table))) if self.pool.shared(self.table[i])]
        if pages <= len(self.table) and not shared:
            return
        table = list(self.table)
        for i in shared:
            own = self.pool.take()
            self.pool.page(own).copy_(self.pool.page(table[i]))
            self.pool.drop([table[i]])
            table[i] = own
            self.table = tuple(table)
        while len(table) < pages:
            table.append(self.pool.take())
            self.table = tuple(table)

    def pages(self, layer: int) -> Pages:
        """What kernels read with this cache's ``table``."""
        return self.pool.layer(layer)

    def write(self, layer: int, start: int, keys: Tensor, values: Tensor) -> None:
        """Store rows ``[H_kv, n, D]`` at slots ``start .. start + n``."""
        self.reserve(start, start + keys.shape[1], keys)
        self.pages(layer).write(self.table, start, keys, values)

    def read(self, layer: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys and values ``[H_kv, stop - start, D]`` of those slots, as far as there are pages.

        They may be views: not to be written, and right only as long as the cache holds them.
        """
        return self.pages(layer).read(self.table, start, min(stop, len(self.table) * PAGE))

    @torch.inference_mode()
    def commit(self, start: int, kept: Sequence[int], *, exact: bool) -> None:
        """Keep rows ``kept`` (ascending) of those written from slot ``start`` on, closing the gaps between them.

        ``length`` becomes at least ``start + len(kept)``: a refresh below it leaves it as it is. ``exact``: the rows
        attended to all that they could see; they are as a dense pass writes them if all before them are.
        """
        for to, row in enumerate(kept):
            if to != row:
                self._slot(start + to).copy_(self._slot(start + row))
        if exact and start <= self.exact:
            self.exact = max(self.exact, start + len(kept))
        elif not exact:
            self.exact = min(self.exact, start)
        self.length = max(self.length, start + len(kept))

    def _slot(self, slot: int) -> Tensor:
        return self.pool.page(self.table[slot // PAGE])[:, :, :, slot % PAGE]

    def crop(self, length: int) -> None:
        """Forget the tokens from position ``length`` on; pages that hold no others are given back."""
        self.length = min(self.length, length)
        self.exact = min(self.exact, length)
        kept = -(-self.length // PAGE)
        self.table, dropped = self.table[:kept], self.table[kept:]
        self.pool.drop(dropped)

    def fork(self, length: int | None = None) -> Cache:
        """A cache of the first ``length`` committed tokens (default: all) that goes on by itself.

        Both share the pages that neither writes.
        """
        twin = Cache(self.pool)
        twin.follow(self, self.length if length is None else length)
        return twin

    def follow(self, other: Cache, length: int) -> None:
        """Become a fork of ``other``'s first ``length`` tokens; this cache is empty."""
        self.length, self.exact = length, min(other.exact, length)
        self.table = other.table[: -(-length // PAGE)]
        self.pool.share(self.table)

    @property
    def layers(self) -> int:
        return self.pool.layers

    @property
    def nbytes(self) -> int:
        """Bytes of its pages, those that it shares included."""
        return len(self.table) * self.pool.page_bytes
