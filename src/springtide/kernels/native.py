"""The C++ kernels of ``cpu/`` on tensors.

A level is a set of processor instructions: ``amx``, ``avx512``, ``avx2`` or ``portable``. The best one that the machine
has is used; the environment variable SPRINGTIDE_KERNELS names another one, or ``torch`` for none of them.
"""

from __future__ import annotations

import math
import os
import warnings
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from springtide.errors import SpringtideError
from springtide.kernels.means import Means
from springtide.kernels.visible import Visible

try:
    import springtide.kernels._cpu as _cpu
except ImportError:
    _cpu = None

DTYPES = (torch.float32, torch.bfloat16)


@cache
def levels() -> tuple[str, ...]:
    """Names of the levels that this machine has, fastest first; none where the extension was not built."""
    return tuple(_cpu.levels()) if _cpu is not None else ()


@cache
def level() -> Any:
    """The level in use; None for torch. Raises SpringtideError if SPRINGTIDE_KERNELS names one that is not here."""
    wanted = os.environ.get("SPRINGTIDE_KERNELS", "")
    if wanted not in ("", "torch", *levels()):
        known = ", ".join(("torch", *levels()))
        raise SpringtideError(f"SPRINGTIDE_KERNELS is '{wanted}', but this machine has {known}; choose one of them.")
    if wanted == "torch":
        return None
    if _cpu is None:
        warnings.warn(
            "the C++ kernels were not built, so torch's are used, which are slower; install with a compiler at hand",
            stacklevel=2,
        )
        return None
    return _cpu.level(wanted or levels()[0])


def of(*tensors: Tensor) -> Any:
    """The level for these tensors; None if they are not all on the CPU in one of ``DTYPES``, or for torch."""
    dtype = tensors[0].dtype
    if dtype not in DTYPES or any(x.dtype != dtype or x.device.type != "cpu" for x in tensors):
        return None
    return level()


def attend(
    level: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    seen: Visible | None,
    softcap: float | None,
    index: Tensor | None = None,
    mask: Tensor | None = None,
    means: Means | None = None,
) -> Tensor:
    """:func:`springtide.kernels.reference.attend`, or ``attend_gathered`` for an ``index``."""
    q, k, v = _rows(q), _slots(k), _slots(v)
    rows, heads, head_dim = q.shape
    kv_heads, length, _ = k.shape
    out = torch.empty(rows, heads, head_dim, dtype=q.dtype)
    kept = None if mask is None else mask.contiguous()
    chosen = None if index is None else index.contiguous()
    mean_k, mean_v = (k, v) if means is None else (_slots(means.keys), _slots(means.values))
    prefix, low, tail = (length, None, None) if seen is None else (seen.prefix, seen.low, _bytes(seen.tail))
    level.attend(
        q.dtype == torch.bfloat16, *map(_address, (q, k, v, out)),
        rows, heads, kv_heads, head_dim, length,
        q.stride(0), q.stride(1), k.stride(0), v.stride(0), scale, softcap or 0.0,
        prefix, *map(_address, (low, tail, chosen, kept)), 0 if chosen is None else chosen.shape[2],
        *map(_address, (mean_k, mean_v)), 0 if means is None else means.count, mean_k.stride(0), mean_v.stride(0),
        1 if means is None else means.tokens,
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def choose(
    level: Any,
    q: Tensor,
    k: Tensor,
    scale: float,
    seen: Visible,
    budget: int,
    *,
    sinks: int,
    recent: int,
    pool: Literal["mean", "max"],
    heads: Literal["kv", "all"],
    softcap: float | None,
) -> Tensor:
    """:func:`springtide.kernels.reference.choose`."""
    q, k = _rows(q), _slots(k)
    rows, query_heads, head_dim = q.shape
    kv_heads, length, _ = k.shape
    index = torch.empty(rows, kv_heads, min(budget, length), dtype=torch.int64)
    tail = _bytes(seen.tail)
    level.select(
        q.dtype == torch.bfloat16, *map(_address, (q, k, index)),
        rows, query_heads, kv_heads, head_dim, length, index.shape[2], sinks, recent,
        q.stride(0), q.stride(1), k.stride(0), scale, softcap or 0.0,
        seen.prefix, *map(_address, (tail, seen.positions)), pool == "max", heads == "all", torch.get_num_threads(),
    )  # fmt: skip
    return index


def most_rows(level: Any, dtype: torch.dtype) -> float:
    """Rows up to which linear layers are faster here than in torch."""
    return math.inf if level.name == "amx" and dtype == torch.bfloat16 else 64


def linear(level: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x [R, inputs] @ weight.T + bias``; ``weight [outputs, inputs]`` and ``bias`` are contiguous."""
    x = x.contiguous()
    out = torch.empty(len(x), len(weight), dtype=x.dtype)
    level.linear(
        x.dtype == torch.bfloat16, *map(_address, (weight, bias)), *weight.shape,
        *map(_address, (x, out)), len(x), torch.get_num_threads(),
    )  # fmt: skip
    return out


def block(weights: list[Tensor | None], heads: int, kv_heads: int, head_dim: int, rotary: int, epsilon: float) -> Any:
    """What surrounds a layer's attention; the caller keeps the tensors.

    Args:
        weights: of the norms before attention and MLP ``[hidden]`` and of queries and keys ``[head_dim]`` (or None);
            then weight and bias (or None) of the projections q, k, v, o, gate, up and down.
        rotary: leading dimensions of a head that are turned, 0 for none.
    """
    pairs = [(weights[i], weights[i + 1]) for i in range(4, len(weights), 2)]
    matrices = [[_address(w), _address(bias), *w.shape] for w, bias in pairs if w is not None]
    hidden = matrices[0][3]
    return _cpu.Block(*map(_address, weights[:4]), matrices, heads, kv_heads, head_dim, hidden, rotary, epsilon)


def before(level: Any, block: Any, x: Tensor, cos: Tensor, sin: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Fill q ``[R, H, D]``, k, v ``[H_kv, R, D]`` for the layer's input ``x [R, hidden]``; cos, sin ``[R, rotary]``."""
    tensors = (x.contiguous(), cos.contiguous(), sin.contiguous(), q, k, v)
    level.before(x.dtype == torch.bfloat16, block, *map(_address, tensors), len(x), torch.get_num_threads())


def after(level: Any, block: Any, x: Tensor, attended: Tensor) -> Tensor:
    """The layer's output ``[R, hidden]`` from its input ``x`` and its attention ``[R, H, D]``."""
    x, attended = x.contiguous(), attended.contiguous()
    out = torch.empty_like(x)
    level.after(x.dtype == torch.bfloat16, block, *map(_address, (x, attended, out)), len(x), torch.get_num_threads())
    return out


def huge_pages(x: Tensor, *, now: bool) -> None:
    """Let a tensor on the CPU lie on large pages, which are read faster; with ``now``, what it holds already too.

    The content stays as it is. Where the system has no such pages nothing happens.
    """
    if _cpu is not None and x.device.type == "cpu":
        _cpu.huge_pages(x.data_ptr(), x.nbytes, now)


def _rows(q: Tensor) -> Tensor:
    return q if q.stride(2) == 1 else q.contiguous()


def _slots(x: Tensor) -> Tensor:
    """``x [H_kv, L, D]`` with each head's slots one after the other, as the cache has them."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def _bytes(tail: Tensor | None) -> Tensor | None:
    return None if tail is None else tail.contiguous()


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
