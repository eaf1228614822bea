"""Draft trees: tokens to try in one pass."""

from __future__ import annotations

from dataclasses import dataclass

from springtide.rows.segment import PREFIX


@dataclass(frozen=True)
class TokenTree:
    """``tokens[i]`` follows ``tokens[parents[i]]``. Node 0 is the last committed token; parents come first."""

    tokens: list[int]
    parents: list[int]

    @classmethod
    def single(cls, token: int) -> TokenTree:
        """Only the committed token: plain decoding."""
        return cls([token], [PREFIX])

    def child(self, node: int, token: int) -> int | None:
        """The child of ``node`` that holds ``token``, if there is one."""
        for other in range(node + 1, len(self.tokens)):
            if self.parents[other] == node and self.tokens[other] == token:
                return other
        return None

    def limited(self, depth: int) -> TokenTree:
        """The tree without nodes that are deeper than ``depth`` below node 0."""
        depths: list[int] = []
        kept: dict[int, int] = {PREFIX: PREFIX}
        for node, parent in enumerate(self.parents):
            depths.append(0 if parent == PREFIX else depths[parent] + 1)
            if depths[node] <= depth:
                kept[node] = len(kept) - 1
        nodes = [node for node in kept if node != PREFIX]
        return TokenTree([self.tokens[n] for n in nodes], [kept[self.parents[n]] for n in nodes])
