"""What surrounds a decoder layer's attention, in two calls of the C++ kernels instead of some forty of torch's.

Before: RMSNorm, the query, key and value projections, norms of queries and keys, rotary embedding. After: the output
projection, the residual, RMSNorm, the gated MLP, the residual. Sums are rounded where transformers rounds them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from springtide.kernels import native


class FusedLayer:
    """A decoder layer on the CPU, of an architecture whose record says ``fused``, whose weights it shares.

    The layer is its owner's to change: what it is made of is looked at before every pass, and anew if it is another.
    """

    def __init__(self, layer: Any) -> None:
        self._look(layer)

    def takes(self, layer: Any, hidden: Tensor) -> bool:
        """Whether ``hidden [R, hidden]`` of ``layer``, as it is now, can run here: no gradients, not too many rows."""
        if layer is not self.layer or not self.parts.same():
            self._look(layer)
        if self.block is None or hidden.requires_grad or hidden.dtype != self.dtype:
            return False
        return hidden.shape[0] <= self.most_rows

    def _look(self, layer: Any) -> None:
        """Take over the weights; there is no ``block`` on another device or dtype, and for parts of other kinds."""
        self.layer, self.parts, self.block = layer, native.parts(layer), None
        weights = list(layer.parameters())
        self.level = native.of(*weights)
        if self.level is None or not all(x.is_contiguous() for x in weights) or not _as_written(layer):
            return
        norms, matrices = _projections(layer)
        attention = layer.self_attn
        self.dtype: torch.dtype = matrices[0].weight.dtype
        self.most_rows = native.most_rows(self.level, self.dtype)
        self.head_dim: int = attention.head_dim
        self.heads: int = matrices[0].out_features // self.head_dim
        self.kv_heads: int = matrices[1].out_features // self.head_dim
        rotary = self.head_dim if getattr(attention, "use_rope", True) else 0
        scales: list[Tensor | None] = [None if norm is None else norm.weight for norm in norms]
        projections: list[tuple[Tensor, Tensor | None]] = [(m.weight, m.bias) for m in matrices]
        epsilon: float = layer.input_layernorm.variance_epsilon
        self.block = native.layer(scales, projections, self.head_dim, rotary, epsilon)

    def before(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries ``[R, H, D]``, keys and values ``[H_kv, R, D]`` of the layer's input ``hidden [R, hidden]``."""
        assert self.level is not None and self.block is not None
        rows = len(hidden)
        q = hidden.new_empty(rows, self.heads, self.head_dim)
        k = hidden.new_empty(self.kv_heads, rows, self.head_dim)
        v = torch.empty_like(k)
        native.before(self.level, self.block, hidden, cos, sin, q, k, v)
        return q, k, v

    def after(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """The layer's output from its input ``hidden [R, hidden]`` and its attention ``[R, H, D]``."""
        assert self.level is not None and self.block is not None
        return native.after(self.level, self.block, hidden, attended)


def _as_written(layer: Any) -> bool:
    """Whether the layer is made of nothing but its architecture's own modules, plain linear layers and SiLU."""
    plain = (nn.Linear, nn.SiLU, SiLUActivation)
    own = type(layer).__module__
    return not any(hooked(m) or not (type(m) in plain or type(m).__module__ == own) for m in layer.modules())


def hooked(module: nn.Module) -> bool:
    """Whether calling a module does more than its class says: there are hooks, or ``forward`` was replaced."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _projections(layer: Any) -> tuple[list[Any], list[Any]]:
    """Norms (before attention and MLP, of queries and keys, if any) and projections of a layer."""
    attention, mlp = layer.self_attn, layer.mlp
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    matrices = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    return norms, [*matrices, mlp.gate_proj, mlp.up_proj, mlp.down_proj]
