"""Blocks of tokens that are read as one: by their mean."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Means:
    """Mean ``keys`` and ``values [H_kv, n, D]`` of blocks of ``tokens`` each, in the dtype of the cache.

    Attention to a block is to ``tokens`` slots that are all alike.
    """

    keys: Tensor
    values: Tensor
    tokens: int

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, tokens: int) -> Self:
        """Of the slots ``[H_kv, n * tokens, D]``."""
        return cls(_mean(keys, tokens), _mean(values, tokens), tokens)

    @property
    def count(self) -> int:
        """How many blocks there are."""
        return self.keys.shape[1]

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def cut(self, count: int) -> Self:
        """The first ``count`` blocks at most."""
        return replace(self, keys=self.keys[:, :count], values=self.values[:, :count])

    def followed_by(self, others: Means) -> Self:
        """These blocks and others after them."""
        keys, values = torch.cat([self.keys, others.keys], 1), torch.cat([self.values, others.values], 1)
        return replace(self, keys=keys, values=values)


def _mean(x: Tensor, tokens: int) -> Tensor:
    blocks = x.reshape(len(x), -1, tokens, x.shape[2])
    return blocks.mean(2, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype)
