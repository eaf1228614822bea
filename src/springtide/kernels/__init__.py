"""Attention kernels: the fastest form of :mod:`springtide.kernels.reference` that the inputs allow.

On the CPU, for fp32 and bf16, these are the C++ kernels (:mod:`springtide.kernels.native`). Elsewhere it is torch's
fused attention, which computes in the inputs' dtype and has no soft cap; with a soft cap the reference runs. The query
heads of a group are folded into rows, so that a KV head is read once for all of them.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from springtide.kernels import native, reference
from springtide.kernels.means import Means
from springtide.kernels.reference import select
from springtide.kernels.visible import Visible

__all__ = ["Means", "Visible", "attend", "attend_gathered", "choose", "scores", "select"]


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, seen: Visible | None = None, softcap: float | None = None
) -> Tensor:
    """See :func:`springtide.kernels.reference.attend`; what is ``seen`` (None: everything) stands for the mask."""
    level = native.of(q, k, v)
    if level is not None:
        return native.attend(level, q, k, v, scale, seen, softcap)
    mask = None if seen is None else seen.mask
    if softcap is not None:
        return reference.attend(q, k, v, scale, mask, softcap)
    rows, heads, head_dim = q.shape
    group = heads // k.shape[0]
    folded = q.view(rows, k.shape[0], group, head_dim).transpose(0, 1).reshape(1, k.shape[0], rows * group, head_dim)
    if mask is not None:
        mask = mask.repeat_interleave(group, dim=0)
    out = scaled_dot_product_attention(folded, k[None], v[None], attn_mask=mask, scale=scale)
    return out.view(k.shape[0], rows, group, head_dim).transpose(0, 1).reshape(rows, heads, head_dim)


def attend_gathered(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    scale: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
    means: Means | None = None,
) -> Tensor:
    """See :func:`springtide.kernels.reference.attend_gathered`."""
    level = native.of(q, k, v)
    if level is not None:
        return native.attend(level, q, k, v, scale, None, softcap, index, mask, means)
    if softcap is not None:
        return reference.attend_gathered(q, k, v, index, scale, mask, softcap, means)
    rows, heads, head_dim = q.shape
    grouped = q.view(rows, k.shape[0], heads // k.shape[0], head_dim)
    keys, values = reference.read(k, v, index, means)
    added = None if mask is None and means is None else reference.weights(index, mask, means, q.dtype)
    out = scaled_dot_product_attention(grouped, keys, values, attn_mask=added, scale=scale)
    return out.reshape(rows, heads, head_dim)


def choose(
    q: Tensor,
    k: Tensor,
    scale: float,
    seen: Visible,
    budget: int,
    *,
    sinks: int = 0,
    recent: int = 1,
    pool: Literal["mean", "max"] = "mean",
    heads: Literal["kv", "all"] = "kv",
    softcap: float | None = None,
) -> Tensor:
    """See :func:`springtide.kernels.reference.choose`."""
    level = native.of(q, k)
    how = {"sinks": sinks, "recent": recent, "pool": pool, "heads": heads, "softcap": softcap}
    if level is not None:
        return native.choose(level, q, k, scale, seen, budget, **how)  # type: ignore[arg-type]
    ranking = reference.pooled(scores(q, k, scale, softcap), seen, pool, heads)
    return select(reference.keep_first(ranking, seen, sinks, recent), budget)


def scores(q: Tensor, k: Tensor, scale: float, softcap: float | None = None) -> Tensor:
    """See :func:`springtide.kernels.reference.scores`; products are rounded to the inputs' dtype."""
    if softcap is not None:
        return reference.scores(q, k, scale, softcap)
    rows, heads, head_dim = q.shape
    kv_heads, length, _ = k.shape
    folded = q.view(rows, kv_heads, heads // kv_heads, head_dim).transpose(0, 1).reshape(kv_heads, -1, head_dim)
    logits = (folded @ k.transpose(1, 2)).view(kv_heads, rows, -1, length).transpose(0, 1)
    return (logits if logits.dtype.itemsize > 4 else logits.float()) * scale
