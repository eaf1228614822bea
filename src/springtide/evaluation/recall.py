"""How much of the dense attention each sparse layer still reads.

While a passage is decoded under a policy, each layer that reads a selection is compared with dense attention on the
very same queries and keys: the share of attention mass that the selection holds, and how many of the true top tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from springtide import kernels
from springtide.attention.policy import Layer, Policy
from springtide.engine.engine import Engine
from springtide.errors import SpringtideError
from springtide.evaluation.needle import Haystack, check_fit
from springtide.evaluation.report import labels
from springtide.rows.segment import Segment


@dataclass(frozen=True)
class LayerRecall:
    """``mass``: attention mass held, mean over rows and heads. ``top_k``: share of the true top-budget tokens read.

    ``mass_by_head``: the mass of each KV head, ``worst_head_mass`` the least of them.
    """

    policy: str
    budget: int | None
    layer: int
    mass: float
    top_k: float
    worst_head_mass: float
    mass_by_head: list[float]


@dataclass
class Meter:
    """Sums over rows for each layer; ``mass`` is fp64 ``[H_kv]``."""

    rows: dict[int, int] = field(default_factory=dict)
    mass: dict[int, Tensor] = field(default_factory=dict)
    top_k: dict[int, float] = field(default_factory=dict)

    def __call__(
        self, layer: Layer, q: Tensor, segment: Segment, index: Tensor, valid: Tensor, full_heads: Sequence[int]
    ) -> None:
        """Compare ``index [R, H_kv, B]``, what the rows are about to read, with dense attention.

        ``full_heads`` read everything.
        """
        logits = kernels.scores(q, segment.kv(layer.index), layer.scale, layer.softcap)
        seen = segment.seen().mask
        if seen is not None:
            logits = logits.masked_fill(~seen[:, None, None, :], -torch.inf)
        probs = logits.softmax(-1).mean(2)
        read = torch.zeros_like(probs).scatter_reduce_(2, index, valid.to(probs.dtype), "amax")
        read[:, list(full_heads)] = 1
        best = probs.topk(index.shape[2], dim=-1).indices
        at = layer.index
        self.rows[at] = self.rows.get(at, 0) + len(q)
        self.mass[at] = self.mass.get(at, 0) + (probs * read).sum(-1).double().sum(0)
        self.top_k[at] = self.top_k.get(at, 0.0) + read.gather(2, best).mean((1, 2)).sum().item()


def recall(
    engine: Engine, haystack: Haystack, policies: Sequence[Policy], length: int, trials: int
) -> Iterator[Callable[[], list[LayerRecall]]]:
    """Recall of every sparse layer while questions and their answers are decoded.

    Yields after every trial what gives the rows of those done so far. A policy whose budget covers the context reads no
    selection and has no rows. Raises SpringtideError if no policy would have any, or for a length that the text or the
    model does not have.
    """
    if all((policy.budget_at(length) or length) >= length for policy in policies):
        raise SpringtideError(
            f"Every policy reads the whole context of {length} tokens; measure one with a budget below that."
        )
    for number in range(trials):
        trial = haystack.trial(length, number)
        check_fit(engine, length, len(trial.context) + len(haystack.asked(trial)[0]) + 1)
    done: list[list[Meter]] = []  # of each trial, for each policy

    def rows() -> list[LayerRecall]:
        return [
            _layer(name, policy.budget_at(length), layer, meters)
            for name, policy, meters in zip(labels(policies), policies, zip(*done, strict=True), strict=True)
            for layer in sorted({layer for meter in meters for layer in meter.rows})
        ]

    for number in range(trials):
        trial, meters = haystack.trial(length, number), [Meter() for _ in policies]
        reader = engine.read(trial.context)
        asked = haystack.asked(trial)[0]
        for policy, meter in zip(policies, meters, strict=True):
            under = engine.using(policy)
            list(under.predictions(trial.context + asked, len(trial.context), reader, meter=meter))
        done.append(meters)
        yield rows


def _layer(policy: str, budget: int | None, layer: int, meters: Sequence[Meter]) -> LayerRecall:
    meters = [meter for meter in meters if layer in meter.rows]
    rows = sum(meter.rows[layer] for meter in meters)
    heads = torch.stack([meter.mass[layer] for meter in meters]).sum(0) / rows
    return LayerRecall(
        policy,
        budget,
        layer,
        mass=heads.mean().item(),
        top_k=sum(meter.top_k[layer] for meter in meters) / rows,
        worst_head_mass=heads.min().item(),
        mass_by_head=heads.tolist(),
    )
