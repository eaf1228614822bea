"""The C++ kernels of ``cpu/`` on tensors.

A level is a set of processor instructions: ``amx``, ``avx512``, ``avx2`` or ``portable``. The best one that the machine
has is used; the environment variable SPRINGTIDE_KERNELS names another one, or ``torch`` for none of them.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn

from springtide.errors import SpringtideError
from springtide.kernels.means import Means
from springtide.kernels.visible import Visible

if TYPE_CHECKING:
    from springtide.kernels._cpu import Layer, Level, Parts

try:
    import springtide.kernels._cpu as _cpu
except ImportError:
    _cpu = None  # type: ignore[assignment]

DTYPES = (torch.float32, torch.bfloat16)
SPAN: int = 2048 if _cpu is None else _cpu.SPAN  # slots of a unit of work, which begins at a multiple of it


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
    for x in tensors:  # as a loop, since this is asked for every layer
        if x.dtype != dtype or not x.is_cpu:
            return None
    return level() if dtype in DTYPES else None


def pages(slab: Tensor) -> _cpu.Pages:
    """One layer's pages ``[n, 2, H_kv, PAGE, D]`` for the kernels."""
    return _cpu.Pages(slab)


def reads(tables: Sequence[Sequence[int]], seen: Sequence[Visible]) -> _cpu.Reads:
    """What the rows of some requests read, for the kernels."""
    return _cpu.Reads([_request(*own) for own in zip(tables, seen, strict=True)])


def _request(table: Sequence[int], seen: Visible) -> _cpu.Request:
    return _cpu.Request(table, seen.prefix, seen.length, seen.positions, seen.low, _contiguous(seen.tail))


class KV(Protocol):
    """:class:`springtide.kernels.kv.KV`, which is built on this module."""

    @property
    def pages(self) -> Any: ...
    @property
    def reads(self) -> Any: ...


def write(kv: KV, keys: Tensor, values: Tensor) -> None:
    """:func:`springtide.kernels.write`."""
    _cpu.write(kv.pages.native, kv.reads.native, _rows(keys), _rows(values))


def attend(level: Level, q: Tensor, kv: KV, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """:func:`springtide.kernels.attend`."""
    return _attention(level.attend, q, kv, scale, softcap)


def attend_gathered(
    level: Level,
    q: Tensor,
    kv: KV,
    index: Tensor,
    scale: float,
    mask: Tensor | None,
    softcap: float | None,
    means: Means | None,
) -> tuple[Tensor, Tensor]:
    """:func:`springtide.kernels.attend_gathered`."""
    return _attention(
        level.gather,
        q,
        kv,
        scale,
        softcap,
        index=index.contiguous(),
        mask=_contiguous(mask),
        mean_k=None if means is None else _slots(means.keys),
        mean_v=None if means is None else _slots(means.values),
        weight=1 if means is None else means.tokens,
    )


def _attention(
    kernel: Callable[..., None], q: Tensor, kv: KV, scale: float, softcap: float | None, **slots: object
) -> tuple[Tensor, Tensor]:
    """What a kernel fills: the output and ``lse``; ``slots`` says which are read, where it is not all that rows see."""
    out, lse = torch.empty(q.shape, dtype=q.dtype), torch.empty(q.shape[:2])
    kernel(
        q=_rows(q),
        pages=kv.pages.native,
        reads=kv.reads.native,
        out=out,
        lse=lse,
        scale=scale,
        softcap=softcap or 0.0,
        threads=torch.get_num_threads(),
        **slots,
    )
    return out, lse


def choose(
    level: Level,
    q: Tensor,
    kv: KV,
    scale: float,
    budget: int,
    *,
    sinks: int,
    recent: int,
    pool: Literal["mean", "max"],
    heads: Literal["kv", "all"],
    softcap: float | None,
) -> Tensor:
    """:func:`springtide.kernels.choose`."""
    index = torch.empty(len(q), kv.pages.kv_heads, min(budget, kv.reads.seen[0].length), dtype=torch.int64)
    level.select(
        q=_rows(q),
        pages=kv.pages.native,
        reads=kv.reads.native,
        index=index,
        sinks=sinks,
        recent=recent,
        scale=scale,
        softcap=softcap or 0.0,
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


def parts(module: nn.Module) -> Parts:
    """What a module is made of, to notice when something takes its place, comes in between, or moves in memory."""
    holders: list[dict[str, Any]] = []
    for own in map(vars, module.modules()):
        holders += [own, own["_modules"], own["_parameters"], own["_forward_hooks"], own["_forward_pre_hooks"]]
    return _cpu.Parts(holders, list(module.parameters()))


def layer(
    norms: Sequence[Tensor | None],
    projections: Sequence[tuple[Tensor, Tensor | None]],
    head_dim: int,
    rotary: int,
    epsilon: float,
) -> Layer:
    """What surrounds a layer's attention.

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
    """``x [H_kv, n, D]`` with each head's slots one after the other."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
