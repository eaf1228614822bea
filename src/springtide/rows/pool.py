"""The memory of caches: pages that they take as they grow and give back when they are dropped."""

from __future__ import annotations

import heapq
import mmap
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from threading import RLock

import torch
from torch import Tensor

from springtide.errors import SpringtideError
from springtide.kernels import PAGE, Pages, native

SLAB = 64  # pages that are allocated at once where address space cannot be reserved


def machine_memory() -> int:
    """Bytes of memory that the machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class PoolFullError(SpringtideError):
    """No page is left; pages come back when requests end."""


@dataclass(frozen=True)
class Format:
    """What a slot holds in each layer: keys and values of ``kv_heads`` heads."""

    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device


class Group:
    """Pages of ``PAGE`` slots in the ``layers`` that have the same sliding ``window`` (None: none), counted by how many
    caches have them.

    Head counts and dtype are those of the first keys that are written, until every page has been given back. The lowest
    free page is taken first, so that a request alone has pages that follow one another.

    On the CPU as much address space is reserved as the pool's limit allows, which the system fills as pages are
    written; when no page is in use, all of it is given back. On other devices ``SLAB`` pages are allocated at a time.
    """

    def __init__(self, pool: Pool, layers: Sequence[int], window: int | None) -> None:
        self.pool = pool
        self.places = {layer: place for place, layer in enumerate(layers)}
        self.window = window
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
        """Bytes of a page in these layers; 0 before there is a format."""
        if self.format is None:
            return 0
        own = self.format
        return 2 * len(self.places) * own.kv_heads * PAGE * own.head_dim * own.dtype.itemsize

    @property
    def used(self) -> int:
        """Bytes of the pages that caches have, each counted once."""
        return self.page_bytes * (len(self._users) - len(self._free))

    def layer(self, index: int) -> Pages:
        """One layer's part of every page."""
        return self._parts[self.places[index]]

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
            limit = self.pool.limit
            if limit is not None and self.pool.used + self.page_bytes > limit:
                raise PoolFullError(f"The cache is full: its limit is {limit} bytes; wait for requests to end.")
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
            if self._memory is not None and len(self._free) == len(self._users):
                self._memory.madvise(mmap.MADV_DONTNEED)

    def _grow(self) -> None:
        """Make room for one more page, or more."""
        assert self.format is not None, "keys are written before pages are read"
        first, known = len(self._users), len(self._slabs) * (len(self._slabs[0]) if self._slabs else 0)
        if first == known:
            if self._memory is not None:
                raise PoolFullError("The cache is as large as memory allows; wait for requests to end.")
            with torch.inference_mode(False):  # written in and out of it
                self._slabs.append(self._reserved() if self.format.device.type == "cpu" else self._slab())
                self._parts = [Pages(tuple(slab[:, i] for slab in self._slabs)) for i in range(len(self.places))]
        self._users.append(0)
        self._free.append(first)

    def _slab(self) -> Tensor:
        """``[SLAB, layers, 2, H_kv, PAGE, D]``, a head's pages one after the other, so that torch can read them so."""
        assert self.format is not None
        own = self.format
        shape = (len(self.places), 2, own.kv_heads, SLAB, PAGE, own.head_dim)
        return torch.zeros(shape, dtype=own.dtype, device=own.device).movedim(3, 0)

    def _reserved(self) -> Tensor:
        """``[pages, layers, 2, H_kv, PAGE, D]`` of address space, as many as there may ever be."""
        assert self.format is not None
        own = self.format
        limit = machine_memory() if self.pool.limit is None else self.pool.limit
        most = max(1, limit // self.page_bytes)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        self._memory = mmap.mmap(-1, most * self.page_bytes, flags=flags)
        shape = (most, len(self.places), 2, own.kv_heads, PAGE, own.head_dim)
        slab = torch.frombuffer(self._memory, dtype=own.dtype)
        if native.of(slab) is None:  # torch reads it: a head's pages one after the other
            self._memory.madvise(mmap.MADV_NOHUGEPAGE)
            return slab.view(*shape[1:4], most, *shape[4:]).movedim(3, 0)
        self._memory.madvise(mmap.MADV_HUGEPAGE)
        return slab.view(shape)


class Pool:
    """The memory of a model's caches: pages of ``PAGE`` slots, in groups of layers that have the same sliding window.

    Args:
        windows: each layer's sliding window in tokens, None for those without one; or how many layers there are.
        limit: bytes that all pages may take (default: the machine's memory).
    """

    def __init__(self, windows: int | Sequence[int | None], limit: int | None = None) -> None:
        self.windows = [None] * windows if isinstance(windows, int) else list(windows)
        self.limit = limit
        self.groups = {
            window: Group(self, [layer for layer, own in enumerate(self.windows) if own == window], window)
            for window in self.windows
        }

    @property
    def layers(self) -> int:
        return len(self.windows)

    @property
    def used(self) -> int:
        """Bytes of the pages that caches have, each counted once."""
        return sum(group.used for group in self.groups.values())
