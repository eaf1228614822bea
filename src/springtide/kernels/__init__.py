"""Attention kernels: the fastest form of :mod:`springtide.kernels.reference` that the inputs allow.

Here that is torch's fused attention, which computes in the inputs' dtype and has no soft cap; with a soft cap the
reference runs. The query heads of a group are folded into rows, so that a KV head is read once for all of them.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from springtide.kernels import reference
from springtide.kernels.reference import gather, select

__all__ = ["attend", "attend_gathered", "scores", "select"]


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None, softcap: float | None = None
) -> Tensor:
    """See :func:`springtide.kernels.reference.attend`."""
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
) -> Tensor:
    """See :func:`springtide.kernels.reference.attend_gathered`."""
    if softcap is not None:
        return reference.attend_gathered(q, k, v, index, scale, mask, softcap)
    rows, heads, head_dim = q.shape
    grouped = q.view(rows, k.shape[0], heads // k.shape[0], head_dim)
    if mask is not None:
        mask = mask[:, :, None, :]
    out = scaled_dot_product_attention(grouped, gather(k, index), gather(v, index), attn_mask=mask, scale=scale)
    return out.reshape(rows, heads, head_dim)


def scores(q: Tensor, k: Tensor, scale: float, softcap: float | None = None) -> Tensor:
    """See :func:`springtide.kernels.reference.scores`; products are rounded to the inputs' dtype."""
    if softcap is not None:
        return reference.scores(q, k, scale, softcap)
    rows, heads, head_dim = q.shape
    kv_heads, length, _ = k.shape
    folded = q.view(rows, kv_heads, heads // kv_heads, head_dim).transpose(0, 1).reshape(kv_heads, -1, head_dim)
    logits = (folded @ k.transpose(1, 2)).view(kv_heads, rows, -1, length).transpose(0, 1)
    return (logits if logits.dtype.itemsize > 4 else logits.float()) * scale
