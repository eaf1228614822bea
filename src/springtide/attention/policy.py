"""What an attention policy is: it decides which cached tokens each layer reads.

A policy is a frozen dataclass of its options. What it remembers of a sequence lives in that sequence's ``State``.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from springtide import kernels
from springtide.kernels import Means
from springtide.options import Share, amount, at_least, option
from springtide.rows.cache import Cache
from springtide.rows.segment import Segment
from springtide.rows.spec import ModelSpec

STEP = 64  # tokens of context by which a budget that is a share of it grows
EVERY = slice(None)


@dataclass(slots=True)
class Layer:
    """One layer's attention: its index, logit scale, soft cap and sliding window (tokens), the latter two if any."""

    index: int
    scale: float
    softcap: float | None = None
    window: int | None = None


@dataclass
class State:
    """What a policy remembers of a sequence; nothing, for most."""

    @property
    def nbytes(self) -> int:
        """Bytes of what grows with the sequence."""
        return 0

    def crop(self, length: int) -> None:
        """Forget the tokens from position ``length`` on."""

    def fork(self) -> Self:
        """A state that goes on by itself."""
        return copy(self)


@dataclass(frozen=True)
class Slots:
    """What the rows of a segment read in place of everything.

    Attributes:
        index: int64 ``[R, H_kv, B]``, the slots that each row reads, less those that it may not see.
        valid: bool, the same shape; False excludes a slot. None excludes none.
        means: stand for slots that are not read.
        full_heads: KV heads that read everything instead.
    """

    index: Tensor
    valid: Tensor | None = None
    means: Means | None = None
    full_heads: Sequence[int] = ()


@dataclass(frozen=True)
class Policy:
    """Dense attention: every layer reads all that it may see.

    It is the base of every other policy. A policy says what is read; the pass does the reading (:func:`read`).
    """

    name: ClassVar[str] = "dense"
    rows_independent: ClassVar[bool] = True
    """Whether a chain of rows in one pass gives what the same rows give one pass at a time."""

    def resolve(self, spec: ModelSpec) -> Self:
        """Check the options against a model and fill in those that depend on it; raises SpringtideError."""
        return self

    def new_state(self) -> State:
        """State of a sequence that begins."""
        return State()

    def resume(self, cache: Cache, prefilling: bool) -> int:
        """The first position that the next pass computes: ``cache.length``, or less for a refresh."""
        return cache.length

    def headroom(self, cache: Cache) -> int | None:
        """How many tokens may be committed before rows are computed in another way; None for no limit.

        That is when the next refresh is due, or when a budget that is a share of the context grows.
        """
        return None

    @property
    def most_refreshed(self) -> int:
        """Tokens that a pass may write anew, at most."""
        return 0

    def remembered(self, tokens: int, spec: ModelSpec) -> int:
        """How many slots of a layer the state of a request of so many tokens is as large as, at most."""
        return 0

    @property
    def budget(self) -> int | Share | None:
        """Tokens that a sparse layer reads per KV head, or a share of the context; None where there is no such number.

        Policies that have one declare it as an option of this name.
        """
        return None

    def budget_at(self, length: int) -> int | None:
        """The budget in tokens when there are ``length``; None where there is none."""
        return None

    @property
    def named_budget(self) -> int | str | None:
        """The budget as results name it: tokens, a share such as ``"5%"``, or None."""
        return str(self.budget) if isinstance(self.budget, Share) else self.budget

    def reads(self, layer: Layer, q: Tensor, segment: Segment) -> Slots | None:
        """What a layer reads for the segment's rows ``q [R, H, D]``, whose keys are in the cache already.

        None stands for everything that the rows may see.
        """
        return None

    def exact(self, segment: Segment) -> bool:
        """Whether the segment's rows attend to everything that they may see, in every layer."""
        return True

    def grown(self, segment: Segment, origins: Sequence[int]) -> None:
        """Rows were added to the segment in mid-pass: each goes on from the hidden state of the row in ``origins``."""

    def commit(self, segment: Segment, kept: Sequence[int]) -> None:
        """The pass is over and rows ``kept`` (ascending) of the segment stay in the cache."""


@dataclass(frozen=True)
class Sparse(Policy):
    """The base of policies whose sparse layers read a number of tokens.

    A budget that is a share of the context grows every ``STEP`` tokens, between passes: all rows of a pass have the
    same, whichever others are with them.
    """

    budget: int | Share = option(1024, "tokens that a sparse layer reads per KV head, or a share of the context as 5%")

    def resolve(self, spec: ModelSpec) -> Self:
        at_least(self.budget, 1, f"{self.name}: budget")
        return self

    def budget_at(self, length: int) -> int:
        return amount(self.budget, -(-length // STEP) * STEP)

    @property
    def stepwise(self) -> bool:
        """Whether what a row reads changes with each ``STEP`` of context."""
        return isinstance(self.budget, Share)

    def exact(self, segment: Segment) -> bool:
        return not segment.decoding or self.covers(segment)

    def headroom(self, cache: Cache) -> int | None:
        length = cache.length
        steps = [STEP - length % STEP] if self.stepwise else []
        held = self.budget_at(length + 1) - length  # tokens more that the budget holds
        return min([*steps, held] if held > 0 else steps, default=None)

    def tokens(self, segment: Segment) -> int:
        """The budget of the segment's rows."""
        return self.budget_at(segment.prefix + 1)

    def covers(self, segment: Segment) -> bool:
        """Whether the budget holds what the segment's rows may see; more than ``headroom`` of them are not kept."""
        return self.tokens(segment) > segment.prefix


def dense(layer: Layer, q: Tensor, segment: Segment, heads: slice = EVERY) -> Tensor:
    """Attention over everything that the layer lets the rows see, of the KV ``heads`` whose queries ``q`` are."""
    kv = segment.kv(layer.index, layer.window).heads(heads)
    segment.bytes_read += sum(kernels.bytes_read(q, kv))
    out, _ = kernels.attend(q, kv, layer.scale, layer.softcap, lse=False)
    return out


def read(layer: Layer, q: Tensor, segment: Segment, slots: Slots | None) -> Tensor:
    """Attention ``[R, H, D]`` of the segment's rows ``q [R, H, D]`` over what a policy says that they read."""
    return dense(layer, q, segment) if slots is None else gathered(layer, q, segment, slots)


def gathered(layer: Layer, q: Tensor, segment: Segment, slots: Slots) -> Tensor:
    """Attention over some slots alone, less those that a row may not see."""
    index, valid, means = slots.index, slots.valid, slots.means
    kv = segment.kv(layer.index)
    mask = segment.seen().mask
    if mask is not None:
        mask = mask[:, None, :].expand(-1, index.shape[1], -1).gather(2, index)
    if valid is not None:
        mask = valid if mask is None else mask & valid
    if segment.meter is not None:
        kept = torch.ones_like(index, dtype=torch.bool) if mask is None else mask
        segment.meter(layer, q, segment, index, kept, slots.full_heads)
    segment.bytes_read += 2 * index.numel() * kv.pages.slot_bytes // kv.pages.kv_heads
    segment.bytes_read += 0 if means is None else len(index) * means.nbytes
    out, _ = kernels.attend_gathered(q, kv, index, layer.scale, mask, layer.softcap, means, lse=False)
    group = q.shape[1] // kv.pages.kv_heads
    for head in slots.full_heads:
        queries = slice(head * group, (head + 1) * group)
        out[:, queries] = dense(layer, q[:, queries], segment, slice(head, head + 1))
    return out
