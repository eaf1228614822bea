"""Slots that were chosen before a pass, and stay while some tokens are decoded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from springtide.attention.policy import Layer, Policy, Slots
from springtide.rows.segment import Segment


@dataclass(frozen=True)
class Held(Policy):
    """Every row reads what one row of each layer chose, and all that came after that row.

    Nothing is chosen while rows are decoded, so that none depends on those beside it. Not for users: a drafter holds
    what the rows that verified its last draft wanted.

    Attributes:
        slots: of each layer that does not read everything, the choice ``[1, H_kv, B]`` of one row.
        length: how many tokens there were at that row, its own included.
    """

    name: ClassVar[str] = "held"

    slots: Mapping[int, Slots]
    length: int

    def reads(self, layer: Layer, q: Tensor, segment: Segment) -> Slots | None:
        own = self.slots.get(layer.index)
        if own is None or not segment.decoding:
            return None
        shape = (segment.rows, own.index.shape[1], -1)
        since = torch.arange(self.length, segment.length, device=own.index.device).expand(*shape[:2], -1)
        index = torch.cat([own.index.expand(shape), since], 2)
        valid = own.valid
        if valid is not None:
            valid = torch.cat([valid.expand(shape), torch.ones_like(since, dtype=torch.bool)], 2)
        return replace(own, index=index, valid=valid)

    def exact(self, segment: Segment) -> bool:
        return not self.slots
