"""The keys and values of one sequence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from springtide.kernels import PAGE, Means, Pages
from springtide.rows.pool import Group, Pool


class Cache:
    """Post-RoPE keys and values of every layer, in the dtype that the model writes, on pages of a pool.

    Slot ``i < length`` holds the sequence's token ``i``. In the layers with a sliding window ``w`` (None: none) it lies
    on page ``tables[w][i // PAGE]``, unless that is one of the first ``released[w]`` pages, which were given back. A
    pass writes its rows at the slots that follow its prefix; they count only once :meth:`commit` says so, and the next
    pass overwrites what was not committed. Writing below ``length`` refreshes tokens in place. Pages are taken as the
    cache grows, without copying anything, and given back when it is cropped or dropped. Forks share pages until one of
    them writes there.

    ``exact`` counts the leading tokens whose rows are as a dense pass would have written them.
    """

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.length = 0
        self.exact = 0
        self.tables: dict[int | None, tuple[int, ...]] = dict.fromkeys(pool.groups, ())
        self.released = dict.fromkeys(pool.groups, 0)

    def __del__(self) -> None:
        for window, group in self.pool.groups.items():
            group.drop(self.held(window))

    def held(self, window: int | None) -> tuple[int, ...]:
        """The pages that it has in the layers with this sliding window."""
        return self.tables[window][self.released[window] :]

    def shared(self, window: int | None, first: int, last: int) -> int:
        """How many of the pages ``first .. last`` others have too, so that who writes there copies them."""
        return sum(map(self.pool.groups[window].shared, self.tables[window][first:last]))

    def reserve(self, start: int, stop: int, keys: Tensor) -> None:
        """Have pages of its own for slots ``start .. stop``, in the format of ``keys [H_kv, n, D]``.

        Raises :class:`springtide.rows.pool.PoolFullError`.
        """
        for window, group in self.pool.groups.items():
            group.fit(keys)
            first, last = start // PAGE, -(-stop // PAGE)
            if last > len(self.tables[window]) or self.shared(window, first, last):
                self._take(window, first, last)

    def _take(self, window: int | None, first: int, last: int) -> None:
        """Have pages ``first .. last`` of a group alone."""
        group, table = self.pool.groups[window], list(self.tables[window])
        for i in range(first, last):
            if i == len(table):
                table.append(group.take())
            elif group.shared(table[i]):
                own = group.take()
                group.page(own).copy_(group.page(table[i]))
                group.drop([table[i]])
                table[i] = own
            self.tables[window] = tuple(table)

    def pages(self, layer: int) -> Pages:
        """What kernels read with the cache's table for this layer's window."""
        return self.pool.groups[self.pool.windows[layer]].layer(layer)

    def write(self, layer: int, start: int, keys: Tensor, values: Tensor) -> None:
        """Store rows ``[H_kv, n, D]`` at slots ``start .. start + n``."""
        self.reserve(start, start + keys.shape[1], keys)
        self.pages(layer).write(self.tables[self.pool.windows[layer]], start, keys, values)

    def read(self, layer: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys and values ``[H_kv, stop - start, D]`` of those slots, as far as there are pages.

        They may be views: not to be written, and right only as long as the cache holds them.
        """
        table = self.tables[self.pool.windows[layer]]
        return self.pages(layer).read(table, start, min(stop, len(table) * PAGE))

    def means(self, layer: int, first: int, last: int, tokens: int) -> Means:
        """Of the blocks ``first .. last`` of ``tokens`` slots each; see :meth:`springtide.kernels.kv.Pages.means`."""
        return self.pages(layer).means(self.tables[self.pool.windows[layer]], first, last, tokens)

    @torch.inference_mode()
    def commit(self, start: int, kept: Sequence[int], *, exact: bool) -> None:
        """Keep rows ``kept`` (ascending) of those written from slot ``start`` on, closing the gaps between them.

        ``length`` becomes at least ``start + len(kept)``: a refresh below it leaves it as it is. ``exact``: the rows
        attended to all that they could see; they are as a dense pass writes them if all before them are.
        """
        for to, row in enumerate(kept):
            if to != row:
                for window, group in self.pool.groups.items():
                    target, source = (_slot(group, self.tables[window], start + place) for place in (to, row))
                    target.copy_(source)
        if exact and start <= self.exact:
            self.exact = max(self.exact, start + len(kept))
        elif not exact:
            self.exact = min(self.exact, start)
        self.length = max(self.length, start + len(kept))

    def crop(self, length: int) -> None:
        """Forget the tokens from ``length``, which it reaches, on; pages that hold no others are given back."""
        self.length = min(self.length, length)
        self.exact = min(self.exact, length)
        kept = -(-self.length // PAGE)
        for window, group in self.pool.groups.items():
            group.drop(self.held(window)[max(0, kept - self.released[window]) :])
            self.tables[window] = self.tables[window][:kept]
            self.released[window] = min(self.released[window], kept)

    def release(self, start: int) -> None:
        """Give back the pages that rows from position ``start`` on do not see, in layers with a sliding window."""
        for window, group in self.pool.groups.items():
            if window is not None:
                table, before = self.tables[window], self.released[window]
                count = min(len(table), max(before, (start - window + 1) // PAGE))
                group.drop(table[before:count])
                self.released[window] = count  # these places keep their numbers, which nothing reads

    def reaches(self, length: int) -> bool:
        """Whether a sequence may go on from its first ``length`` tokens: what the next rows see is still there."""
        return length == 0 or all(
            window is None or self.released[window] * PAGE <= max(0, length - window + 1) for window in self.tables
        )

    def fork(self, length: int | None = None) -> Cache:
        """A cache of the first ``length`` committed tokens (default: all), which it reaches, that goes on by itself.

        Both share the pages that neither writes.
        """
        twin = Cache(self.pool)
        twin.follow(self, self.length if length is None else length)
        return twin

    def follow(self, other: Cache, length: int) -> None:
        """Become a fork of ``other``'s first ``length`` tokens; this cache is empty."""
        self.length, self.exact = length, min(other.exact, length)
        count = -(-length // PAGE)
        self.tables = {window: table[:count] for window, table in other.tables.items()}
        self.released = {window: min(count, released) for window, released in other.released.items()}
        for window, group in self.pool.groups.items():
            group.share(self.held(window))

    @property
    def layers(self) -> int:
        return self.pool.layers

    @property
    def nbytes(self) -> int:
        """Bytes of its pages, those that it shares included."""
        return sum(group.page_bytes * len(self.held(window)) for window, group in self.pool.groups.items())


def _slot(group: Group, table: Sequence[int], slot: int) -> Tensor:
    return group.page(table[slot // PAGE])[:, :, :, slot % PAGE]
