"""What an attention policy is: it decides which cached tokens each layer reads.

A policy is a frozen dataclass of its options. What it remembers of a sequence lives in that sequence's ``State``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from springtide import kernels
from springtide.kernels import Means
from springtide.options import Share, amount, at_least, option
from springtide.rows.segment import Segment
from springtide.rows.spec import ModelSpec

STEP = 64  # tokens of context by which a budget that is a share of it grows
EVERY = slice(None)


@dataclass(frozen=True)
class Layer:
    """One layer's attention: its index, logit scale, soft cap and sliding window (tokens), the latter two if any."""

    index: int
    scale: float
    softcap: float | None = None
    window: int | None = None


@dataclass
class State:
    """What every policy remembers of a sequence.

    ``exact`` counts the leading tokens whose cache rows are as a dense pass would have written them.
    """

    exact: int = 0

    def crop(self, length: int) -> None:
        """Forget the tokens from position ``length`` on."""
        self.exact = min(self.exact, length)


@dataclass(frozen=True)
class Policy:
    """Dense attention, and the base of every other policy."""

    name: ClassVar[str] = "dense"
    rows_independent: ClassVar[bool] = True
    """Whether a chain of rows in one pass gives what the same rows give one pass at a time."""

    def resolve(self, spec: ModelSpec) -> Self:
        """Check the options against a model and fill in those that depend on it; raises SpringtideError."""
        return self

    def new_state(self, exact: int) -> State:
        """State of a sequence whose first ``exact`` tokens are in the cache as a dense pass writes them."""
        return State(exact)

    def resume(self, state: State, length: int, prefilling: bool) -> int:
        """The first position that the next pass computes: ``length`` (tokens in the cache), or less for a refresh."""
        return length

    def headroom(self, state: State, length: int) -> int | None:
        """How many tokens may be committed before rows are computed in another way; None for no limit.

        That is when the next refresh is due, or when a budget that is a share of the context grows.
        """
        return None

    def budget_at(self, length: int) -> int | None:
        """Tokens of ``length`` that a sparse layer reads per KV head; None where there is no such number."""
        return None

    @property
    def named_budget(self) -> int | str | None:
        """The budget as results name it: tokens, a share such as ``"5%"``, or None."""
        return None

    def attend(self, layer: Layer, q: Tensor, segment: Segment) -> Tensor:
        """Attention output ``[R, H, D]`` of the segment's rows ``q [R, H, D]``, whose keys are in the cache already."""
        return dense(layer, q, segment)

    def grown(self, segment: Segment, origins: Sequence[int]) -> None:
        """Rows were added to the segment in mid-pass: each goes on from the hidden state of the row in ``origins``."""

    def commit(self, segment: Segment, kept: int) -> None:
        """The pass is over and ``kept`` rows of the segment stay in the cache."""
        state: State = segment.state
        if not segment.decoding and segment.prefix <= state.exact:
            state.exact = max(state.exact, segment.prefix + kept)


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
    def named_budget(self) -> int | str:
        return str(self.budget) if isinstance(self.budget, Share) else self.budget

    @property
    def stepwise(self) -> bool:
        """Whether what a row reads changes with each ``STEP`` of context."""
        return isinstance(self.budget, Share)

    def headroom(self, state: State, length: int) -> int | None:
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
    start = 0 if layer.window is None else max(0, segment.prefix - layer.window + 1)
    keys, values = (x[heads] for x in segment.cache.read(layer.index, start, segment.length))
    segment.bytes_read += keys.nbytes + values.nbytes
    return kernels.attend(q, keys, values, layer.scale, segment.seen(layer.window, start), layer.softcap)


def gathered(
    layer: Layer,
    q: Tensor,
    segment: Segment,
    index: Tensor,
    valid: Tensor | None = None,
    means: Means | None = None,
    full_heads: Sequence[int] = (),
) -> Tensor:
    """Attention over slots ``index [R, H_kv, B]`` alone, less those that a row may not see or ``valid`` excludes.

    ``means`` stand for slots that are not read. The KV heads ``full_heads`` attend to everything instead.
    """
    keys, values = segment.cache.read(layer.index, 0, segment.length)
    mask = segment.seen().mask
    if mask is not None:
        mask = mask[:, None, :].expand(-1, index.shape[1], -1).gather(2, index)
    if valid is not None:
        mask = valid if mask is None else mask & valid
    if segment.meter is not None:
        read = torch.ones_like(index, dtype=torch.bool) if mask is None else mask
        segment.meter(layer, q, segment, index, read, full_heads)
    segment.bytes_read += index.numel() * keys.shape[2] * (keys.element_size() + values.element_size())
    segment.bytes_read += 0 if means is None else len(index) * means.nbytes
    out = kernels.attend_gathered(q, keys, values, index, layer.scale, mask, layer.softcap, means)
    group = q.shape[1] // len(keys)
    for head in full_heads:
        queries = slice(head * group, (head + 1) * group)
        out[:, queries] = dense(layer, q[:, queries], segment, slice(head, head + 1))
    return out
