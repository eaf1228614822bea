"""TidalDecode: position-persistent sparse attention (Yang et al., arXiv 2410.05076, section 3)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from springtide import kernels
from springtide.attention.calibration import VERSION
from springtide.attention.policy import STEP, Layer, Slots, Sparse, State
from springtide.errors import SpringtideError
from springtide.kernels import Means
from springtide.options import KVHead, Share, amount, at_least, option
from springtide.rows.cache import Cache
from springtide.rows.segment import Segment
from springtide.rows.spec import ModelSpec


class NotCalibratedError(SpringtideError):
    """No one knows which layers of the model should select."""

    def __init__(self) -> None:
        super().__init__(
            "tidal: the model is not calibrated; run `springtide calibrate --model DIR` once (minutes), or take the "
            "paper's layers with tidal:layout=paper."
        )


def paper(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """The paper's layers, scaled from 32 layers (0 and 1 full, 2 and 13 selecting) to a model's depth.

    Raises SpringtideError for fewer than three layers without a sliding window.
    """
    layers = spec.global_layers
    if len(layers) < 3:
        raise SpringtideError(
            f"tidal: the model has {len(layers)} layers without a sliding window, but the paper's layout needs 3; "
            "give full, select and reselect, or use the dense policy."
        )
    again = round(13 / 32 * len(layers))
    return {"full": layers[:2], "select": (layers[2], *layers[again : again + 1 if again > 2 else again])}


@dataclass
class TidalState(State):
    """``selected [R, H_kv, B]``: the slots that sparse layers read in the present pass, once a layer has chosen.

    ``means``: of the committed tokens, by layer.
    """

    selected: Tensor | None = None
    means: Mapping[int, Means] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(means.nbytes for means in self.means.values())

    def crop(self, length: int) -> None:
        self.means = {layer: known.cut(length // known.tokens) for layer, known in self.means.items()}


@dataclass(frozen=True)
class Tidal(Sparse):
    """A few layers attend to everything and select tokens; the layers between them read those positions only.

    While decoding, ``full`` layers are dense, ``select`` and ``reselect`` layers are dense and choose the ``budget``
    tokens that their queries want most, and every other layer reads the choice of the last layer that made one, but for
    its ``full_heads``, which are dense: heads that look for what no selection has. Prompts are dense. Layers with a
    sliding window keep it and take no part. With a budget of at least the context this is dense attention.

    What is not selected is not left out: blocks of tokens are read by their mean key and value, inside the budget. A
    block has a power of two times ``STEP`` tokens, as many as it takes for the ``means`` to be so few.
    """

    name: ClassVar[str] = "tidal"

    full: tuple[int, ...] | None = option(None, "layers that attend to everything, e.g. 0+1 (default: as layout says)")
    full_heads: tuple[KVHead, ...] | None = option(
        None, "KV heads of other layers that do so too, as layer.head, e.g. 8.2+14.0 (default: as layout says)"
    )
    select: int | None = option(None, "first layer that selects tokens (default: as layout says)")
    reselect: tuple[int, ...] | None = option(None, "layers that select anew, e.g. 13 or 5+9 (default: as layout says)")
    layout: Literal["calibrated", "paper"] = option(
        "calibrated", "layers that are not given: those that calibration chose, or the paper's, scaled to the depth"
    )
    sinks: int = option(2, "oldest tokens that are always kept, inside the budget")
    recent: int | Share = option(Share(25), "newest tokens that are always kept, inside the budget, or a share of it")
    heads: Literal["all", "kv", "map"] = option(
        "all",
        "all: one set of tokens for all KV heads; kv: a set for each of them; map: each reads the set of that KV head "
        "of the selecting layer which calibration learnt",
    )
    pool: Literal["max", "mean"] = option(
        "max", "how query heads are joined in selecting: by their largest logit, or by the mean of their probabilities"
    )
    rows: Literal["each", "root"] = option("each", "each: every row of a draft tree selects; root: the first for all")
    means: int | Share = option(
        Share(15),
        "means of blocks of tokens that are read in place of what is not selected, inside the budget, or a share of it",
    )
    correct: int | None = option(
        None, "after this many sparse tokens, run them again densely together with the next one"
    )
    map: tuple[tuple[int, tuple[int, ...]], ...] | None = None
    """With ``heads="map"``, for each sparse layer the KV head whose set each of its own reads; from calibration."""

    @property
    def rows_independent(self) -> bool:  # type: ignore[override]
        return self.rows == "each"

    @property
    def selecting(self) -> tuple[int, ...]:
        """Layers that choose tokens, in order; the policy is resolved."""
        assert self.select is not None and self.reselect is not None
        return (self.select, *self.reselect)

    @cached_property
    def sets(self) -> dict[int, list[int]]:
        """``map`` by layer."""
        return {layer: list(heads) for layer, heads in self.map or ()}

    @cached_property
    def dense_heads(self) -> dict[int, list[int]]:
        """``full_heads`` by layer."""
        found: dict[int, list[int]] = {}
        for layer, head in self.full_heads or ():
            found.setdefault(layer, []).append(head)
        return found

    @property
    def dense_layers(self) -> tuple[int, ...]:
        """Layers that read the whole cache; the policy is resolved."""
        return tuple(sorted({*(self.full or ()), *self.selecting}))

    def resolve(self, spec: ModelSpec) -> Self:
        at_least(self.sinks, 0, f"{self.name}: sinks")
        at_least(self.recent, 0, f"{self.name}: recent")
        at_least(self.means, 0, f"{self.name}: means")
        if self.correct is not None:
            at_least(self.correct, 1, f"{self.name}: correct")
        resolved = replace(super().resolve(spec), **self._layers(spec))
        try:
            resolved._check_layers(spec)
        except SpringtideError as error:
            if self.select is not None or self.layout != "calibrated":
                raise
            raise SpringtideError(
                f"springtide.json does not fit the model ({str(error).rstrip('.')}); "
                "run `springtide calibrate` again or delete the file."
            ) from None
        return replace(resolved, map=resolved._head_map(spec) if self.heads == "map" else None)

    def _layers(self, spec: ModelSpec) -> dict[str, Any]:
        """The layers: as given; else calibrated, or the paper's."""
        if self.select is not None:
            heads = tuple(sorted({*(self.full_heads or ())}))
            return {"full": self.full or (), "reselect": self.reselect or (), "full_heads": heads}
        if any(option is not None for option in (self.full, self.reselect, self.full_heads)):
            raise SpringtideError(
                "tidal: full, full_heads or reselect is given, but no layer that selects first; give select too."
            )
        if self.layout == "calibrated":
            if spec.calibration is None:
                raise NotCalibratedError
            if spec.calibration.get("version") != VERSION:
                warnings.warn(
                    "tidal: springtide.json is of an earlier version, whose layers were chosen for another selection; "
                    "run `springtide calibrate` again for better ones",
                    stacklevel=2,
                )
            found = spec.calibration["tidal"]
        else:
            found = paper(spec)
        full, select = (tuple(found[role]) for role in ("full", "select"))
        heads = tuple(sorted(KVHead(*pair) for pair in found.get("full_heads", ())))
        return {"full": full, "select": select[0], "reselect": select[1:], "full_heads": heads}

    def _head_map(self, spec: ModelSpec) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """The map for the policy's own layers; raises SpringtideError where calibration learnt none for them."""
        learnt = ((spec.calibration or {}).get("tidal", {}).get("map") or {}).items()
        found = self.map or tuple((int(layer), tuple(sets)) for layer, sets in learnt)
        if {layer for layer, _ in found} != {*self._sparse(spec)}:
            raise SpringtideError(
                "tidal: heads=map needs a map that calibration learnt for these layers; run `springtide calibrate` "
                "and leave out full, select and reselect, or use heads=all."
            )
        heads = spec.kv_heads
        if any(len(sets) != heads or not all(0 <= head < heads for head in sets) for _, sets in found):
            raise SpringtideError(
                f"tidal: the map in springtide.json is not for the {heads} KV heads of this model; "
                "run `springtide calibrate` again."
            )
        return found

    def _sparse(self, spec: ModelSpec) -> list[int]:
        """Layers that read a selection."""
        return [layer for layer in spec.global_layers if layer not in self.dense_layers]

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
        for layer, head in self.full_heads or ():
            if layer in named or layer not in spec.global_layers or not 0 <= head < spec.kv_heads:
                raise SpringtideError(
                    f"tidal: full_heads names KV head {head} of layer {layer}, but only heads 0 to {spec.kv_heads - 1} "
                    f"of layers that are sparse can be named: {', '.join(map(str, self._sparse(spec))) or 'none'}."
                )
        early = [layer for layer in spec.global_layers if layer < min(self.selecting) and layer not in named]
        if early:
            raise SpringtideError(
                f"tidal: layer {early[0]} comes before the first selecting layer {min(self.selecting)}, "
                "so it must be listed in full."
            )

    def new_state(self) -> TidalState:
        return TidalState()

    def resume(self, cache: Cache, prefilling: bool) -> int:
        due = self.correct is not None and (prefilling or cache.length - cache.exact >= self.correct)
        return cache.exact if due else cache.length

    @property
    def most_refreshed(self) -> int:
        return self.correct or 0

    def remembered(self, tokens: int, spec: ModelSpec) -> int:
        return len(self._sparse(spec)) * min(amount(self.means, self.budget_at(tokens)), tokens // STEP)

    @property
    def stepwise(self) -> bool:
        return super().stepwise or self.means not in (0, Share(0))

    def headroom(self, cache: Cache) -> int | None:
        limits = [] if self.correct is None else [self.correct - (cache.length - cache.exact)]
        growth = super().headroom(cache)
        return min([*limits, growth] if growth is not None else limits, default=None)

    def reads(self, layer: Layer, q: Tensor, segment: Segment) -> Slots | None:
        if layer.window is not None or self.exact(segment):
            return None
        state: TidalState = segment.state
        if layer.index in self.dense_layers:
            if layer.index in self.selecting:
                state.selected = self.choose(layer, q, segment)
            return None
        assert state.selected is not None
        index = state.selected if self.map is None else state.selected[:, self.sets[layer.index]]
        return self.sparse(layer, segment, index)

    def sparse(self, layer: Layer, segment: Segment, index: Tensor) -> Slots:
        """What a layer reads for which another one chose the slots ``index [R, H_kv, B]``."""
        means = self.stand_ins(layer, segment)
        return Slots(index, means=means, full_heads=self.dense_heads.get(layer.index, ()))

    def blocks(self, segment: Segment) -> tuple[int, int]:
        """How many blocks are read by their means, and how many tokens each of them has."""
        budget, tokens = self.tokens(segment), STEP
        most = min(amount(self.means, budget), budget - 1)
        while most and segment.prefix // tokens > most:
            tokens *= 2
        return segment.prefix // tokens if most else 0, tokens

    def stand_ins(self, layer: Layer, segment: Segment) -> Means | None:
        """The blocks' means: those that are known already, and those of the committed tokens that came since."""
        count, tokens = self.blocks(segment)
        if count == 0:
            return None
        state: TidalState = segment.state
        known = state.means.get(layer.index)
        if known is not None and known.tokens == tokens and known.count == count:
            return known
        if known is None or known.tokens != tokens:
            means = segment.cache.means(layer.index, 0, count, tokens)
        elif known.count < count:
            means = known.followed_by(segment.cache.means(layer.index, known.count, count, tokens))
        else:
            means = known.cut(count)
        state.means = {**state.means, layer.index: means}  # copies of the state keep their own
        return means

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

    def commit(self, segment: Segment, kept: Sequence[int]) -> None:
        state: TidalState = segment.state
        state.selected = None
        if not segment.decoding:  # whose rows may have replaced others
            state.means = {layer: known.cut(segment.prefix // known.tokens) for layer, known in state.means.items()}

    def best(self, layer: Layer, q: Tensor, segment: Segment) -> Tensor:
        """The slots that each row wants most, ``[R, H_kv, B]``, those that are always kept among them.

        With the means they are as many as the budget says.
        """
        kv = segment.kv(layer.index)
        segment.bytes_read += segment.length * kv.pages.slot_bytes
        budget = self.tokens(segment)
        means, _ = self.blocks(segment)
        return kernels.choose(
            q,
            kv,
            layer.scale,
            budget - means,
            sinks=self.sinks,
            recent=amount(self.recent, budget),
            pool=self.pool,
            heads="all" if self.heads == "all" else "kv",
            softcap=layer.softcap,
        )
