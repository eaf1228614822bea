"""Chooses TidalDecode's layers for a model and writes them beside it.

Two signals, both on text and on questions that need the context. How much attention mass each selection keeps for each
later layer: dynamic programming turns it into candidate layouts. The KL divergence of a layout's predictions from dense
ones: it chooses among the candidates, and then among the neighbours of the best one, as long as trials are left. Of the
questions only the answers' numbers count: nothing but the context tells them, so they show what a layout cannot find.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from springtide import kernels
from springtide.attention.calibration import FILE
from springtide.attention.layout import Layout, best_layouts, neighbours
from springtide.attention.policy import Layer, Policy, dense
from springtide.attention.tidal import Tidal
from springtide.engine.engine import Engine
from springtide.engine.rows import Segment
from springtide.engine.sequence import Sequence as Running
from springtide.errors import SpringtideError
from springtide.evaluation.needle import Haystack, check_fit
from springtide.evaluation.report import write_json

TEXT_ROWS = 128  # tokens at the end of a plain text that are decoded
FACT_SPACING = 256  # tokens of context for each fact in it


@dataclass(frozen=True)
class Probe(Policy):
    """Dense attention that measures, while decoding, how much of each layer's attention an earlier selection holds."""

    name: ClassVar[str] = "probe"

    tidal: Tidal = field(default_factory=Tidal)
    sums: dict[tuple[int, int], float] = field(default_factory=dict, compare=False)
    rows: dict[int, int] = field(default_factory=dict, compare=False)
    _selected: dict[int, Tensor] = field(default_factory=dict, compare=False)

    def attend(self, layer: Layer, q: Tensor, segment: Segment) -> Tensor:
        if segment.decoding and layer.window is None:
            self._measure(layer, q, segment)
        return dense(layer, q, segment)

    def _measure(self, layer: Layer, q: Tensor, segment: Segment) -> None:
        keys, _ = segment.cache.read(layer.index, 0, segment.length)
        logits = kernels.scores(q, keys, layer.scale, layer.softcap)
        mask = segment.seen().mask
        if mask is not None:
            logits = logits.masked_fill(~mask[:, None, None, :], -torch.inf)
        probs = logits.softmax(-1)
        for earlier, index in self._selected.items():
            if earlier < layer.index:
                wide = index[:, :, None, :].expand(-1, -1, probs.shape[2], -1)
                held = probs.gather(3, wide).sum(-1).mean((1, 2)).sum().item()
                self.sums[earlier, layer.index] = self.sums.get((earlier, layer.index), 0.0) + held
        self._selected[layer.index] = self.tidal.best(layer, q, segment)
        self.rows[layer.index] = self.rows.get(layer.index, 0) + segment.rows

    def kept(self, layers: Sequence[int]) -> list[list[float]]:
        """Mean share of attention mass ``[selecting layer][reading layer]``; 0 where none was measured."""
        return [[self.sums.get((s, r), 0.0) / max(1, self.rows.get(r, 0)) for r in layers] for s in layers]


@dataclass(frozen=True)
class Passage:
    """``tokens[:prefill]`` are read densely, which ``reader`` has done; the rest is decoded.

    ``counted [n]`` says which decoded tokens count; ``dense [m, V]`` holds the dense log-probabilities for those.
    """

    tokens: list[int]
    prefill: int
    reader: Running
    counted: Tensor
    dense: Tensor


@dataclass(frozen=True)
class Calibration:
    """The layout chosen, all that were measured with their divergences (nats a token), and what every layer keeps."""

    layout: Layout
    divergence: float
    measured: list[tuple[Layout, float]]
    layers: list[int]
    kept: list[list[float]]

    def as_json(self, tidal: Tidal, length: int) -> dict[str, Any]:
        """The content of ``springtide.json``."""
        return {
            "tidal": {
                "full": list(self.layout.full),
                "select": list(self.layout.select),
                "budget": tidal.budget,
                "length": length,
                "attention_mass_lost": round(self.layout.lost, 4),
                "kl_to_dense": round(self.divergence, 5),
            }
        }


def calibrate(
    engine: Engine, text: str, *, dense_layers: int, tidal: Tidal, length: int, prompts: int, trials: int
) -> Iterator[Calibration | None]:
    """Choose ``dense_layers`` full and selecting layers for ``tidal``'s budget at contexts of ``length`` tokens.

    Yields None after every step, for progress, and the result last. Raises SpringtideError for a text too short or
    a number of layers that the model does not have.
    """
    layers = engine.stack.spec.global_layers
    if len(layers) < 2:
        raise SpringtideError(
            f"The model has {len(layers)} layers without a sliding window, but 2 are needed; use the dense policy."
        )
    if not 1 <= dense_layers < len(layers):
        raise SpringtideError(
            f"{dense_layers} dense layers were asked for, but the model has {len(layers)} layers without a sliding "
            f"window; choose 1 to {len(layers) - 1}."
        )
    if not 1 <= tidal.budget < length:
        raise SpringtideError(f"The budget is {tidal.budget}, but must be at least 1 and below the length, {length}.")
    probe = Probe(tidal=tidal)
    passages = []
    for tokens, prefill, counted in list(_texts(engine, text, length, prompts)):
        passages.append(_passage(engine, probe, tokens, prefill, torch.tensor(counted)))
        yield None
    kept = probe.kept(layers)
    measured: dict[Layout, float] = {}
    for layout in search(kept, layers, dense_layers, trials, measured):
        measured[layout] = divergence(engine, replace(tidal, **layout.options), passages)
        yield None
    ranked = sorted(measured.items(), key=lambda pair: pair[1])
    yield Calibration(*ranked[0], ranked, list(layers), kept)


def search(
    kept: list[list[float]], layers: Sequence[int], dense_layers: int, trials: int, measured: dict[Layout, float]
) -> Iterator[Layout]:
    """Layouts worth measuring, ``trials`` at most; the caller adds each one's divergence to ``measured``.

    First those that lose least attention mass, then neighbours of the best one measured so far, again in that order.
    """
    yield from best_layouts(kept, layers, dense_layers, max(1, trials // 2))
    while len(measured) < trials:
        best = min(measured, key=lambda layout: measured[layout])
        fresh = [layout for layout in neighbours(best, kept, layers) if layout not in measured]
        if not fresh:
            return
        yield min(fresh)


def divergence(engine: Engine, policy: Tidal, passages: Sequence[Passage]) -> float:
    """Mean KL divergence, in nats, of the policy's predictions from dense ones; every passage weighs the same."""
    under = engine.using(policy)
    found = []
    for passage in passages:
        logits = torch.cat(list(under.predictions(passage.tokens, passage.prefill, passage.reader)))
        rows = logits[passage.counted].log_softmax(-1)
        found.append(torch.nn.functional.kl_div(rows, passage.dense, log_target=True, reduction="sum") / len(rows))
    return float(torch.stack(found).mean())


def _passage(engine: Engine, probe: Probe, tokens: list[int], prefill: int, counted: Tensor) -> Passage:
    reader = engine.read(tokens[:prefill])
    logits = torch.cat(list(engine.using(probe).predictions(tokens, prefill, reader)))
    return Passage(tokens, prefill, reader, counted, logits[counted].log_softmax(-1))


def _texts(engine: Engine, text: str, length: int, prompts: int) -> Iterator[tuple[list[int], int, list[bool]]]:
    """For each prompt a context with questions and their answers, and a window of plain text.

    Each with its prefill, and with which of the tokens after that count.
    """
    haystack = Haystack(engine.tokenizer, text, seed=1)
    if length <= TEXT_ROWS:
        raise SpringtideError(f"A length of {length} is too short to calibrate at; use more than {TEXT_ROWS}.")
    if len(haystack.book) < length:
        raise SpringtideError(
            f"The text has {len(haystack.book)} tokens, but the length is {length}; "
            "give a longer text or a shorter length."
        )
    facts = max(1, length // FACT_SPACING)
    for number in range(prompts):
        trial = haystack.trial(length, number, depths=[(i + 0.5) / facts for i in range(facts)])
        asked, numbers = haystack.asked(trial)
        tokens = trial.context + asked
        check_fit(engine, length, len(tokens) + 1)
        yield tokens, len(trial.context), numbers
        start = round(number * (len(haystack.book) - length) / max(1, prompts - 1))
        window = haystack.opening + haystack.book[start : start + length]
        yield window, len(window) - TEXT_ROWS, [True] * TEXT_ROWS


def steps(prompts: int, trials: int) -> int:
    """How many steps :func:`calibrate` takes at most."""
    return 2 * prompts + trials


def write(calibration: dict[str, Any], folder: Path) -> Path:
    """Write ``springtide.json`` into a model folder, whole or not at all."""
    path = folder / FILE
    write_json(path, calibration)
    return path
