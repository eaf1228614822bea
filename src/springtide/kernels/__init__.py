"""Attention kernels: the fastest form of :mod:`springtide.kernels.reference` that the inputs allow.

They read keys and values through page tables (:class:`KV`), of one request or of several side by side, whose rows are
side by side in ``q [R, H, D]``. A row's result depends on nothing beside it.

On the CPU, for fp32 and bf16, these are the C++ kernels (:mod:`springtide.kernels.native`). Elsewhere it is torch's
fused attention, which computes in the inputs' dtype and has no soft cap; with a soft cap the reference runs. The query
heads of a group are folded into rows, so that a KV head is read once for all of them.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from springtide.kernels import native, reference
from springtide.kernels.kv import KV, PAGE, Pages, Reads
from springtide.kernels.means import Means
from springtide.kernels.reference import merge, select
from springtide.kernels.visible import Visible

__all__ = [
    "KV",
    "PAGE",
    "Means",
    "Pages",
    "Reads",
    "Visible",
    "attend",
    "attend_gathered",
    "bytes_read",
    "choose",
    "merge",
    "scores",
    "select",
    "write",
]


def write(kv: KV, keys: Tensor, values: Tensor) -> None:
    """Store the rows' keys and values ``[H_kv, R, D]`` at the slots behind the prefix of each one's request."""
    if native.of(keys, values, *kv.pages.slabs) is not None:
        native.write(kv, keys, values)
        return
    own_keys, own_values = (torch.split(x, kv.reads.rows, 1) for x in (keys, values))
    for table, seen, *rows in zip(kv.reads.tables, kv.reads.seen, own_keys, own_values, strict=True):
        kv.pages.write(table, seen.prefix, *rows)


def attend(q: Tensor, kv: KV, scale: float, softcap: float | None = None, *, lse: bool = True) -> tuple[Tensor, Tensor]:
    """Attention ``[R, H, D]`` over what the rows see, and ``lse [R, H]``: see the reference.

    Without ``lse`` it need not be right: torch's fused attention does not give it, so that it costs as much again.
    """
    level = native.of(q, *kv.pages.slabs)
    if level is not None:
        return native.attend(level, q, kv, scale, softcap)
    parts = [
        _attend(own, keys, values, scale, seen.needed, softcap, lse)
        for own, (keys, values, seen) in zip(torch.split(q, kv.reads.rows), kv.dense(), strict=True)
    ]
    return _side_by_side(parts)


def bytes_read(q: Tensor, kv: KV) -> list[int]:
    """Bytes that :func:`attend` reads for each request; what it reads once for several is divided among them."""
    joined = native.of(q, *kv.pages.slabs) is not None
    slots = kv.reads.divided if joined else [seen.length - seen.start for seen in kv.reads.seen]
    return [round(2 * kv.pages.slot_bytes * count) for count in slots]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, softcap: float | None, lse: bool
) -> tuple[Tensor, Tensor]:
    if softcap is not None:
        return reference.attend(q, k, v, scale, mask, softcap)
    rows, heads, head_dim = q.shape
    group = heads // k.shape[0]
    folded = q.view(rows, k.shape[0], group, head_dim).transpose(0, 1).reshape(1, k.shape[0], rows * group, head_dim)
    of_each = None if mask is None else mask.repeat_interleave(group, dim=0)
    out = scaled_dot_product_attention(folded, k[None], v[None], attn_mask=of_each, scale=scale)
    out = out.view(k.shape[0], rows, group, head_dim).transpose(0, 1).reshape(rows, heads, head_dim)
    return out, _mass(_scores(q, k, scale), None if mask is None else mask[:, None, None]) if lse else q.new_empty(0)


def _mass(logits: Tensor, mask: Tensor | None) -> Tensor:
    """``lse [R, H]`` of logits ``[R, H_kv, G, n]``."""
    return (logits if mask is None else logits.masked_fill(~mask, -torch.inf)).logsumexp(-1).flatten(1)


def attend_gathered(
    q: Tensor,
    kv: KV,
    index: Tensor,
    scale: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
    means: Means | None = None,
    *,
    lse: bool = True,
) -> tuple[Tensor, Tensor]:
    """See :func:`springtide.kernels.reference.attend_gathered`; each row's slots are of its own request.

    ``lse`` as for :func:`attend`.
    """
    level = native.of(q, *kv.pages.slabs)
    if level is not None:
        return native.attend_gathered(level, q, kv, index, scale, mask, softcap, means)
    parts, start = [], 0
    for table, seen, rows in zip(kv.reads.tables, kv.reads.seen, kv.reads.rows, strict=True):
        own = slice(start, start + rows)
        k, v = kv.pages.read(table, 0, seen.length)
        shown = None if mask is None else mask[own]
        parts.append(_attend_gathered(q[own], k, v, index[own], shown, scale, softcap, means, lse))
        start = own.stop
    return _side_by_side(parts)


def _side_by_side(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """What each request's rows gave, as one."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])


def _attend_gathered(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    means: Means | None,
    lse: bool,
) -> tuple[Tensor, Tensor]:
    if softcap is not None or lse:
        return reference.attend_gathered(q, k, v, index, scale, mask, softcap, means)
    rows, heads, head_dim = q.shape
    grouped = q.view(rows, k.shape[0], heads // k.shape[0], head_dim)
    keys, values = reference.read(k, v, index, means)
    added = None if mask is None and means is None else reference.weights(index, mask, means, q.dtype)
    out = scaled_dot_product_attention(grouped, keys, values, attn_mask=added, scale=scale)
    return out.reshape(rows, heads, head_dim), q.new_empty(0)


def choose(
    q: Tensor,
    kv: KV,
    scale: float,
    budget: int,
    *,
    sinks: int = 0,
    recent: int = 1,
    pool: Literal["mean", "max"] = "mean",
    heads: Literal["kv", "all"] = "kv",
    softcap: float | None = None,
) -> Tensor:
    """See :func:`springtide.kernels.reference.choose`; for the rows of one request."""
    level = native.of(q, *kv.pages.slabs)
    if level is not None:
        return native.choose(
            level, q, kv, scale, budget, sinks=sinks, recent=recent, pool=pool, heads=heads, softcap=softcap
        )
    (seen,) = kv.reads.seen
    wanted = scores(q, kv, scale, softcap)
    return reference.choose(wanted, seen, budget, sinks=sinks, recent=recent, pool=pool, heads=heads)


def scores(q: Tensor, kv: KV, scale: float, softcap: float | None = None) -> Tensor:
    """See :func:`springtide.kernels.reference.scores`; for one request. Products are rounded to the inputs' dtype."""
    (table,), (seen,) = kv.reads.tables, kv.reads.seen
    k, _ = kv.pages.read(table, 0, seen.length)
    return reference.scores(q, k, scale, softcap) if softcap is not None else _scores(q, k, scale)


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    rows, heads, head_dim = q.shape
    kv_heads, length, _ = k.shape
    folded = q.view(rows, kv_heads, heads // kv_heads, head_dim).transpose(0, 1).reshape(kv_heads, -1, head_dim)
    logits = (folded @ k.transpose(1, 2)).view(kv_heads, rows, -1, length).transpose(0, 1)
    return (logits if logits.dtype.itemsize > 4 else logits.float()) * scale
