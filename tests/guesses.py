"""Drafters that know, or do not know, how their sequences go on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from springtide.drafting.drafter import Drafter, View
from springtide.drafting.tree import TokenTree

KINDS = ("oracle", "wrong", "zero", "random", "mixed")


@dataclass
class Guesses(Drafter):
    """Proposes for sequences that begin as one of ``truths`` (prompt and output).

    ``oracle``: the next tokens, as a chain. ``wrong``: a chain and siblings that are never right. ``zero``: a chain of
    token 0. ``random``: a tree of any shape with any tokens. ``mixed``: the same, with some of the right tokens.
    ``calls`` counts the proposals, which are the passes after the prompt.
    """

    truths: Sequence[Sequence[int]]
    kind: str
    seed: int = 0
    size: int = 8
    vocab: int = 97
    calls: int = 0

    def propose(self, views: Sequence[View]) -> list[TokenTree]:
        return [self._propose(view.tokens) for view in views]

    def _propose(self, tokens: Sequence[int]) -> TokenTree:
        self.calls += 1
        known = list(tokens)
        ahead = next((list(truth[len(known) :]) for truth in self.truths if truth[: len(known)] == known), [])
        random = Random(1000 * self.seed + len(known))
        tree = TokenTree([known[-1]], [-1])
        depth, right = [0], {0}
        for _ in range(self.size):
            chain = self.kind in ("oracle", "zero") or (self.kind == "wrong" and random.random() < 0.7)
            parent = len(tree.tokens) - 1 if chain else random.randrange(len(tree.tokens))
            level = depth[parent]
            truth = ahead[level] if parent in right and level < len(ahead) else None
            token = self._token(random, truth)
            if token == truth:
                right.add(len(tree.tokens))
            depth.append(level + 1)
            tree.tokens.append(token)
            tree.parents.append(parent)
        return tree

    def _token(self, random: Random, truth: int | None) -> int:
        if self.kind == "zero":
            return 0
        if truth is not None and (self.kind == "oracle" or (self.kind == "mixed" and random.random() < 0.6)):
            return truth
        token = random.randrange(self.vocab)
        return (token + 1) % self.vocab if self.kind == "wrong" and token == truth else token
