"""What surrounds a decoder layer's attention, in two calls of the C++ kernels instead of some forty of torch's.

Before: RMSNorm, the query, key and value projections, norms of queries and keys, rotary embedding. After: the output
projection, the residual, RMSNorm, the gated MLP, the residual. Sums are rounded where transformers rounds them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from springtide.kernels import native

if TYPE_CHECKING:
    from springtide.kernels._cpu import Level

FUSED = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
"""Architectures whose layers are pre-norm, with a SiLU-gated MLP and rotary embedding in halves."""


class FusedLayer:
    """A decoder layer of an architecture in ``FUSED``, on the CPU, whose weights it shares."""

    def __init__(self, layer: Any, level: Level) -> None:
        norms, matrices = _parts(layer)
        attention = layer.self_attn
        self.level = level
        self.dtype: torch.dtype = matrices[0].weight.dtype
        self.most_rows = native.most_rows(level, self.dtype)
        self.head_dim: int = attention.head_dim
        self.heads: int = matrices[0].out_features // self.head_dim
        self.kv_heads: int = matrices[1].out_features // self.head_dim
        rotary = self.head_dim if getattr(attention, "use_rope", True) else 0
        scales: list[Tensor | None] = [None if norm is None else norm.weight for norm in norms]
        projections: list[tuple[Tensor, Tensor | None]] = [(m.weight, m.bias) for m in matrices]
        epsilon: float = layer.input_layernorm.variance_epsilon
        self.native = native.layer(scales, projections, self.head_dim, rotary, epsilon)
        self.weights = [x for x in (*scales, *(x for pair in projections for x in pair)) if x is not None]
        self.addresses = [x.data_ptr() for x in self.weights]

    @classmethod
    def of(cls, layer: Any, config: Any) -> Self | None:
        """The layer fused; None for another architecture, device or dtype, and where its parts were changed."""
        if config.model_type not in FUSED or config.hidden_act != "silu":
            return None
        norms, matrices = _parts(layer)
        parameters = [x for m in (*norms, *matrices) if m is not None for x in m.parameters()]
        hooked = any(hasattr(m, "_hf_hook") or m._forward_hooks or m._forward_pre_hooks for m in layer.modules())
        changed = hooked or any(type(m) is not nn.Linear for m in matrices)
        level = native.of(*parameters)
        if level is None or changed or not all(x.is_contiguous() for x in parameters):
            return None
        return cls(layer, level)

    def takes(self, hidden: Tensor) -> bool:
        """Whether ``hidden [R, hidden]`` can run here: no gradients, not too many rows, weights in place."""
        if hidden.requires_grad or hidden.dtype != self.dtype or len(hidden) > self.most_rows:
            return False
        return [x.data_ptr() for x in self.weights] == self.addresses

    def before(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries ``[R, H, D]``, keys and values ``[H_kv, R, D]`` of the layer's input ``hidden [R, hidden]``."""
        rows = len(hidden)
        q = hidden.new_empty(rows, self.heads, self.head_dim)
        k = hidden.new_empty(self.kv_heads, rows, self.head_dim)
        v = torch.empty_like(k)
        native.before(self.level, self.native, hidden, cos, sin, q, k, v)
        return q, k, v

    def after(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """The layer's output from its input ``hidden [R, hidden]`` and its attention ``[R, H, D]``."""
        return native.after(self.level, self.native, hidden, attended)


def _parts(layer: Any) -> tuple[list[Any], list[Any]]:
    """Norms (before attention and MLP, of queries and keys, if any) and projections of a layer."""
    attention, mlp = layer.self_attn, layer.mlp
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    matrices = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    return norms, [*matrices, mlp.gate_proj, mlp.up_proj, mlp.down_proj]
