"""The C++ kernels of ``cpu/`` on tensors.

A level is a set of processor instructions: ``amx``, ``avx512``, ``avx2`` or ``portable``. The best one that the machine
has is used; the environment variable SPRINGTIDE_KERNELS names another one, or ``torch`` for none of them.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from springtide.errors import SpringtideError
from springtide.kernels.means import Means
from springtide.kernels.visible import Visible

if TYPE_CHECKING:
    from springtide.kernels._cpu import Layer, Level

try:
    import springtide.kernels._cpu as _cpu
except ImportError:
    _cpu = None  # type: ignore[assignment]

DTYPES = (torch.float32, torch.bfloat16)


@cache
def levels() -> tuple[str, ...]:
    """Names of the levels that this machine has, fastest first; none where the extension was not built."""
    return tuple(_cpu.levels()) if _cpu is not None else ()


@cache
def level() -> Level | None:
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


def of(*tensors: Tensor) -> Level | None:
    """The level for these tensors; None if they are not all on the CPU in one of ``DTYPES``, or for torch."""
    dtype = tensors[0].dtype
    if dtype not in DTYPES or any(x.dtype != dtype or x.device.type != "cpu" for x in tensors):
        return None
    return level()


def attend(
    level: Level,
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
    out = torch.empty(q.shape, dtype=q.dtype)
    level.attend(
        q=_rows(q),
        k=_slots(k),
        v=_slots(v),
        out=out,
        scale=scale,
        softcap=softcap or 0.0,
        prefix=k.shape[1] if seen is None else seen.prefix,
        low=None if seen is None else seen.low,
        tail=None if seen is None else _contiguous(seen.tail),
        index=_contiguous(index),
        mask=_contiguous(mask),
        mean_k=None if means is None else _slots(means.keys),
        mean_v=None if means is None else _slots(means.values),
        weight=1 if means is None else means.tokens,
        threads=torch.get_num_threads(),
    )
    return out


def choose(
    level: Level,
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
    index = torch.empty(len(q), k.shape[0], min(budget, k.shape[1]), dtype=torch.int64)
    level.select(
        q=_rows(q),
        k=_slots(k),
        index=index,
        sinks=sinks,
        recent=recent,
        scale=scale,
        softcap=softcap or 0.0,
        prefix=seen.prefix,
        tail=_contiguous(seen.tail),
        positions=seen.positions,
        largest=pool == "max",
        joined=heads == "all",
        threads=torch.get_num_threads(),
    )
    return index


def most_rows(level: Level, dtype: torch.dtype) -> float:
    """Rows up to which linear layers are faster here than in torch."""
    return math.inf if level.name == "amx" and dtype == torch.bfloat16 else 64


def linear(level: Level, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x [R, inputs] @ weight.T + bias``; ``weight [outputs, inputs]`` and ``bias`` are contiguous."""
    out = torch.empty(len(x), len(weight), dtype=x.dtype)
    level.linear(weight=weight, bias=bias, x=x.contiguous(), out=out, threads=torch.get_num_threads())
    return out


def layer(
    norms: Sequence[Tensor | None],
    projections: Sequence[tuple[Tensor, Tensor | None]],
    head_dim: int,
    rotary: int,
    epsilon: float,
) -> Layer:
    """What surrounds a layer's attention; the caller keeps the tensors.

    Args:
        norms: weights of the norms before attention and MLP ``[hidden]`` and of queries and keys ``[head_dim]`` (or
            None).
        projections: weight and bias (or None) of the projections q, k, v, o, gate, up and down.
        rotary: leading dimensions of a head that are turned, 0 for none.
    """
    first, second, of_queries, of_keys = norms
    assert first is not None and second is not None
    return _cpu.Layer(first, second, of_queries, of_keys, projections, head_dim, rotary, epsilon)


def before(level: Level, layer: Layer, x: Tensor, cos: Tensor, sin: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Fill q ``[R, H, D]``, k, v ``[H_kv, R, D]`` for the layer's input ``x [R, hidden]``; cos, sin ``[R, rotary]``."""
    x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
    level.before(layer, x=x, cos=cos, sin=sin, q=q, k=k, v=v, threads=torch.get_num_threads())


def after(level: Level, layer: Layer, x: Tensor, attended: Tensor) -> Tensor:
    """The layer's output ``[R, hidden]`` from its input ``x`` and its attention ``[R, H, D]``."""
    x, attended = x.contiguous(), attended.contiguous()
    out = torch.empty_like(x)
    level.after(layer, x=x, attention=attended, out=out, threads=torch.get_num_threads())
    return out


def huge_pages(x: Tensor, *, now: bool) -> None:
    """Let a tensor on the CPU lie on large pages, which are read faster; with ``now``, what it holds already too.

    The content stays as it is. Where the system has no such pages nothing happens.
    """
    if _cpu is not None and x.device.type == "cpu":
        _cpu.huge_pages(x, now)


def _rows(q: Tensor) -> Tensor:
    return q if q.stride()[2] == 1 else q.contiguous()


def _slots(x: Tensor) -> Tensor:
    """``x [H_kv, L, D]`` with each head's slots one after the other, as the cache has them."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
