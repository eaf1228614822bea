"""Attention in plain torch: the truth that every faster kernel is tested against.

Shapes: ``q [R, H, D]`` holds R rows; ``k, v [H_kv, L, D]`` is one layer of one sequence's cache. Query head ``h`` reads
KV head ``h // (H / H_kv)``. Arithmetic is fp32 (fp64 for fp64 input), whatever the inputs are. Attention gives its
output ``[R, H, D]`` and ``lse [R, H]``, the natural logarithm of the sum of exponentials of the logits: zeros and minus
infinity for a row that sees nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from springtide.kernels.means import Means
from springtide.kernels.visible import Visible


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
) -> tuple[Tensor, Tensor]:
    """Softmax attention over all ``L`` tokens, or those that ``mask [R, L]`` (bool) lets a row see."""
    logits = scores(q, k, scale, softcap)
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None, None, :], -torch.inf)
    probs, lse = _softmax(logits)
    out = torch.einsum("rkgl,kld->rkgd", probs, _wide(v))
    return out.reshape(q.shape).to(q.dtype), lse


def attend_gathered(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    scale: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
    means: Means | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the tokens ``index [R, H_kv, B]`` alone, less those that ``mask`` (same shape) hides.

    Every row also reads the ``means``, each with ``means.tokens`` times the weight that its logit says.
    """
    rows, heads, head_dim = q.shape
    keys, values = read(k, v, index, means)
    grouped = _wide(q).view(rows, k.shape[0], heads // k.shape[0], head_dim)
    logits = torch.einsum("rkgd,rkbd->rkgb", grouped, _wide(keys)) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if mask is not None or means is not None:
        logits = logits + weights(index, mask, means, logits.dtype)
    probs, lse = _softmax(logits)
    out = torch.einsum("rkgb,rkbd->rkgd", probs, _wide(values))
    return out.reshape(q.shape).to(q.dtype), lse


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Attention over several sets of slots from that over each of them, as ``(out [R, H, D], lse [R, H])``."""
    masses = torch.stack([lse for _, lse in parts])
    total = masses.logsumexp(0)
    shares = (masses - total).exp().masked_fill(masses == -torch.inf, 0)[..., None]
    outs = torch.stack([_wide(out) for out, _ in parts]).masked_fill(shares == 0, 0)
    return (outs * shares).sum(0).to(parts[0][0].dtype), total


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities along the last axis of ``[R, H_kv, G, n]``, and ``lse [R, H]``."""
    lse = logits.logsumexp(-1)
    return logits.softmax(-1).masked_fill(lse[..., None] == -torch.inf, 0), lse.flatten(1)


def read(k: Tensor, v: Tensor, index: Tensor, means: Means | None) -> tuple[Tensor, Tensor]:
    """Keys and values at ``index [R, H_kv, B]``, and the means after them: two ``[R, H_kv, B + n, D]``."""
    keys, values = gather(k, index), gather(v, index)
    if means is None:
        return keys, values
    pairs = (keys, means.keys), (values, means.values)
    keys, values = (torch.cat([x, mean.expand(len(index), -1, -1, -1)], 2) for x, mean in pairs)
    return keys, values


def weights(index: Tensor, mask: Tensor | None, means: Means | None, dtype: torch.dtype) -> Tensor:
    """What is added to logits, ``[R, H_kv, 1, B + n]``: ``-inf`` for slots that ``mask`` hides, ``log`` of a block."""
    own = torch.zeros(index.shape, dtype=dtype, device=index.device)
    if mask is not None:
        own = own.masked_fill(~mask, -torch.inf)
    if means is not None:
        blocks = own.new_full((*index.shape[:2], means.keys.shape[1]), math.log(means.tokens))
        own = torch.cat([own, blocks], 2)
    return own[:, :, None]


def gather(x: Tensor, index: Tensor) -> Tensor:
    """Rows of ``x [H_kv, L, D]`` at ``index [R, H_kv, B]``: ``[R, H_kv, B, D]``."""
    heads = torch.arange(x.shape[0], device=x.device)[None, :, None]
    return x[heads, index]


def choose(
    wanted: Tensor,
    seen: Visible,
    budget: int,
    *,
    sinks: int,
    recent: int,
    pool: Literal["mean", "max"],
    heads: Literal["kv", "all"],
) -> Tensor:
    """The ``budget`` slots that each row wants most by ``wanted``, see :func:`scores`: ``[R, H_kv, B]``, ascending.

    First those of :func:`keep_first`, then by :func:`pooled` scores.
    """
    return select(keep_first(pooled(wanted, seen, pool, heads), seen, sinks, recent), budget)


def pooled(wanted: Tensor, seen: Visible, pool: Literal["mean", "max"], heads: Literal["kv", "all"]) -> Tensor:
    """How much each row wants each slot, ``[R, H_kv, L]``: ``wanted [R, H_kv, G, L]``, joined over a KV head's queries.

    ``pool="mean"`` averages the heads' softmax probabilities (Kascade); ``"max"`` takes the largest logit.
    ``heads="all"`` pools over every KV head too, so that all read the same slots (LessIsMore). Slots that a row may
    not see score ``-inf``.
    """
    if seen.mask is not None:
        wanted = wanted.masked_fill(~seen.mask[:, None, None, :], -torch.inf)
    if pool == "mean":
        wanted = wanted.softmax(-1)
    join = torch.mean if pool == "mean" else torch.amax
    ranking = join(wanted, dim=2)
    if heads == "all":
        ranking = join(ranking, dim=1, keepdim=True).expand_as(ranking).contiguous()
    return ranking if seen.mask is None else ranking.masked_fill(~seen.mask[:, None, :], -torch.inf)


def keep_first(ranking: Tensor, seen: Visible, sinks: int, recent: int) -> Tensor:
    """Put the row itself, its ``recent`` newest tokens and the ``sinks`` oldest first, in this order, in ``ranking``.

    ``ranking [R, ..., L]`` is written in place. A budget too small for all of them keeps the first of that order: no
    two rank the same, so that what is kept does not depend on how ties are broken.
    """
    own = seen.positions.long()
    slots = torch.cat([torch.arange(seen.prefix, device=ranking.device), own])
    age = own[:, None] - slots[None, :]
    near, oldest = age < recent, (slots < sinks).expand_as(age)
    itself = torch.arange(seen.length, device=ranking.device)[None] == (
        seen.prefix + torch.arange(len(own), device=ranking.device)[:, None]
    )
    if seen.mask is not None:
        near, oldest = near & seen.mask, oldest & seen.mask
    # The row itself is 1, the newest go down from 1/2 to 1/4 with age, the oldest from 1/8 to 1/16 with position.
    rank = torch.where(near, 0.5 - age / (4 * max(recent, 1)), 0.125 - slots / (16 * max(sinks, 1)))
    rank = rank.masked_fill(itself, 1.0).to(ranking.dtype) * torch.finfo(ranking.dtype).max
    shape = (len(own), *[1] * (ranking.ndim - 2), seen.length)
    return ranking.copy_(torch.where((itself | near | oldest).view(shape), rank.view(shape), ranking))


def select(ranking: Tensor, budget: int) -> Tensor:
    """Indices of the ``budget`` highest entries along the last axis, in ascending order (all of them if fewer)."""
    best = ranking.topk(min(budget, ranking.shape[-1]), dim=-1, sorted=False).indices
    return best.sort(dim=-1).values


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
