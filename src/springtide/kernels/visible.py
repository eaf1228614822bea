"""Which slots of a cache the rows of a pass may see."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Visible:
    """What each of R rows sees of ``length`` slots, of which its own pass wrote those from ``prefix`` on.

    Attributes:
        positions: int32 ``[R]``, of the rows in their sequence.
        start: no row sees a slot before this one.
        low: int32 ``[R]``, the first slot that a row sees (None: slot 0). Of the rows' own slots it counts in a chain.
        tail: bool ``[R, length - prefix]``, which of the later slots a row sees; None for a chain, whose row ``i``
            sees those up to ``prefix + i``.
    """

    prefix: int
    length: int
    positions: Tensor
    low: Tensor | None = None
    tail: Tensor | None = None
    start: int = 0

    @classmethod
    def all(cls, rows: int, length: int, device: torch.device | str = "cpu") -> Visible:
        """Every one of ``rows`` rows sees everything."""
        positions = torch.full((rows,), length - 1, dtype=torch.int32, device=device)
        tail = None if rows == 1 else torch.empty(rows, 0, dtype=torch.bool, device=device)
        return cls(length if tail is not None else length - 1, length, positions, tail=tail)

    @classmethod
    def by(cls, mask: Tensor) -> Visible:
        """What a mask ``[R, L]`` (bool) says."""
        positions = torch.full(mask.shape[:1], mask.shape[1] - 1, dtype=torch.int32, device=mask.device)
        return cls(0, mask.shape[1], positions, tail=mask)

    @cached_property
    def mask(self) -> Tensor | None:
        """bool ``[R, length]``; None if every row sees everything."""
        rows, device = len(self.positions), self.positions.device
        if self.low is None and (self.prefix == self.length or (rows == 1 and self.tail is None)):
            return None
        slots = torch.arange(self.length, device=device)
        if self.tail is None:
            mask = slots <= self.prefix + torch.arange(rows, device=device)[:, None]
            return mask if self.low is None else mask & (slots >= self.low[:, None])
        mask = torch.ones(rows, self.length, dtype=torch.bool, device=device)
        if self.low is not None:
            mask = slots >= self.low[:, None]
        mask[:, self.prefix :] = self.tail
        return mask

    @cached_property
    def needed(self) -> Tensor | None:
        """:attr:`mask` of the slots from ``start`` on."""
        return None if self.mask is None else self.mask[:, self.start :]
