"""The memory of caches: pages that they take as they grow and give back when they are dropped."""

from __future__ import annotations

import heapq
import mmap
import os
from collections.abc import Iterable
from dataclasses import dataclass
from threading import RLock

import torch
from torch import Tensor

from springtide.errors import SpringtideError
from springtide.kernels import PAGE, Pages, native

SLAB = 64  # pages that are allocated at once where address space cannot be reserved


class PoolFullError(SpringtideError):
    """No page is left; pages come back when requests end."""


@dataclass(frozen=True)
class Format:
    """What a slot holds in each layer: keys and values of ``kv_heads`` heads."""

    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device


class Pool:
    """Pages of ``PAGE`` slots in ``layers`` layers, counted by how many caches have them.

    ``limit``: bytes that all pages may take, by default the machine's memory. Head counts and dtype are those of the
    first keys that are written, until every page has been given back. The lowest free page is taken first, so that a
    request alone has pages that follow one another.

    On the CPU the whole limit is reserved as address space, which the system fills as pages are written; when no page
    is in use, all of it is given back. On other devices ``SLAB`` pages are allocated at a time.
    """

    def __init__(self, layers: int, limit: int | None = None) -> None:
        self.layers = layers
        self.limit = limit
        self.format: Format | None = None
        self._lock = RLock()  # caches may be dropped in any thread
        self._forget()

    def _forget(self) -> None:
        """Give all memory back."""
        self._memory: mmap.mmap | None = None
        self._slabs: list[Tensor] = []
        self._parts: list[Pages] = []
        self._users: list[int] = []  # caches that have a page, by its number
        self._free: list[int] = []

    @property
    def page_bytes(self) -> int:
        """Bytes of a page in all layers; 0 before there is a format."""
        if self.format is None:
            return 0
        return 2 * self.layers * self.format.kv_heads * PAGE * self.format.head_dim * self.format.dtype.itemsize

    @property
    def used(self) -> int:
        """Bytes of the pages that caches have, each counted once."""
        return self.page_bytes * sum(users > 0 for users in self._users)

    def layer(self, index: int) -> Pages:
        """One layer's part of every page."""
        return self._parts[index]

    def page(self, number: int) -> Tensor:
        """All layers of a page, ``[layers, 2, H_kv, PAGE, D]``, a view."""
        slab, place = divmod(number, len(self._slabs[0]))
        return self._slabs[slab][place]

    def fit(self, keys: Tensor) -> None:
        """Take the format of keys ``[H_kv, n, D]``. Raises SpringtideError while there are pages of another one."""
        wanted = Format(keys.shape[0], keys.shape[2], keys.dtype, keys.device)
        if wanted == self.format:
            return
        with self._lock:
            if self.used:
                raise SpringtideError(
                    f"The cache holds {self.format}, but {wanted} is written; drop what was read before that changed."
                )
            self._forget()
            self.format = wanted

    def take(self) -> int:
        """The lowest free page, for one cache. Raises PoolFullError."""
        with self._lock:
            if not self._free:
                self._grow()
            number = heapq.heappop(self._free)
            self._users[number] = 1
            return number

    def share(self, numbers: Iterable[int]) -> None:
        """One more cache has these pages."""
        with self._lock:
            for number in numbers:
                self._users[number] += 1

    def shared(self, number: int) -> bool:
        """Whether more than one cache has the page, so that it must not be written."""
        return self._users[number] > 1

    def drop(self, numbers: Iterable[int]) -> None:
        """A cache has these pages no more."""
        with self._lock:
            for number in numbers:
                self._users[number] -= 1
                if self._users[number] == 0:
                    heapq.heappush(self._free, number)
            if self._memory is not None and not any(self._users):
                self._memory.madvise(mmap.MADV_DONTNEED)

    def _grow(self) -> None:
        """Make room for one more page, or more."""
        assert self.format is not None, "keys are written before pages are read"
        first, known = len(self._users), len(self._slabs) * (len(self._slabs[0]) if self._slabs else 0)
        most = None if self.limit is None else self.limit // self.page_bytes
        if most is not None and first >= most:
            raise PoolFullError(f"The cache is full: its limit is {self.limit} bytes; wait for requests to end.")
        if first == known:
            if self._memory is not None:
                raise PoolFullError("The cache is as large as the machine's memory; wait for requests to end.")
            with torch.inference_mode(False):  # written in and out of it
                self._slabs.append(self._reserved(most) if self.format.device.type == "cpu" else self._slab())
                self._parts = [Pages(tuple(slab[:, i] for slab in self._slabs)) for i in range(self.layers)]
        self._users.append(0)
        self._free.append(first)

    def _slab(self) -> Tensor:
        """``[SLAB, layers, 2, H_kv, PAGE, D]``, a head's pages one after the other, so that torch can read them so."""
        assert self.format is not None
        own = self.format
        shape = (self.layers, 2, own.kv_heads, SLAB, PAGE, own.head_dim)
        return torch.zeros(shape, dtype=own.dtype, device=own.device).movedim(3, 0)

    def _reserved(self, most: int | None) -> Tensor:
        """``[pages, layers, 2, H_kv, PAGE, D]`` of address space, as many as there may ever be."""
        assert self.format is not None
        own = self.format
        if most is None:
            most = max(1, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // self.page_bytes)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        self._memory = mmap.mmap(-1, most * self.page_bytes, flags=flags)
        shape = (most, self.layers, 2, own.kv_heads, PAGE, own.head_dim)
        slab = torch.frombuffer(self._memory, dtype=own.dtype)
        if native.of(slab) is None:  # torch reads it: a head's pages one after the other
            self._memory.madvise(mmap.MADV_NOHUGEPAGE)
            return slab.view(*shape[1:4], most, *shape[4:]).movedim(3, 0)
        self._memory.madvise(mmap.MADV_HUGEPAGE)
        return slab.view(shape)
