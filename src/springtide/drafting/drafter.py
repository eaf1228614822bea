"""What a drafter is: it proposes the tokens to try next.

A drafter holds weights and options. What it remembers of a sequence lives in that sequence's draft state, which rides
on the sequence's segments as ``segment.draft``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol, Self

from torch import Tensor

from springtide.drafting.tree import TokenTree
from springtide.rows.segment import Segment
from springtide.rows.spec import ModelSpec


class Target(Protocol):
    """The model that drafts are for (:class:`springtide.model.stack.Stack`)."""

    model: Any
    spec: ModelSpec

    @property
    def fingerprint(self) -> str: ...
    def norm(self, hidden: Tensor) -> Tensor: ...
    def head(self, normed: Tensor) -> Tensor: ...


class Pass(Protocol):
    """A forward pass of the target (:class:`springtide.model.stack.Pass`)."""

    segments: Sequence[Segment]

    def embed(self) -> Tensor: ...
    def run(self, hidden: Tensor, start: int, stop: int) -> Tensor: ...
    def split(self, hidden: Tensor) -> list[Tensor]: ...
    def grow(
        self, hidden: Tensor, parents: Sequence[Sequence[int]], origins: Sequence[Sequence[int]], rows: Tensor
    ) -> Tensor: ...


class Drafter:
    """Plain decoding, and the base of every drafter."""

    name: ClassVar[str] = "none"

    def resolve(self, target: Target) -> Self:
        """The drafter, ready for ``target``; raises SpringtideError if it was made for another model."""
        return self

    def new_state(self) -> Any:
        """Draft state of a sequence of which nothing was computed yet; copied when the sequence is forked."""
        return None

    def forward(self, step: Pass, layers: int) -> Tensor:
        """Run a pass through all ``layers`` layers: final hidden states ``[R, hidden]`` of the rows that were planned.

        A drafter may add rows in mid-pass, and take hidden states for its own use.
        """
        return step.run(step.embed(), 0, layers)

    def commit(self, segment: Segment, hidden: Tensor, kept: Sequence[int]) -> None:
        """A pass is over: rows ``kept`` (ascending) stay; ``hidden [rows, hidden]`` are the segment's final states.

        Called when the last of these rows has been asked for the next token. What it followed is committed already.
        """

    def propose(self, state: Any, tokens: Sequence[int]) -> TokenTree:
        """A tree whose node 0 is the last of ``tokens``, the committed tokens of the sequence with this state."""
        return TokenTree.single(tokens[-1])
