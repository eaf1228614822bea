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

from springtide.drafting.drafter import Pass, Target
from springtide.drafting.folder import check_base, read_folder, write_folder
from springtide.drafting.guesser import Guesser
from springtide.drafting.tree import TokenTree
from springtide.errors import SpringtideError
from springtide.rows.segment import Segment


@dataclass
class Pseudo:
    """Final hidden states of a sequence's pseudo rows.

    ``nodes [K, N, hidden]``: those of the N rows of the present pass that are asked for a token; ``last [K, hidden]``:
    those of the last row that was kept; None where a pass had none.
    """

    nodes: Tensor | None = None
    last: Tensor | None = None


@dataclass(frozen=True, eq=False)
class HiddenTransfer(Guesser):
    """Map ``k``, from 1, guesses the token ``k + 1`` places ahead of a row; the target itself knows the next one.

    Attributes:
        weight, bias: ``[K, hidden, hidden]`` and ``[K, hidden]`` of the K linear maps, of any floating dtype.
        layers: for each map the layer whose input it reads and adds to, ascending.
        num_layers, vocab_size, base: the target's number of layers, vocabulary and fingerprint (None: not known).

    For the others see :class:`springtide.drafting.guesser.Guesser`.
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

    def rows(self, nodes: int) -> int:
        """A pseudo row counts as much as the share of the layers that it runs through."""
        return math.ceil(nodes * (1 + sum(1 - layer / self.num_layers for layer in self.layers)))

    def new_state(self) -> Pseudo:
        return Pseudo()

    def forward(self, step: Pass, layers: int) -> Tensor:
        """Run a pass in which every row that is asked for a token gets a chain of pseudo rows.

        Maps that the shape has no nodes for get none.
        """
        assert self.shape is not None
        hidden, start = step.embed(), 0
        for k, layer in enumerate(self.layers[: self.shape.depth]):
            hidden = self._transfer(k, step, step.run(hidden, start, layer))
            start = layer
        planned = []
        for segment, own in zip(step.segments, step.split(step.run(hidden, start, layers)), strict=True):
            real, pseudo = own.tensor_split([len(segment.tokens)])
            if segment.outputs:
                segment.draft.nodes = pseudo.view(self.shape.depth, segment.outputs, own.shape[-1])
            planned.append(real)
        return torch.cat(planned)

    def _transfer(self, k: int, step: Pass, hidden: Tensor) -> Tensor:
        """``hidden`` with the rows that map ``k``, from 0, makes: each below the one that map ``k - 1`` made."""
        parents, origins, states = [], [], []
        for segment, own in zip(step.segments, step.split(hidden), strict=True):
            planned = len(segment.tokens)
            asked = range(planned - segment.outputs, planned)
            parents.append(range(segment.rows - segment.outputs, segment.rows))
            origins.append(asked)
            states.append(own[asked.start : asked.stop])
        return step.grow(hidden, parents, origins, F.linear(torch.cat(states), self.weight[k], self.bias[k]))

    def commit(self, segment: Segment, hidden: Tensor, kept: Sequence[int]) -> None:
        state: Pseudo = segment.draft
        last = kept[-1] - (len(segment.tokens) - segment.outputs)
        state.last = None if state.nodes is None else state.nodes[:, last]
        state.nodes = None

    @torch.inference_mode()
    def propose(self, state: Pseudo, tokens: Sequence[int]) -> TokenTree:
        assert self.target is not None and self.shape is not None
        if state.last is None or self.shape.depth == 0:
            return TokenTree.single(tokens[-1])
        logits = self.target.head(self.target.norm(state.last))
        return self.shape.fill(tokens[-1], logits.topk(self.shape.width).indices.tolist())
