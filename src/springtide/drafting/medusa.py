"""Medusa heads: each guesses the token some places ahead from one hidden state (Cai et al., arXiv 2401.10774)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from springtide.drafting import formats
from springtide.drafting.drafter import Target, View
from springtide.drafting.folder import check_base
from springtide.drafting.guesser import Shaped
from springtide.drafting.tree import TokenTree
from springtide.errors import SpringtideError
from springtide.kernels import native
from springtide.rows.segment import Segment


class Heads(nn.Module):
    """K heads side by side (section 2.1.1): residual blocks ``SiLU(W h + b) + h``, then an LM head.

    Attributes:
        weight, bias: ``[layers, K, hidden, hidden]`` and ``[layers, K, hidden]``, of the residual blocks.
        lm_heads: ``[K, V, hidden]``; None for heads that share the target's.
    """

    def __init__(self, weight: Tensor, bias: Tensor, lm_heads: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias)
        self.lm_heads = None if lm_heads is None else nn.Parameter(lm_heads)

    @classmethod
    def fresh(cls, heads: int, layers: int, hidden_size: int, lm_head: Tensor | None = None) -> Self:
        """Heads that all guess what ``lm_head [V, hidden]`` does: copies of it, the blocks being zero, in fp32.

        Without ``lm_head`` they share the target's.
        """
        lm_heads = None if lm_head is None else lm_head.detach().float().repeat(heads, 1, 1)
        weight = torch.zeros(layers, heads, hidden_size, hidden_size)
        return cls(weight, torch.zeros(layers, heads, hidden_size), lm_heads)

    @property
    def count(self) -> int:
        return self.weight.shape[1]

    def forward(self, hidden: Tensor, head: Callable[[Tensor], Tensor], steps: int | None = None) -> Tensor:
        """Logits ``[K, N, V]`` of the first ``steps`` heads (default: all) for what the LM head reads, ``[N, hidden]``.

        ``head`` is the target's, from ``[R, hidden]`` to ``[R, V]``, for heads that share it.
        """
        x = hidden.expand(steps or self.count, -1, -1)
        for weight, bias in zip(self.weight[:, :steps], self.bias[:, :steps], strict=True):
            x = x + nn.functional.silu(_linear(x, weight, bias))
        if self.lm_heads is None:
            return head(x.flatten(0, 1)).view(*x.shape[:2], -1)
        return _linear(x, self.lm_heads[:steps])


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer for each head: ``[K, N, outputs]`` of ``x [K, N, inputs]`` and ``weight [K, outputs, inputs]``."""
    level = None if torch.is_grad_enabled() else native.of(x, weight)
    if level is None or x.shape[1] > native.most_rows(level, x.dtype):
        return torch.bmm(x, weight.mT) if bias is None else torch.baddbmm(bias[:, None], x, weight.mT)
    biases = [None] * len(x) if bias is None else bias
    return torch.stack([native.linear(level, *own) for own in zip(x, weight, biases, strict=True)])


@dataclass
class Last:
    """``hidden [1, hidden]``: what the LM head read at the last row that was kept; None before there is one."""

    hidden: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Medusa(Shaped):
    """Medusa heads: the ``k``-th guesses the token ``k + 1`` places ahead of a row; the target knows the next one.

    Attributes:
        heads: the heads, of any floating dtype.
        vocab_size, base: the target's vocabulary and fingerprint (None: not known).
        base_model: the target's name, which the original layout wants.

    For the others see :class:`springtide.drafting.guesser.Shaped`.
    """

    name: ClassVar[str] = "medusa"

    heads: Heads
    vocab_size: int
    base: str | None = None
    base_model: str | None = None

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The drafter in ``folder``, whichever layout of :mod:`springtide.drafting.formats` it has.

        Raises SpringtideError for files that are missing, broken or contradictory.
        """
        config, tensors = formats.read(folder)
        try:
            heads = Heads(tensors["weight"], tensors["bias"], tensors.get("lm_heads"))
            own = (config["vocab_size"], config["base"], config.get("base_model"))
            drafter = cls(heads, *own, accuracy=config["accuracy"])
            sizes = (config["drafter"], config["hidden_size"])
            whole = drafter._fits and sizes == (cls.name, heads.weight.shape[-1])
        except (KeyError, TypeError, ValueError):
            whole = False
        if not whole:
            raise SpringtideError(f"'{folder}' holds no {cls.name} drafter whose parts fit together; train it again.")
        return drafter

    def save(self, folder: Path, layout: str = "springtide") -> None:
        """Write the drafter to ``folder``, in bf16, in a layout of :mod:`springtide.drafting.formats`.

        Raises SpringtideError when it cannot be written, and for heads that share the target's LM head in a layout
        that stores it, unless the drafter was resolved for its target.
        """
        lm_head = None if self.target is None else self.target.model.lm_head.weight
        formats.write(folder, layout, self._config, self.heads.state_dict(), lm_head)

    @property
    def _config(self) -> dict[str, Any]:
        return {
            "drafter": self.name,
            "hidden_size": self.heads.weight.shape[-1],
            "vocab_size": self.vocab_size,
            "base": self.base,
            "base_model": self.base_model,
            "accuracy": self.accuracy,
        }

    @property
    def _fits(self) -> bool:
        """Whether sizes agree among tensors, and accuracies with them."""
        heads, accuracy = self.heads, self.accuracy
        layers, count, hidden, _ = heads.weight.shape
        return (
            heads.weight.shape == (layers, count, hidden, hidden)
            and heads.bias.shape == (layers, count, hidden)
            and (heads.lm_heads is None or heads.lm_heads.shape == (count, self.vocab_size, hidden))
            and (accuracy is None or (len(accuracy) == count and all(0 <= x <= 1 for row in accuracy for x in row)))
        )

    def resolve(self, target: Target) -> Self:
        check_base(self._config, target)
        heads = deepcopy(self.heads).requires_grad_(False).to(target.model.device, target.model.dtype)
        return replace(self, heads=heads, base=target.fingerprint, shape=self.favoured, target=target)

    @property
    def steps(self) -> int:
        return self.heads.count

    def new_state(self) -> Last:
        return Last()

    @torch.inference_mode()
    def commit(self, segment: Segment, hidden: Tensor, kept: Sequence[int]) -> None:
        assert self.target is not None
        segment.draft.hidden = self.target.norm(hidden[kept[-1]][None])

    @torch.inference_mode()
    def propose(self, views: Sequence[View]) -> list[TokenTree]:
        assert self.target is not None and self.shape is not None
        trees = [TokenTree.single(view.tokens[-1]) for view in views]
        known = [place for place, view in enumerate(views) if view.draft.hidden is not None]
        if known and self.shape.depth:
            hidden = torch.cat([views[place].draft.hidden for place in known])
            logits = self.heads(hidden, self.target.head, self.shape.depth)
            guesses = logits.topk(self.shape.width).indices.transpose(0, 1).tolist()
            for place, own in zip(known, guesses, strict=True):
                trees[place] = self.shape.fill(views[place].tokens[-1], own)
        return trees
