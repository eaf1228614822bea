"""Attention kernels: the fastest form of :mod:`springtide.kernels.reference` that the inputs allow."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from springtide.kernels import reference
from springtide.kernels.reference import attend_gathered, scores, select

__all__ = ["attend", "attend_gathered", "scores", "select"]


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None, softcap: float | None = None
) -> Tensor:
    """:func:`springtide.kernels.reference.attend` through torch's fused attention (which has no soft cap).

    The query heads of a group are folded into rows, so that a KV head is read once for all of them.
    """
    if softcap is not None:
        return reference.attend(q, k, v, scale, mask, softcap)
    rows, heads, head_dim = q.shape
    group = heads // k.shape[0]
    folded = q.view(rows, k.shape[0], group, head_dim).transpose(0, 1).reshape(1, k.shape[0], rows * group, head_dim)
    if mask is not None:
        mask = mask.repeat_interleave(group, dim=0)
    out = scaled_dot_product_attention(folded, k[None], v[None], attn_mask=mask, scale=scale)
    return out.view(k.shape[0], rows, group, head_dim).transpose(0, 1).reshape(rows, heads, head_dim)
