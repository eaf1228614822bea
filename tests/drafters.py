"""Tiny drafters of every kind, for tiny models of few tokens: even guesses at random are often right, and often not."""

from __future__ import annotations

from typing import Any

import torch

from springtide.attention import parse_policy
from springtide.drafting.drafter import Drafter
from springtide.drafting.hidden_transfer import HiddenTransfer
from springtide.drafting.longspec import Block, LongSpec, Sizes
from springtide.drafting.lookup import Lookup
from springtide.drafting.medusa import Heads, Medusa
from springtide.drafting.several import Several
from springtide.drafting.shape import grow
from springtide.engine.governor import Governor
from springtide.engine.self_draft import SelfDraft
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


def self_draft(
    policy: str = "tidal:budget=7,full=0,select=1", draft: Drafter | None = None, **options: Any
) -> SelfDraft:
    """The model under a sparse policy that leaves much out."""
    return SelfDraft(parse_policy(policy), draft=draft, **{"tokens": 4, "select": "verified", **options})


def longspec(**options: Any) -> LongSpec:
    """A block with a window of 12 tokens, for three tokens ahead."""
    sizes = Sizes(HIDDEN, BASE["num_attention_heads"], BASE["num_key_value_heads"], BASE["head_dim"], 48)
    block = Block(sizes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in block.parameters():
            weight.copy_(0.3 * torch.randn(weight.shape, generator=generator) + (weight.ndim == 1))
    return LongSpec(block, **{"vocab_size": VOCAB, "window": 12, "trained": 4096, "temperatures": (1.0,) * 3} | options)


def several(*layers: int, depth: int = 4) -> Several:
    """Of every kind: one adds rows in mid-pass, after these layers, others read hidden states, tokens, or queries."""
    return Several(
        (hidden_transfer(*layers, depth=depth), medusa(), Lookup(), self_draft("streaming:budget=7,sinks=2"))
    )


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
