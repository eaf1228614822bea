"""Attention in plain torch: the truth that every faster kernel is tested against.

Shapes: ``q [R, H, D]`` holds R rows; ``k, v [H_kv, L, D]`` is one layer of one sequence's cache. Query head ``h`` reads
KV head ``h // (H / H_kv)``. Arithmetic is fp32 (fp64 for fp64 input), whatever the inputs are.
"""

from __future__ import annotations

import torch
from torch import Tensor


def scores(q: Tensor, k: Tensor, scale: float, softcap: float | None = None) -> Tensor:
    """Attention logits of every row for every cached token.

    Returns ``[R, H_kv, G, L]`` with ``G = H / H_kv``; ``softcap`` is Gemma 2's ``cap * tanh(x / cap)``.
    """
    rows, heads, head_dim = q.shape
    grouped = _wide(q).view(rows, k.shape[0], heads // k.shape[0], head_dim)
    logits = torch.einsum("rkgd,kld->rkgl", grouped, _wide(k)) * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None, softcap: float | None = None
) -> Tensor:
    """Softmax attention over all ``L`` tokens, or those that ``mask [R, L]`` (bool) lets a row see: ``[R, H, D]``."""
    logits = scores(q, k, scale, softcap)
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None, None, :], -torch.inf)
    out = torch.einsum("rkgl,kld->rkgd", logits.softmax(-1), _wide(v))
    return out.reshape(q.shape).to(q.dtype)


def attend_gathered(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    scale: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Softmax attention over the tokens ``index [R, H_kv, B]`` alone, less those that ``mask`` (same shape) hides."""
    rows, heads, head_dim = q.shape
    keys, values = gather(k, index), gather(v, index)
    grouped = _wide(q).view(rows, k.shape[0], heads // k.shape[0], head_dim)
    logits = torch.einsum("rkgd,rkbd->rkgb", grouped, _wide(keys)) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if mask is not None:
        logits = logits.masked_fill(~mask[:, :, None, :], -torch.inf)
    out = torch.einsum("rkgb,rkbd->rkgd", logits.softmax(-1), _wide(values))
    return out.reshape(q.shape).to(q.dtype)


def gather(x: Tensor, index: Tensor) -> Tensor:
    """Rows of ``x [H_kv, L, D]`` at ``index [R, H_kv, B]``: ``[R, H_kv, B, D]``."""
    heads = torch.arange(x.shape[0], device=x.device)[None, :, None]
    return x[heads, index]


def select(ranking: Tensor, budget: int) -> Tensor:
    """Indices of the ``budget`` highest entries along the last axis, in ascending order (all of them if fewer)."""
    best = ranking.topk(min(budget, ranking.shape[-1]), dim=-1, sorted=False).indices
    return best.sort(dim=-1).values


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
