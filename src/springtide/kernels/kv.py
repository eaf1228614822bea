"""Keys and values as kernels read them: pages of slots, and which of them the rows of a pass read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from springtide.kernels import native
from springtide.kernels.means import Means, mean
from springtide.kernels.visible import Visible

if TYPE_CHECKING:
    import springtide.kernels._cpu as _cpu

PAGE = 128
"""Slots of a page."""


@dataclass(frozen=True, eq=False)
class Pages:
    """One layer's pages: page ``p`` is number ``p % n`` of slab ``p // n``; slabs are ``[n, 2, H_kv, PAGE, D]``.

    How they lie in memory is nobody's business but this module's and the kernels'.
    """

    slabs: tuple[Tensor, ...]

    @classmethod
    def empty(cls, slots: int, like: Tensor) -> Pages:
        """As many as hold so many slots in the format of ``like [H_kv, n, D]``, in one slab, all zeros."""
        heads, _, head_dim = like.shape
        return cls((like.new_zeros(-(-slots // PAGE), 2, heads, PAGE, head_dim),))

    @property
    def kv_heads(self) -> int:
        return self.slabs[0].shape[2]

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot's keys in all heads; its values have as many."""
        return self.kv_heads * self.slabs[0].shape[4] * self.slabs[0].element_size()

    def heads(self, heads: slice) -> Pages:
        """Those of some KV heads alone."""
        return Pages(tuple(slab[:, :, heads] for slab in self.slabs))

    def page(self, number: int) -> Tensor:
        """``[2, H_kv, PAGE, D]``, a view."""
        slab, place = divmod(number, len(self.slabs[0]))
        return self.slabs[slab][place]

    def read(self, table: Sequence[int], start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys and values ``[H_kv, stop - start, D]`` of slots ``start .. stop``; views where memory allows it."""
        if stop <= start:
            empty = self.slabs[0].new_empty(self.kv_heads, 0, self.slabs[0].shape[4])
            return empty, empty
        first = start // PAGE
        runs = [run.transpose(0, 2).transpose(0, 1) for run in self._runs(table[first : -(-stop // PAGE)])]
        heads, head_dim = runs[0].shape[1], runs[0].shape[4]
        parts = [run.reshape(2, heads, -1, head_dim) for run in runs]
        joined = parts[0] if len(parts) == 1 else torch.cat(parts, 2)
        keys, values = joined[:, :, start - first * PAGE : stop - first * PAGE]
        return keys, values

    def means(self, table: Sequence[int], first: int, last: int, tokens: int) -> Means:
        """Of the blocks ``first .. last``, one at least, of ``tokens`` slots each, each page read where it lies.

        ``tokens`` divides ``PAGE`` or is a multiple of it.
        """
        start = first * tokens // PAGE
        part = min(tokens, PAGE)
        pages = [mean(run, part) for run in self._runs(table[start : -(-last * tokens // PAGE)])]
        joined = torch.cat([run.permute(1, 2, 0, 3, 4).flatten(2, 3) for run in pages], 2)
        if tokens > PAGE:
            joined = mean(joined.to(torch.promote_types(joined.dtype, torch.float32)), tokens // PAGE)
        skipped = (first * tokens - start * PAGE) // tokens
        keys, values = joined[:, :, skipped : skipped + last - first].to(self.slabs[0].dtype)
        return Means(keys, values, tokens)

    def _runs(self, numbers: Sequence[int]) -> list[Tensor]:
        """Pages ``[n, 2, H_kv, PAGE, D]`` with these numbers, those that follow one another in a slab as one view."""
        runs: list[Tensor] = []
        slab_pages, begin = len(self.slabs[0]), 0
        for i, number in enumerate(numbers):
            if i + 1 == len(numbers) or numbers[i + 1] != number + 1 or (number + 1) % slab_pages == 0:
                slab, place = divmod(numbers[begin], slab_pages)
                runs.append(self.slabs[slab][place : place + i + 1 - begin])
                begin = i + 1
        return runs

    def write(self, table: Sequence[int], start: int, keys: Tensor, values: Tensor) -> None:
        """Store rows ``[H_kv, n, D]`` at slots ``start .. start + n``."""
        done, count = 0, keys.shape[1]
        while done < count:
            page, place = divmod(start + done, PAGE)
            n = min(count - done, PAGE - place)
            own = self.page(table[page])[:, :, place : place + n]
            own[0].copy_(keys[:, done : done + n])
            own[1].copy_(values[:, done : done + n])
            done += n

    @cached_property
    def native(self) -> _cpu.Pages:
        return native.pages(self.slabs[0])


@dataclass(frozen=True, eq=False)
class Reads:
    """What the rows of one or several requests, side by side, read: prepared once a pass and window, for every layer.

    Attributes:
        tables: of each request, the numbers of the pages on which its slots lie, in order.
        seen: of each request, what its rows see of its slots.
    """

    tables: tuple[tuple[int, ...], ...]
    seen: tuple[Visible, ...]

    @classmethod
    def joined(cls, reads: Sequence[Reads]) -> Reads:
        """Of all these requests. Pages that several of them have at the same place are read once for all."""
        if len(reads) == 1:
            return reads[0]
        return cls(
            tuple(table for own in reads for table in own.tables), tuple(seen for own in reads for seen in own.seen)
        )

    @cached_property
    def native(self) -> _cpu.Reads:
        return native.reads(self.tables, self.seen)

    @property
    def rows(self) -> list[int]:
        """How many rows each request has."""
        return [len(seen.positions) for seen in self.seen]

    @cached_property
    def divided(self) -> list[float]:
        """Slots that the C++ kernels read for each request: what they read once for several is divided among these."""
        if len(self.seen) == 1:
            return [self.seen[0].length - self.seen[0].start]
        owner = [request for request, rows in enumerate(self.rows) for _ in range(rows)]
        slots = [0.0] * len(self.seen)
        for rows, (first, last) in self.native.groups:
            together = {owner[row] for row in rows}
            for request in together:
                seen = self.seen[request]
                own = min(last * native.SPAN, seen.length) - max(first * native.SPAN, seen.start)
                slots[request] += max(0, own) / len(together)
        return slots


@dataclass(frozen=True, eq=False)
class KV:
    """One layer's keys and values, as the rows of a pass read them."""

    pages: Pages
    reads: Reads

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, seen: Visible | None = None) -> KV:
        """A copy of dense keys and values ``[H_kv, L, D]`` on pages of their own; by default one row sees them all."""
        length = keys.shape[1]
        pages = Pages.empty(length, keys)
        table = tuple(range(len(pages.slabs[0])))
        pages.write(table, 0, keys, values)
        return cls(pages, Reads((table,), (seen or Visible.all(1, length, keys.device),)))

    def seen_by(self, rows: int) -> KV:
        """The same slots, all of which ``rows`` rows see."""
        seen = tuple(Visible.all(rows, own.length, own.positions.device) for own in self.reads.seen)
        return replace(self, reads=replace(self.reads, seen=seen))

    def heads(self, heads: slice) -> KV:
        """Those of some KV heads alone."""
        if heads == slice(None):
            return self
        return replace(self, pages=self.pages.heads(heads))

    def dense(self) -> list[tuple[Tensor, Tensor, Visible]]:
        """Keys and values ``[H_kv, n, D]`` of each request, from the first slot that is seen on, and what is seen."""
        found = []
        for table, seen in zip(self.reads.tables, self.reads.seen, strict=True):
            found.append((*self.pages.read(table, seen.start, seen.length), seen))
        return found
