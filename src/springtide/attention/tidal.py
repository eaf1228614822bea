"""TidalDecode: position-persistent sparse attention (Yang et al., arXiv 2410.05076, section 3)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from springtide import kernels
from springtide.attention.policy import Layer, Policy, State, dense, gathered
from springtide.engine.rows import Segment
from springtide.engine.spec import ModelSpec
from springtide.errors import SpringtideError
from springtide.options import at_least, option


@dataclass
class TidalState(State):
    """``selected [R, H_kv, B]``: the slots that sparse layers read in the present pass, once a layer has chosen."""

    selected: Tensor | None = None


@dataclass(frozen=True)
class Tidal(Policy):
    """A few layers attend to everything and select tokens; the layers between them read those positions only.

    While decoding, ``full`` layers are dense, ``select`` and ``reselect`` layers are dense and choose the ``budget``
    tokens that their queries want most, and every other layer reads the choice of the last layer that made one.
    Prompts are dense. Layers with a sliding window keep it and take no part. With a budget of at least the context
    this is dense attention.
    """

    name: ClassVar[str] = "tidal"

    budget: int = option(1024, "tokens that a sparse layer reads per KV head")
    full: tuple[int, ...] | None = option(None, "layers that attend to everything, e.g. 0+1 (default: calibrated)")
    select: int | None = option(None, "first layer that selects tokens (default: calibrated)")
    reselect: tuple[int, ...] | None = option(None, "layers that select anew, e.g. 13 or 5+9 (default: calibrated)")
    sinks: int = option(2, "oldest tokens that are always kept, inside the budget")
    recent: int = option(64, "newest tokens that are always kept, inside the budget and at most a quarter of it")
    heads: Literal["kv", "all"] = option("kv", "kv: a set of tokens for each KV head; all: one set for all of them")
    pool: Literal["mean", "max"] = option("mean", "how the query heads of a KV head are joined in selecting")
    rows: Literal["each", "root"] = option("each", "each: every row of a draft tree selects; root: the first for all")
    correct: int | None = option(
        None, "after this many sparse tokens, run them again densely together with the next one"
    )

    @property
    def rows_independent(self) -> bool:  # type: ignore[override]
        return self.rows == "each"

    @property
    def selecting(self) -> tuple[int, ...]:
        """Layers that choose tokens, in order; the policy is resolved."""
        assert self.select is not None and self.reselect is not None
        return (self.select, *self.reselect)

    @property
    def dense_layers(self) -> tuple[int, ...]:
        """Layers that read the whole cache; the policy is resolved."""
        return tuple(sorted({*(self.full or ()), *self.selecting}))

    def resolve(self, spec: ModelSpec) -> Self:
        at_least(self.budget, 1, self.name, "budget")
        at_least(self.sinks, 0, self.name, "sinks")
        at_least(self.recent, 0, self.name, "recent")
        if self.correct is not None:
            at_least(self.correct, 1, self.name, "correct")
        resolved = replace(self, **self._layout(spec))
        resolved._check_layers(spec)
        return resolved

    def _layout(self, spec: ModelSpec) -> dict[str, Any]:
        """The layers: as given; else calibrated; else the paper's, scaled from 32 layers (0-1, 2, 13) to the depth."""
        given = {name: getattr(self, name) for name in ("full", "select", "reselect")}
        if None not in given.values():
            return given
        default = all(value is None for value in given.values())
        if default and spec.calibration is not None:
            layout = spec.calibration["tidal"]
            return {
                "full": tuple(layout["full"]),
                "select": layout["select"][0],
                "reselect": tuple(layout["select"][1:]),
            }
        layers = spec.global_layers
        if len(layers) < 3:
            raise SpringtideError(
                f"tidal: the model has {len(layers)} layers without a sliding window, but the default layout needs 3; "
                "give full, select and reselect, or use the dense policy."
            )
        if default:
            warnings.warn(
                "tidal: the model is not calibrated, so the paper's layers are used, scaled to its depth; "
                "`springtide calibrate` finds better ones",
                stacklevel=2,
            )
        paper = {
            "full": layers[:2],
            "select": layers[2],
            "reselect": tuple(layers[i] for i in {round(13 / 32 * len(layers))} if i > 2),
        }
        return {name: paper[name] if value is None else value for name, value in given.items()}

    def _check_layers(self, spec: ModelSpec) -> None:
        named = self.dense_layers
        unknown = [layer for layer in named if not 0 <= layer < spec.num_layers]
        if unknown:
            raise SpringtideError(
                f"tidal: there is no layer {unknown[0]}; the model's layers are 0 to {spec.num_layers - 1}."
            )
        sliding = [layer for layer in named if spec.windows[layer] is not None]
        if sliding:
            raise SpringtideError(
                f"tidal: layer {sliding[0]} has a sliding window and cannot be full or select; "
                f"choose among {', '.join(map(str, spec.global_layers))}."
            )
        assert self.select is not None
        early = [layer for layer in spec.global_layers if layer < min(self.selecting) and layer not in named]
        if early:
            raise SpringtideError(
                f"tidal: layer {early[0]} comes before the first selecting layer {min(self.selecting)}, "
                "so it must be listed in full."
            )

    def new_state(self, exact: int) -> TidalState:
        return TidalState(exact)

    def resume(self, state: State, length: int, prefilling: bool) -> int:
        if self.correct is None:
            return length
        due = prefilling or length - state.exact >= self.correct
        return state.exact if due else length

    def headroom(self, state: State, length: int) -> int | None:
        return None if self.correct is None else self.correct - (length - state.exact)

    def attend(self, layer: Layer, q: Tensor, segment: Segment) -> Tensor:
        covered = self.budget >= segment.prefix + len(segment.tokens)
        if not segment.decoding or layer.window is not None or covered:
            return dense(layer, q, segment)
        state: TidalState = segment.state
        if layer.index in self.dense_layers:
            if layer.index in self.selecting:
                state.selected = self.choose(layer, q, segment)
            return dense(layer, q, segment)
        assert state.selected is not None
        return gathered(layer, q, segment, state.selected)

    def choose(self, layer: Layer, q: Tensor, segment: Segment) -> Tensor:
        """The slots that each row selects at this layer: ``[R, H_kv, B]``, ascending.

        With ``rows="root"`` the first row selects for all, and every row also reads its ancestors in the segment.
        """
        if self.rows == "each" or segment.rows == 1:
            return self.best(layer, q, segment)
        root = replace(segment, tokens=segment.tokens[:1], parents=segment.parents[:1])
        chosen = self.best(layer, q[:1], root)
        others = torch.arange(root.length, segment.length, device=chosen.device)
        joined = torch.cat([chosen, others.expand(1, chosen.shape[1], -1)], dim=-1)
        return joined.expand(segment.rows, -1, -1)

    def grown(self, segment: Segment, origins: Sequence[int]) -> None:
        """Rows that were added read what their origins selected, and each other."""
        state: TidalState = segment.state
        if state.selected is not None:
            chosen = state.selected[[*range(segment.rows - len(origins)), *origins]]
            others = torch.arange(segment.length - len(origins), segment.length, device=chosen.device)
            state.selected = torch.cat([chosen, others.expand(*chosen.shape[:2], -1)], dim=-1)

    def commit(self, segment: Segment, kept: int) -> None:
        super().commit(segment, kept)
        segment.state.selected = None

    def best(self, layer: Layer, q: Tensor, segment: Segment) -> Tensor:
        """The ``budget`` slots that each row wants most, ``[R, H_kv, B]``, those that are always kept among them."""
        keys, _ = segment.cache.read(layer.index, 0, segment.length)
        return kernels.choose(
            q,
            keys,
            layer.scale,
            segment.seen(),
            self.budget,
            sinks=self.sinks,
            recent=min(self.recent, self.budget // 4),
            pool=self.pool,
            heads=self.heads,
            softcap=layer.softcap,
        )
