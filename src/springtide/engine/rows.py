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
    _masks: dict[tuple[int | None, int], Tensor] = field(init=False, default_factory=dict)

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

    def visible(self, window: int | None = None, start: int = 0) -> Tensor | None:
        """Which slots ``start .. length`` each row may see: bool ``[n, length - start]``; None if it is all of them.

        ``window`` hides positions that are ``window`` or more before the row's own (a sliding-window layer).
        """
        if len(self.tokens) == 1 and (window is None or self.length - start <= window):
            return None
        if (window, start) not in self._masks:
            self._masks[window, start] = self._mask(window, start)
        return self._masks[window, start]

    def _mask(self, window: int | None, start: int) -> Tensor:
        mask = torch.ones(len(self.tokens), self.length - start, dtype=torch.bool, device=self.device)
        mask[:, self.prefix - start :] = self._ancestors
        if window is not None:
            own = torch.tensor(self.positions, device=self.device)
            slots = torch.cat([torch.arange(start, self.prefix, device=self.device), own])
            mask &= slots[None, :] > own[:, None] - window
        return mask

    @property
    def _ancestors(self) -> Tensor:
        """bool ``[n, n]``: the ancestors of each row, and the row itself."""
        count = len(self.tokens)
        if self.is_chain:
            return torch.ones(count, count, dtype=torch.bool, device=self.device).tril()
        mask = torch.eye(count, dtype=torch.bool)
        for row, parent in enumerate(self.parents):
            if parent != PREFIX:
                mask[row] |= mask[parent]
        return mask.to(self.device)
