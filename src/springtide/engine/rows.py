"""A pass is a list of rows; a segment is one sequence's part of it.

A row is a token at a position with a parent. Prefill is a chain of rows, plain decoding is one row, a draft tree is
rows whose parents form a tree, and a refresh is a chain at positions that are in the cache already.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from springtide.engine.cache import Cache
from springtide.kernels.visible import Visible

PREFIX = -1  # the parent of a row that follows the prefix directly


@dataclass
class Segment:
    """Rows of one sequence.

    Every row sees the ``prefix`` first tokens of the cache, its ancestors among the rows, and itself. Row ``i`` is
    written to slot ``prefix + i`` of the cache. ``decoding`` is false for rows of a prompt or a refresh: a policy that
    approximates decoding alone computes those densely. ``state`` is the policy's own, one per sequence. ``bytes_read``
    counts what the policy reads of the cache; ``meter``, if any, is called with every sparse read.
    """

    cache: Cache
    prefix: int
    tokens: list[int]
    parents: list[int]
    decoding: bool
    state: Any
    bytes_read: int = 0
    device: torch.device | str = "cpu"
    meter: Callable[..., None] | None = None
    depths: list[int] = field(init=False)
    is_chain: bool = field(init=False)
    _seen: dict[tuple[int | None, int], Visible] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.depths = []
        for parent in self.parents:
            self.depths.append(0 if parent == PREFIX else self.depths[parent] + 1)
        self.is_chain = self.parents == list(range(-1, len(self.parents) - 1))

    @classmethod
    def chain(
        cls, cache: Cache, prefix: int, tokens: Sequence[int], *, decoding: bool, state: Any, device: Any = "cpu"
    ) -> Segment:
        """Rows that follow one another."""
        parents = list(range(-1, len(tokens) - 1))
        return cls(cache, prefix, list(tokens), parents, decoding, state, device=device)

    @property
    def length(self) -> int:
        """Slots that a row may see at most: the prefix and the segment's own rows."""
        return self.prefix + len(self.tokens)

    @property
    def positions(self) -> list[int]:
        """Position of each row in its sequence."""
        return [self.prefix + depth for depth in self.depths]

    def seen(self, window: int | None = None, start: int = 0) -> Visible:
        """What the rows see of slots ``start .. length``, counted from ``start``.

        ``window`` hides positions that are ``window`` or more before the row's own (a sliding-window layer).
        """
        if (window, start) not in self._seen:
            self._seen[window, start] = self._see(window, start)
        return self._seen[window, start]

    def _see(self, window: int | None, start: int) -> Visible:
        own = torch.tensor(self.positions, dtype=torch.int32, device=self.device)
        low = tail = None
        if window is not None and self.length - start > window:
            low = (own - (window - 1 + start)).clamp(min=0)
        if not self.is_chain:
            tail = self._ancestors
            if window is not None:
                tail = tail & (own[None, :] > own[:, None] - window)
        return Visible(self.prefix - start, self.length - start, own, low, tail)

    @property
    def _ancestors(self) -> Tensor:
        """bool ``[n, n]``: the ancestors of each row, and the row itself."""
        mask = torch.eye(len(self.tokens), dtype=torch.bool)
        for row, parent in enumerate(self.parents):
            if parent != PREFIX:
                mask[row] |= mask[parent]
        return mask.to(self.device)
