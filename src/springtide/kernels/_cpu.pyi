"""The C++ kernels (``cpu/module.cpp``).

Tensors are on the CPU, float32 or bfloat16, of one dtype a call, unless stated otherwise. Everything is checked before
memory is touched: TypeError for what is no tensor or of another dtype, ValueError for what has another shape, is not
contiguous where it must be, or names slots that are not there. MemoryError where working memory cannot be had.
"""

from collections.abc import Sequence
from typing import final

from torch import Tensor

def levels() -> list[str]:
    """Names of the levels that this machine has, fastest first."""

def level(name: str) -> Level:
    """Raises ValueError for one that this machine does not have."""

def huge_pages(tensor: Tensor, now: bool) -> None:
    """Let a tensor lie on pages of 2 MB, with ``now`` what it holds already too; of any dtype, contiguous."""

@final
class Layer:
    """What surrounds a layer's attention; the caller keeps the tensors, which are contiguous."""

    def __init__(
        self,
        input_norm: Tensor,
        output_norm: Tensor,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        projections: Sequence[tuple[Tensor, Tensor | None]],
        head_dim: int,
        rotary: int,
        epsilon: float,
    ) -> None:
        """RMSNorm weights ``[hidden]`` and ``[head_dim]``; weight and bias of q, k, v, o, gate, up and down."""

@final
class Level:
    """Kernels for one set of processor instructions."""

    @property
    def name(self) -> str: ...
    def attend(
        self,
        *,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        scale: float,
        softcap: float,
        prefix: int,
        low: Tensor | None,
        tail: Tensor | None,
        index: Tensor | None,
        mask: Tensor | None,
        mean_k: Tensor | None,
        mean_v: Tensor | None,
        weight: float,
        threads: int,
    ) -> None:
        """Fill ``out [R, H, D]``, contiguous, from ``q [R, H, D]`` and ``k, v [H_kv, L, D]``; ``softcap`` 0: none.

        What is seen: ``prefix``, ``low`` int32 ``[R]`` and ``tail`` bool ``[R, L - prefix]`` of ``Visible``; or
        ``index`` int64 ``[R, H_kv, B]``, ``mask`` bool of that shape, and means ``[H_kv, n, D]``, each of ``weight``.
        """

    def select(
        self,
        *,
        q: Tensor,
        k: Tensor,
        index: Tensor,
        sinks: int,
        recent: int,
        scale: float,
        softcap: float,
        prefix: int,
        tail: Tensor | None,
        positions: Tensor,
        largest: bool,
        joined: bool,
        threads: int,
    ) -> None:
        """Fill ``index`` int64 ``[R, H_kv, B]``; ``positions`` int32 ``[R]``."""

    def linear(self, *, weight: Tensor, bias: Tensor | None, x: Tensor, out: Tensor, threads: int) -> None:
        """Fill ``out [R, outputs]`` from ``x [R, inputs]``, ``weight [outputs, inputs]``; all contiguous."""

    def before(
        self,
        layer: Layer,
        *,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        threads: int,
    ) -> None:
        """Fill ``q [R, H, D]``, ``k, v [H_kv, R, D]`` from ``x [R, hidden]``, ``cos, sin [R, rotary]``."""

    def after(self, layer: Layer, *, x: Tensor, attention: Tensor, out: Tensor, threads: int) -> None:
        """Fill ``out [R, hidden]`` from ``x [R, hidden]`` and ``attention [R, H, D]``."""
