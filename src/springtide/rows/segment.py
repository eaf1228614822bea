"""A segment is one sequence's part of the rows of a pass.

A row is a token at a position with a parent. Prefill is a chain of rows, plain decoding is one row, a draft tree is
rows whose parents form a tree, and a refresh is a chain at positions that are in the cache already.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from springtide.kernels import KV, Reads, Visible
from springtide.rows.cache import Cache

PREFIX = -1  # the parent of a row that follows the prefix directly
NO_TOKEN = -1  # the id of a row that is given as a vector

Kind = Literal["prompt", "decode", "verify", "refresh"]
"""What rows are: of a prompt, tokens that are decoded one after the other, a draft, or written anew as a prompt's."""


@dataclass(frozen=True, eq=False)
class PromptEmbeds:
    """The first rows of a prompt, given as vectors instead of tokens: those of an image, for example.

    Attributes:
        vectors: ``[n, hidden]``, what layer 0 reads.
        positions: of the rows, ascending; there may be gaps, where rows were left out.
        end: the position of the first token after them.
    """

    vectors: Tensor
    positions: tuple[int, ...]
    end: int

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def gaps(self) -> int:
        """Positions that no row has."""
        return self.end - len(self)

    def position(self, place: int) -> int:
        """The position of a token that ``place`` others come before."""
        return self.positions[place] if place < len(self) else place + self.gaps


@dataclass
class Segment:
    """Rows of one sequence, and how they are computed.

    Every row sees the ``prefix`` first tokens of the cache, its ancestors among the rows, and itself. Row ``i`` is
    written to slot ``prefix + i`` of the cache. ``outputs`` of the rows, the last ones, are asked for the token that
    follows. ``policy`` (:class:`springtide.attention.policy.Policy`) says what the rows read, and ``drafter``
    (:class:`springtide.drafting.drafter.Drafter`), if any, adds rows in mid-pass; ``state`` and ``draft`` are what they
    remember of the sequence. ``queries`` are those of each layer, with what is known of it, for a drafter that observes
    them. The sequence's first ``prefill_end`` tokens are its prompt, which is one however many segments it is
    cut into. ``bytes_read`` counts what is read of the cache; ``meter``, if any, is called with every sparse read.

    The rows are those of ``tokens`` first, then those that :meth:`grow` added, which stand for no token. ``embeds`` may
    give the first rows of the sequence as vectors; their tokens are ``NO_TOKEN``.
    """

    cache: Cache
    prefix: int
    tokens: list[int]
    parents: list[int]
    kind: Kind
    policy: Any
    state: Any = None
    outputs: int = 0
    drafter: Any = None
    draft: Any = None
    prefill_end: int = 0
    embeds: PromptEmbeds | None = None
    bytes_read: int = 0
    device: torch.device | str = "cpu"
    meter: Callable[..., None] | None = None
    queries: dict[int, tuple[Any, Tensor]] = field(default_factory=dict)
    depths: list[int] = field(init=False)
    _seen: dict[int | None, Visible] = field(init=False, default_factory=dict)
    _reads: dict[int | None, Reads] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.depths = []
        self._descend()

    def _descend(self) -> None:
        """Depths of the rows that have none yet."""
        for parent in self.parents[len(self.depths) :]:
            self.depths.append(0 if parent == PREFIX else self.depths[parent] + 1)

    @classmethod
    def chain(
        cls, cache: Cache, prefix: int, tokens: Sequence[int], kind: Kind, policy: Any, **options: Any
    ) -> Segment:
        """Rows that follow one another."""
        parents = list(range(-1, len(tokens) - 1))
        return cls(cache, prefix, list(tokens), parents, kind, policy, **options)

    def grow(self, parents: Sequence[int]) -> None:
        """Add rows below ``parents``; no row that is there already sees them."""
        self.parents = [*self.parents, *parents]
        self._descend()
        self._seen.clear()

    @property
    def decoding(self) -> bool:
        """Whether a policy that approximates decoding alone may do so here."""
        return self.kind in ("decode", "verify")

    @property
    def rows(self) -> int:
        return len(self.parents)

    @property
    def is_chain(self) -> bool:
        return self.parents == list(range(-1, len(self.parents) - 1))

    @property
    def length(self) -> int:
        """Slots that a row may see at most: the prefix and the segment's own rows."""
        return self.prefix + self.rows

    @property
    def positions(self) -> list[int]:
        """Position of each row in its sequence."""
        return [self._position(place) for place in self._places]

    @property
    def reaches(self) -> list[int]:
        """Length of the sequence at each row, in positions: a row of the prompt knows of all of it, others end it."""
        return [self._position(max(place, self.prefill_end - 1)) + 1 for place in self._places]

    def _position(self, place: int) -> int:
        """The position of a token that ``place`` others come before."""
        return place if self.embeds is None else self.embeds.position(place)

    @property
    def _places(self) -> list[int]:
        """How many tokens each row follows."""
        return [self.prefix + depth for depth in self.depths]

    def seen(self, window: int | None = None) -> Visible:
        """What the rows see of the slots.

        ``window`` hides tokens that are ``window`` or more before the row's own (a sliding-window layer).
        """
        if window not in self._seen:
            self._seen[window] = self._see(window)
        return self._seen[window]

    def _see(self, window: int | None) -> Visible:
        own = torch.tensor(self._places, dtype=torch.int32, device=self.device)
        low, start, tail = None, 0, None
        if window is not None and self.length > window:
            low, start = (own - (window - 1)).clamp(min=0), max(0, self.prefix - window + 1)
        if not self.is_chain:
            tail = self._ancestors
            if window is not None:
                tail = tail & (own[None, :] > own[:, None] - window)
        return Visible(self.prefix, self.length, own, low, tail, start)

    def reads(self, window: int | None = None) -> Reads:
        """What the rows read of the cache's pages, which have room for them already."""
        known, seen = self._reads.get(window), self.seen(window)
        table = self.cache.tables[window]
        if known is None or known.tables[0] is not table or known.seen[0] is not seen:
            known = self._reads[window] = Reads((table,), (seen,))
        return known

    def kv(self, layer: int, window: int | None = None) -> KV:
        """A layer's keys and values, as the rows read them."""
        return KV(self.cache.pages(layer), self.reads(window))

    @property
    def _ancestors(self) -> Tensor:
        """bool ``[n, n]``: the ancestors of each row, and the row itself."""
        seen: list[list[bool]] = []
        for row, parent in enumerate(self.parents):
            own = [False] * self.rows if parent == PREFIX else list(seen[parent])
            own[row] = True
            seen.append(own)
        return torch.tensor(seen, device=self.device)
