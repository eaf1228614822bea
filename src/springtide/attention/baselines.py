"""What TidalDecode is compared with: Quest, sinks with a window, and the best selection there could be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from springtide import kernels
from springtide.attention.policy import Layer, Slots, Sparse
from springtide.kernels.reference import keep_first
from springtide.options import Share, at_least, option
from springtide.rows.segment import Segment
from springtide.rows.spec import ModelSpec


@dataclass(frozen=True)
class _Baseline(Sparse):
    """Dense for prompts, in the first ``skip`` layers and where the budget covers the context; else ``choose``."""

    def resolve(self, spec: ModelSpec) -> Self:
        for name in ("skip", "sinks"):
            at_least(getattr(self, name, 0), 0, f"{self.name}: {name}")
        return super().resolve(spec)

    def reads(self, layer: Layer, q: Tensor, segment: Segment) -> Slots | None:
        skip: int = getattr(self, "skip", 0)
        if layer.window is not None or layer.index < skip or self.exact(segment):
            return None
        index = self.choose(layer, q, segment)
        return Slots(index.clamp(max=segment.length - 1), index < segment.length)

    def choose(self, layer: Layer, q: Tensor, segment: Segment) -> Tensor:
        """The slots that each row reads at this layer: ``[R, H_kv, B]``; those beyond the last one are void."""
        raise NotImplementedError


@dataclass(frozen=True)
class Oracle(_Baseline):
    """Every layer reads the ``budget`` tokens that its own queries want most: it saves nothing and bounds the rest."""

    name: ClassVar[str] = "oracle"

    skip: int = option(2, "first layers that stay dense")

    def choose(self, layer: Layer, q: Tensor, segment: Segment) -> Tensor:
        kv = segment.kv(layer.index)
        segment.bytes_read += segment.length * kv.pages.slot_bytes
        return kernels.choose(q, kv, layer.scale, self.tokens(segment), softcap=layer.softcap)


@dataclass(frozen=True)
class Streaming(_Baseline):
    """The first tokens and the newest ones (Xiao et al., arXiv 2309.17453), with their original positions."""

    name: ClassVar[str] = "streaming"

    sinks: int = option(4, "oldest tokens that are always kept, inside the budget")

    def choose(self, layer: Layer, q: Tensor, segment: Segment) -> Tensor:
        kv_heads = segment.kv(layer.index).pages.kv_heads
        blank = torch.full((q.shape[0], kv_heads, segment.length), -torch.inf, device=q.device)
        budget = self.tokens(segment)
        recent = max(1, budget - self.sinks)
        return kernels.select(keep_first(blank, segment.seen(), self.sinks, recent), budget)


@dataclass(frozen=True)
class Quest(_Baseline):
    """Query-aware pages (Tang et al., arXiv 2406.10774): the pages whose bounds allow the largest logits.

    A page's bound is ``sum_d max(q_d min_d, q_d max_d)`` over the minimum and maximum of its keys. The bounds are
    computed anew in every pass, so this measures quality, not speed; ``bytes_read`` counts what a kernel would read.
    Query heads that share a KV head share its pages. The page that holds the row itself, in plain decoding the newest
    one, is always read.
    """

    name: ClassVar[str] = "quest"
    rows_independent: ClassVar[bool] = False

    skip: int = option(2, "first layers that stay dense")
    page: int = option(16, "tokens in a page")
    pool: Literal["mean", "max"] = option("max", "how the query heads of a KV head are joined in ranking pages")

    def resolve(self, spec: ModelSpec) -> Self:
        at_least(self.page, 1, f"{self.name}: page")
        if not isinstance(self.budget, Share):
            at_least(self.budget, self.page, f"{self.name}: budget")
        return super().resolve(spec)

    def choose(self, layer: Layer, q: Tensor, segment: Segment) -> Tensor:
        keys, _ = segment.cache.read(layer.index, 0, segment.length)
        low, high = page_bounds(keys, self.page)
        segment.bytes_read += low.nbytes + high.nbytes
        grouped = q.view(q.shape[0], keys.shape[0], -1, q.shape[2])
        bound = torch.einsum("rkgd,kpd->rkgp", grouped.clamp(min=0), high)
        bound += torch.einsum("rkgd,kpd->rkgp", grouped.clamp(max=0), low)
        ranking = bound.amax(2) if self.pool == "max" else bound.float().softmax(-1).mean(2)
        own = (segment.prefix + torch.arange(q.shape[0], device=q.device)) // self.page
        ranking.scatter_(2, own[:, None, None].expand(-1, keys.shape[0], 1), torch.finfo(ranking.dtype).max)
        chosen = kernels.select(ranking, max(1, self.tokens(segment) // self.page))
        slots = chosen[..., None] * self.page + torch.arange(self.page, device=q.device)
        return slots.flatten(2)


def page_bounds(keys: Tensor, page: int) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of each page of ``keys [H_kv, L, D]``: two ``[H_kv, ceil(L / page), D]``."""
    kv_heads, length, head_dim = keys.shape
    padding = -length % page
    padded = torch.cat([keys, keys[:, -1:].expand(-1, padding, -1)], dim=1)
    paged = padded.view(kv_heads, -1, page, head_dim)
    return paged.amin(2), paged.amax(2)
