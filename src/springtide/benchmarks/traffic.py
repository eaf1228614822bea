"""What a step must read and compute, and what the machine can read."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from springtide.kernels.native import huge_pages
from springtide.rows.cache import Cache

BUFFER = 2**30  # bytes; beyond any processor's cache
REPEATS = 10


def read_bandwidth(device: torch.device | str = "cpu") -> float:
    """Bytes a second that summing a large buffer reads with torch's threads, the best of several times.

    The best, not the median: it serves as the machine's limit. The buffer lies on large pages, as weights and caches.
    """
    buffer = torch.ones(BUFFER // 4, device=device)
    huge_pages(buffer, now=True)
    best = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        buffer.sum().item()
        best = min(best, time.perf_counter() - start)
    return buffer.nbytes / best


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of weights that decoding one token reads: each weight once.

    Of an embedding that is not the head as well it is one row, of a layer's experts those that a token takes.
    """
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    total = 0
    for name, weight in model.named_parameters():
        alone = weight is embedding and weight is not head
        total += weight[0].nbytes if alone else round(weight.nbytes * _taken(model, name))
    return total


def dense_bytes(cache: Cache, windows: Sequence[int | None], length: int) -> int:
    """Bytes of keys and values that dense attention reads for a row that sees ``length`` tokens, itself included."""
    total = 0
    for layer, window in enumerate(windows):
        keys, values = cache.read(layer, 0, 1)
        total += (keys.nbytes + values.nbytes) * (length if window is None else min(length, window))
    return total


def prefill_flops(model: PreTrainedModel, windows: Sequence[int | None], length: int) -> int:
    """Floating-point operations of reading a prompt with dense causal attention and predicting the token after it."""
    matrices: int = sum(
        round(weight.numel() * _taken(model, name))
        for name, weight in model.model.layers.named_parameters(prefix="model.layers")
        if weight.ndim > 1
    )
    pairs = sum(_pairs(length, length if window is None else window) for window in windows)
    config = model.config
    heads: int = config.num_attention_heads
    width = heads * int(getattr(config, "head_dim", config.hidden_size // heads))
    head: int = model.get_output_embeddings().weight.numel()
    return 2 * matrices * length + 4 * width * pairs + 2 * head


def _pairs(length: int, window: int) -> int:
    """Query-key pairs of ``length`` causal rows of which each sees at most ``window`` tokens."""
    short = min(length, window)
    return short * (short + 1) // 2 + (length - short) * short


def _taken(model: PreTrainedModel, name: str) -> float:
    """The share of a weight that one token makes use of: 1, but for experts."""
    if ".experts." not in name:
        return 1.0
    config = model.config
    count = getattr(config, "num_experts", None) or config.num_local_experts
    return float(config.num_experts_per_tok / count)
