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
        low: int32 ``[R]``, the first slot that a row sees (None: slot 0). Of the rows' own slots it counts in a chain.
        tail: bool ``[R, length - prefix]``, which of the later slots a row sees; None for a chain, whose row ``i``
            sees those up to ``prefix + i``.
    """

    prefix: int
    length: int
    positions: Tensor
    low: Tensor | None = None
    tail: Tensor | None = None

    @classmethod
    def by(cls, mask: Tensor) -> Visible:
        """What a mask ``[R, L]`` (bool) says."""
        positions = torch.full(mask.shape[:1], mask.shape[1] - 1, dtype=torch.int32, device=mask.device)
        return cls(0, mask.shape[1], positions, tail=mask)

    @cached_property
    def mask(self) -> Tensor | None:
        """bool ``[R, length]``; None if every row sees everything."""
        rows, device = len(self.positions), self.positions.device
        if rows == 1 and self.low is None and self.tail is None:
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
