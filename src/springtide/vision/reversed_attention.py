"""Reversed attention: tokens choose whom they send to, instead of whom they read (Ding et al., arXiv 2304.03282).

Every child ``j`` spreads one unit over its possible parents by a softmax, as an ordinary query does over keys. A parent
``i`` then receives from child ``j`` what ``j`` gave to it:

    A_h = softmax over keys(Q_h K_h^T / sqrt(C))        [child, parent]
    R_h[i, j] = A_h[j, i] w_h[j]                        [parent, child]
    Y_h = R_h V_h

with a weight ``w_h[j]`` of what the child sends by head ``h``. So parent ``i`` gets
``sum_j exp(s_ji - lse_j) w_h[j] v_j``, the shape of the pass of flash attention's backward that makes dV. There is no
order among tokens, hence neither a causal mask nor a cache: a new child would change what every parent has received.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def reversed_attention(
    query: Tensor, key: Tensor, value: Tensor, weights: Tensor, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """What every token receives, and how much of it.

    Args:
        query, key, value: ``[B, H, N, C]``.
        weights: ``[B, H, N]``, fp32 or wider: how much a child sends by each head.
        chunk: tokens at a time. Memory is then O(N chunk) instead of O(N^2), with gradients too, for one more product
            of queries and keys: the first pass finds each child's log-sum-exp, the second what parents receive.

    Returns:
        ``[B, H, N, C]`` in the dtype of ``value``, and the mass received, ``[B, H, N]`` in that of ``weights``, whose
        sum over tokens is that of the weights.
    """
    sent = (weights[..., None] * value).to(value.dtype)
    if chunk is None:
        return _receive(_scores(query, key).softmax(-1), sent, weights)
    lse = torch.cat([_again(_lse, part, key) for part in torch.split(query, chunk, 2)], 2)
    parts = [_again(_receive_part, query, part, lse, sent, weights) for part in torch.split(key, chunk, 2)]
    return torch.cat([out for out, _ in parts], 2), torch.cat([mass for _, mass in parts], 2)


def forward_attention(query: Tensor, key: Tensor, value: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The ordinary direction, ``R_h[i, j] = A_h[i, j] w_h[j]``: the control that isolates the reversal.

    Arguments and results as in :func:`reversed_attention`; with weights of one it is plain softmax attention.
    """
    sent = (weights[..., None] * value).to(value.dtype)
    return _receive(_scores(query, key).softmax(-1).mT, sent, weights)


def dependency_mask(query: Tensor, key: Tensor, weights: Tensor, reverse: bool = True) -> Tensor:
    """``A^M = sum_h R_h``, ``[B, N, N]`` (parent, child); its columns sum to the sum over heads of ``weights``."""
    spread = _scores(query, key).softmax(-1)
    if reverse:
        spread = spread.mT
    mask: Tensor = torch.einsum("bhij,bhj->bij", spread.to(weights.dtype), weights)
    return mask


def _scores(query: Tensor, key: Tensor) -> Tensor:
    """``[B, H, children, parents]``, in fp32 at least."""
    scores: Tensor = query @ key.mT * query.shape[-1] ** -0.5
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def _receive(spread: Tensor, sent: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Of ``spread [B, H, children, parents]``, ``sent [B, H, children, C]`` and ``weights [B, H, children]``."""
    mass = torch.einsum("bhji,bhj->bhi", spread.to(weights.dtype), weights)
    return spread.to(sent.dtype).mT @ sent, mass


def _lse(query: Tensor, key: Tensor) -> Tensor:
    return _scores(query, key).logsumexp(-1)


def _receive_part(query: Tensor, key: Tensor, lse: Tensor, sent: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    return _receive((_scores(query, key) - lse[..., None]).exp(), sent, weights)


def _again(part: Callable[..., Any], *tensors: Tensor) -> Any:
    """The function of the tensors, computed again for its gradients, so that nothing of its inside is kept."""
    if not torch.is_grad_enabled():
        return part(*tensors)
    return checkpoint(part, *tensors, use_reentrant=False)
