"""Tiny drafters of every kind, for tiny models of few tokens: even guesses at random are often right, and often not."""

from __future__ import annotations

import torch

from springtide.drafting.hidden_transfer import HiddenTransfer
from springtide.drafting.lookup import Lookup
from springtide.drafting.medusa import Heads, Medusa
from springtide.drafting.several import Several
from springtide.drafting.shape import grow
from springtide.engine.governor import Governor
from tiny import BASE

VOCAB, HIDDEN = 7, BASE["hidden_size"]
SHAPE = grow([[0.3] * 3] * 3, 17)  # 3 of 7 tokens


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def medusa(shared: bool = False) -> Medusa:
    """Heads with LM heads of their own, or that share the target's."""
    heads = Heads(0.3 * noise(1, 3, HIDDEN, HIDDEN), 0.3 * noise(1, 3, HIDDEN), None if shared else noise(3, VOCAB, 32))
    return Medusa(heads, VOCAB, shape=SHAPE)


def hidden_transfer(*layers: int, depth: int = 4) -> HiddenTransfer:
    """Maps at these three layers of a model of ``depth``."""
    weight = torch.eye(HIDDEN) + 0.1 * noise(3, HIDDEN, HIDDEN)
    return HiddenTransfer(weight, 0.1 * noise(3, HIDDEN), layers, num_layers=depth, vocab_size=VOCAB, shape=SHAPE)


def several(*layers: int, depth: int = 4) -> Several:
    """One that adds rows in mid-pass, after these layers, one that reads hidden states, and one that reads tokens."""
    return Several((hidden_transfer(*layers, depth=depth), medusa(), Lookup()))


class Turns(Governor):
    """Takes another arm at every pass: the first way first, plain decoding last."""

    asked = 0

    def choose(self, sequences: int, context: int) -> int:
        self.asked += 1
        return self.asked % self._arms

    def record(self, tokens: int, seconds: float) -> None:
        """Time decides nothing."""


class Letters:
    """A tokenizer with a letter for each token."""

    def decode(self, tokens: list[int], **options: object) -> str:
        return "".join(chr(ord("a") + token) for token in tokens)
