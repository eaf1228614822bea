"""The C++ kernels (``cpu/module.cpp``).

Tensors are on the CPU, float32 or bfloat16, of one dtype a call, unless stated otherwise. Everything is checked before
memory is touched: TypeError for what is no tensor or of another dtype, ValueError for what has another shape, is not
contiguous where it must be, or names slots that are not there. MemoryError where working memory cannot be had.
"""

from collections.abc import Sequence
from typing import Any, final

from torch import Tensor

def levels() -> list[str]:
    """Names of the levels that this machine has, fastest first."""

def level(name: str) -> Level:
    """Raises ValueError for one that this machine does not have."""

def huge_pages(tensor: Tensor, now: bool) -> None:
    """Let a tensor lie on pages of 2 MB, with ``now`` what it holds already too; of any dtype, contiguous."""

PAGE: int
SPAN: int

@final
class Pages:
    """One layer's pages, which stay alive with this."""

    def __init__(self, tensor: Tensor) -> None:
        """``[pages, 2, H_kv, PAGE, D]``; a head's slots are contiguous."""

@final
class Request:
    """One request's page numbers, and what its rows see (see ``Visible``); everything is copied."""

    def __init__(
        self,
        table: Sequence[int],
        prefix: int,
        length: int,
        positions: Tensor,
        low: Tensor | None,
        tail: Tensor | None,
    ) -> None:
        """``positions``, ``low`` int32 ``[R]``, ``tail`` bool ``[R, length - prefix]``."""

@final
class Reads:
    """What the rows of requests side by side read."""

    def __init__(self, requests: Sequence[Request]) -> None: ...
    @property
    def groups(self) -> list[tuple[list[int], tuple[int, int]]]:
        """Rows that read the same pages, and in which spans of ``SPAN`` slots: from the first to before the last."""

def write(pages: Pages, reads: Reads, keys: Tensor, values: Tensor) -> None:
    """Store ``keys, values [H_kv, R, D]`` at the slots behind each request's prefix."""

@final
class Parts:
    """What modules are made of: what their dictionaries hold, and where their weights lie."""

    def __init__(self, holders: Sequence[dict[str, Any]], weights: Sequence[Tensor]) -> None: ...
    def same(self) -> bool:
        """Whether both are as they were when this was made."""

@final
class Layer:
    """What surrounds a layer's attention; the tensors are contiguous and stay alive with this."""

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
        pages: Pages,
        reads: Reads,
        out: Tensor,
        lse: Tensor,
        scale: float,
        softcap: float,
        threads: int,
    ) -> None:
        """Fill ``out [R, H, D]`` and ``lse [R, H]`` (fp32), contiguous, from ``q [R, H, D]``; ``softcap`` 0: none."""

    def gather(
        self,
        *,
        q: Tensor,
        pages: Pages,
        reads: Reads,
        index: Tensor,
        mask: Tensor | None,
        mean_k: Tensor | None,
        mean_v: Tensor | None,
        weight: float,
        out: Tensor,
        lse: Tensor,
        scale: float,
        softcap: float,
        threads: int,
    ) -> None:
        """The same over slots ``index`` int64 ``[R, H_kv, B]`` less those that ``mask`` (bool) hides, and over means
        ``[H_kv, n, D]``, each of ``weight``."""

    def select(
        self,
        *,
        q: Tensor,
        pages: Pages,
        reads: Reads,
        index: Tensor,
        sinks: int,
        recent: int,
        scale: float,
        softcap: float,
        largest: bool,
        joined: bool,
        threads: int,
    ) -> None:
        """Fill ``index`` int64 ``[R, H_kv, B]`` for the rows of one request."""

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
