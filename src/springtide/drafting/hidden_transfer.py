"""Hidden Transfer: drafts that the target computes itself, in the pass that verifies (Wu et al., arXiv 2404.12022).

At layer ``t_k`` a linear map turns a row's hidden state into the pseudo hidden state of the token ``k`` places ahead.
Pseudo rows run through the target's remaining layers, see the whole context and each other, and are decoded by the
target's own head. Real rows never see them, so that the target's answers are as without them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from springtide.drafting.drafter import Growth, Target, View
from springtide.drafting.folder import check_base, read_folder, write_folder
from springtide.drafting.guesser import Shaped
from springtide.drafting.tree import TokenTree
from springtide.errors import SpringtideError
from springtide.rows.segment import Segment


@dataclass
class Pseudo:
    """``last [K, hidden]``: final hidden states of the pseudo rows of the last row kept; None if it had none."""

    last: Tensor | None = None


@dataclass(frozen=True, eq=False)
class HiddenTransfer(Shaped):
    """Hidden Transfer: the ``k``-th map guesses the token ``k + 1`` places ahead of a row, in the target's own pass.

    Attributes:
        weight, bias: ``[K, hidden, hidden]`` and ``[K, hidden]`` of the K linear maps, of any floating dtype.
        layers: for each map the layer whose input it reads and adds to, ascending.
        num_layers, vocab_size, base: the target's number of layers, vocabulary and fingerprint (None: not known).

    For the others see :class:`springtide.drafting.guesser.Shaped`.
    """

    name: ClassVar[str] = "hidden-transfer"

    weight: Tensor
    bias: Tensor
    layers: tuple[int, ...]
    num_layers: int
    vocab_size: int
    base: str | None = None

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The drafter in ``folder``; raises SpringtideError for files that are missing, broken or contradictory."""
        config, tensors = read_folder(folder)
        try:
            drafter = cls(
                tensors["weight"],
                tensors["bias"],
                tuple(config["layers"]),
                config["num_layers"],
                config["vocab_size"],
                config["base"],
                accuracy=config["accuracy"],
            )
            whole = drafter._config == config and drafter._fits
        except (KeyError, TypeError, ValueError):
            whole = False
        if not whole:
            raise SpringtideError(f"'{folder}' holds no {cls.name} drafter whose parts fit together; train it again.")
        return drafter

    def save(self, folder: Path) -> None:
        """Write the drafter to ``folder``, in bf16; raises SpringtideError when it cannot be written."""
        write_folder(folder, self._config, {"weight": self.weight, "bias": self.bias})

    @property
    def _config(self) -> dict[str, Any]:
        return {
            "drafter": self.name,
            "hidden_size": self.weight.shape[-1],
            "vocab_size": self.vocab_size,
            "num_layers": self.num_layers,
            "layers": list(self.layers),
            "base": self.base,
            "accuracy": self.accuracy,
        }

    @property
    def _fits(self) -> bool:
        """Whether sizes agree and layers ascend."""
        count, hidden = len(self.layers), self.weight.shape[-1]
        return (
            self.weight.shape == (count, hidden, hidden)
            and self.bias.shape == (count, hidden)
            and all(before <= after for before, after in pairwise((0, *self.layers, self.num_layers - 1)))
            and (self.accuracy is None or len(self.accuracy) == count)
        )

    def resolve(self, target: Target) -> Self:
        check_base(self._config, target)
        if target.spec.num_layers != self.num_layers:
            raise SpringtideError(
                f"The {self.name} drafter is for a model of {self.num_layers} layers, but this one has "
                f"{target.spec.num_layers}; use a drafter that was trained for this model."
            )
        return replace(
            self,
            weight=self.weight.to(target.model.device, target.model.dtype),
            bias=self.bias.to(target.model.device, target.model.dtype),
            base=target.fingerprint,
            shape=self.favoured,
            target=target,
        )

    @property
    def steps(self) -> int:
        return len(self.layers)

    @property
    def most_rows(self) -> int:
        return len(self.favoured.parents) * (1 + self.favoured.depth)

    def rows(self, nodes: int) -> int:
        """A pseudo row counts as much as the share of the layers that it runs through."""
        return math.ceil(nodes * (1 + sum(1 - layer / self.num_layers for layer in self.layers)))

    def new_state(self) -> Pseudo:
        return Pseudo()

    @property
    def grows(self) -> Sequence[int]:
        """Maps that the shape has no nodes for add no rows."""
        assert self.shape is not None
        return self.layers[: self.shape.depth]

    def grow(self, number: int, segments: Sequence[Segment], hidden: Sequence[Tensor]) -> list[Growth]:
        """Every row that is asked for a token gets a chain of pseudo rows: map by map, each below the one before."""
        asked = [range(len(s.tokens) - s.outputs, len(s.tokens)) for s in segments]
        states = torch.cat([own[rows.start : rows.stop] for own, rows in zip(hidden, asked, strict=True)])
        made = torch.split(F.linear(states, self.weight[number], self.bias[number]), [len(rows) for rows in asked])
        return [
            Growth(range(segment.rows - segment.outputs, segment.rows), rows, new)
            for segment, rows, new in zip(segments, asked, made, strict=True)
        ]

    def commit(self, segment: Segment, hidden: Tensor, kept: Sequence[int]) -> None:
        planned = len(segment.tokens)
        place = kept[-1] - (planned - segment.outputs)
        own = segment.drafter is self and len(hidden) > planned
        segment.draft.last = hidden[planned:][place :: segment.outputs] if own else None

    @torch.inference_mode()
    def propose(self, views: Sequence[View]) -> list[TokenTree]:
        assert self.target is not None and self.shape is not None
        trees = [TokenTree.single(view.tokens[-1]) for view in views]
        known = [place for place, view in enumerate(views) if view.draft.last is not None]
        if known and self.shape.depth:
            last = torch.stack([views[place].draft.last for place in known])
            logits = self.target.head(self.target.norm(last.flatten(0, 1)))
            guesses = logits.topk(self.shape.width).indices.view(len(known), self.shape.depth, -1).tolist()
            for place, own in zip(known, guesses, strict=True):
                trees[place] = self.shape.fill(views[place].tokens[-1], own)
        return trees
