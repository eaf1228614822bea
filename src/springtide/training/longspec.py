"""Trains LongSpec (Yang et al., arXiv 2502.17421): a block that learns to foretell a frozen target.

A batch is read once without gradients, which gives the target's distributions and the keys and values of the layer
that the block reads. In decoding the newest tokens are not in the target's cache yet: the row that guesses the token
``j`` places ahead of the cache sees nothing of its own token there, nor of the ``j - 1`` before it. So it is in
training, with ``j`` drawn for each sample (the paper's flash noisy training).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from springtide.drafting.longspec import WINDOW, Block, LongSpec, Sizes, context_layer
from springtide.errors import SpringtideError
from springtide.model.stack import Stack
from springtide.training.hidden_transfer import GUESSES, hits

Positions = Literal["plain", "anchor", "gaps"]

STEPS = 4  # tokens ahead, by default
ANCHORS = 4  # first positions of a sample, which stay: what is read there is an attention sink
CUTS = 4  # gaps of a sample, at most
ROWS = 2048  # rows of a batch that are learnt from: the logits of all rows of long windows would take too much memory
BATCH = 8  # windows that are measured at a time
LONGEST = 131_072  # positions that samples are moved to, unless more are asked for
LEARNING_RATE = 1.28  # divided by the hidden size: what a step changes in a product grows with the matrix's width
TEMPERATURES = torch.logspace(-1.5, 1.5, 37, base=2)  # that are tried


class OneLayer(DynamicCache):  # type: ignore[misc]
    """A transformers cache that keeps the keys and values of one layer."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer = layer

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if layer == self.layer:
            self.kept = keys, values
        return keys, values


@dataclass(frozen=True)
class Reading:
    """What the target computes for tokens ``[B, T]`` at ``positions [B, T]``.

    ``embedded, normed [B, T, hidden]``: the first layer's input and the LM head's. ``keys, values [B, H_kv, T, D]`` and
    ``cos, sin [B, T, n]``: of the layer that the block reads.
    """

    positions: Tensor
    embedded: Tensor
    normed: Tensor
    keys: Tensor
    values: Tensor
    cos: Tensor
    sin: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, target: Stack, tokens: Tensor, positions: Tensor, dtype: torch.dtype) -> Reading:
        """Read ``tokens [B, T]``, int64, on any device; all but ``normed`` is given in ``dtype``."""
        tokens, positions = tokens.to(target.device), positions.to(target.device)
        layer = context_layer(target)
        cache, decoder = OneLayer(layer), target.model.model
        normed = decoder(tokens, position_ids=positions, past_key_values=cache, use_cache=True).last_hidden_state
        embedded = target.embed(tokens).to(dtype)
        rotary = decoder.rotary_emb(embedded, positions, *target.rotary_kinds[layer])
        return cls(positions, embedded, normed, *(x.to(dtype) for x in (*cache.kept, *rotary)))


class LongSpecObjective:
    """A block of :class:`springtide.drafting.longspec.LongSpec` that learns beside a frozen target.

    Args:
        target: the model, which stays as it is.
        positions: where samples lie. ``"plain"``: from 0 on. ``"anchor"``: all but the first four are moved by one
            random offset (the paper's anchor-offset indices), so that short samples train large positions. ``"gaps"``:
            there are several random gaps in a sample.
        max_length: positions that samples are moved to (default: the model's, 131,072 at most).
        steps: tokens ahead that are to be guessed.
        window: tokens that the self-attention sees.
        start: a drafter to begin with, which says how many steps and what window.

    Attributes:
        block: fp32.
        accuracy: share of rows where each guess of each step was the target's choice, once :meth:`calibrate` measured.
        temperatures: of each step, what makes the block's probabilities those of being right, likewise.

    Raises SpringtideError for a target without a layer to read, or ``max_length`` beyond its context.
    """

    name = "longspec"

    def __init__(
        self,
        target: Stack,
        positions: Positions = "anchor",
        max_length: int | None = None,
        steps: int = STEPS,
        window: int = WINDOW,
        start: LongSpec | None = None,
    ) -> None:
        self.target = target
        self.model: PreTrainedModel = target.model.requires_grad_(False)
        self.layer = context_layer(target)
        self.positions, self.max_length = positions, max_length or default_length(target)
        if self.max_length > target.spec.context_limit:
            raise SpringtideError(
                f"--max-length is {self.max_length}, but the model's context is {target.spec.context_limit} tokens; "
                "use no more than that."
            )
        self.steps, self.window = (steps, window) if start is None else (start.steps, start.window)
        self.block = fresh_block(target) if start is None else Block(start.block.sizes)
        if start is not None:
            self.block.load_state_dict(start.resolve(target).block.state_dict())
        self.block.to(target.device)
        self.trained = 1 if start is None else start.trained
        self.accuracy: list[list[float]] | None = None
        self.temperatures = [1.0] * self.steps

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.block.parameters()), "lr": LEARNING_RATE / self.target.spec.hidden_size}]

    def state_dict(self) -> dict[str, Any]:
        return {"block": self.block.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.block.load_state_dict(state["block"])

    @property
    def drafter(self) -> LongSpec:
        """The drafter as trained so far."""
        return LongSpec(
            self.block,
            vocab_size=self.target.spec.vocab_size,
            base=self.target.fingerprint,
            window=self.window,
            trained=max(self.trained, self.max_length),
            temperatures=tuple(self.temperatures),
            accuracy=self.accuracy,
        )

    def save(self, folder: Path) -> None:
        self.drafter.save(folder)

    def loss(self, tokens: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Loss of ``tokens [B, T]`` and, by step, the divergence (nats) and the accuracy of the best 1 and 5 guesses.

        ``KL(target's || guessed)`` of the next token at random rows, which is the cross-entropy of soft labels less the
        target's own. Each sample is of one step; a step that no sample is of has no figures.
        """
        samples, length = tokens.shape
        real = self.read(tokens, placed(samples, length, max(self.max_length, length), self.positions))
        rows = torch.randperm(length - self.steps)[: max(1, ROWS // samples)].sort().values + self.steps
        return self.loss_of(real, rows.to(self.target.device), torch.randint(1, self.steps + 1, (samples,)))

    def loss_of(self, real: Reading, rows: Tensor, steps: Tensor) -> tuple[Tensor, dict[str, float]]:
        """See :meth:`loss`; at rows ``[A]`` of what was read already, each sample guessing its own of ``steps [B]``."""
        guessed, wanted = self.guess(real, rows, steps), self.teach(real, rows)
        divergence = F.kl_div(guessed.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="none")
        losses = divergence.sum(-1).mean(1)
        metrics: dict[str, float] = {}
        for step in sorted(set(steps.tolist())):
            mine = (steps == step).to(losses.device)
            share = hits(guessed[None, mine], wanted[None, mine])[0].cumsum(-1).tolist()
            metrics |= {f"loss_{step}": losses[mine].mean().item(), f"top1_{step}": share[0], f"top5_{step}": share[4]}
        return losses.mean(), metrics

    @torch.no_grad()
    def calibrate(self, tokens: Tensor) -> None:
        """Measure ``accuracy`` and ``temperatures`` on windows ``[N, T]``, by the target's most probable tokens."""
        found = torch.zeros(self.steps, GUESSES, dtype=torch.float64)
        surprise = torch.zeros(self.steps, len(TEMPERATURES), dtype=torch.float64)
        for part, real, rows in self._readings(tokens):
            wanted = self.teach(real, rows)
            choices = wanted.argmax(-1).flatten()
            for step in range(self.steps):
                guessed = self.guess(real, rows, torch.full((len(part),), step + 1))
                found[step] += len(part) / len(tokens) * hits(guessed[None], wanted[None])[0].cpu()
                flat = guessed.flatten(0, 1)
                tried = [F.cross_entropy(flat / temperature, choices) for temperature in TEMPERATURES.tolist()]
                surprise[step] += len(part) * torch.stack(tried).cpu()
        self.accuracy = found.tolist()
        self.temperatures = TEMPERATURES[surprise.argmin(-1)].tolist()

    def read(self, tokens: Tensor, positions: Tensor) -> Reading:
        """What the target computes for ``tokens [B, T]`` at ``positions [B, T]``."""
        return Reading.of(self.target, tokens, positions, self.block.q.weight.dtype)

    def guess(self, real: Reading, rows: Tensor, steps: Tensor) -> Tensor:
        """Logits ``[B, A, V]`` at rows ``[A]``, each sample's so many ``steps [B]`` ahead.

        One step ahead a row sees all slots before its own, and so on; rows from ``max(steps)`` on see one at least.
        """
        slots = torch.arange(real.positions.shape[1], device=rows.device)
        before = rows[:, None] - slots  # [A, T]
        near = (before >= 0) & (before < self.window)
        cached = before >= steps.to(rows.device)[:, None, None, None]
        q, keys, values = self.block.project(real.embedded, real.positions)
        attended = _attend(q[:, rows].transpose(1, 2), keys, values, near)

        def cross(q: Tensor) -> Tensor:
            turned = self.target.turned(self.layer, q.transpose(1, 2), real.cos[:, rows], real.sin[:, rows])
            return _attend(turned, real.keys, real.values, cached)

        return self._decode(self.block(real.embedded[:, rows], attended, cross))

    @torch.no_grad()
    def teach(self, real: Reading, rows: Tensor) -> Tensor:
        """The target's logits ``[B, A, V]`` at rows ``[A]``."""
        return self._decode(real.normed[:, rows])

    def _decode(self, normed: Tensor) -> Tensor:
        return self.target.scaled(self.model.lm_head(normed.to(self.model.dtype)))

    def _readings(self, tokens: Tensor) -> Iterator[tuple[Tensor, Reading, Tensor]]:
        """Windows, a few at a time, what the target computes for them, and rows that are spread evenly over them."""
        length = tokens.shape[1]
        count = min(length - self.steps, ROWS // BATCH)
        rows = torch.linspace(self.steps, length - 1, count).long().to(self.target.device)
        for part in torch.split(tokens, BATCH):
            yield part, self.read(part, placed(len(part), length, length, "plain")), rows


def _attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Attention ``[B, n, H, D]`` of queries ``[B, H, n, D]``."""
    return F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True).transpose(1, 2)


def placed(samples: int, length: int, longest: int, kind: Positions) -> Tensor:
    """Positions ``[samples, length]`` below ``longest``, ascending, drawn at random; see :class:`LongSpecObjective`."""
    positions = torch.arange(length).expand(samples, -1)
    if kind == "plain":
        return positions
    cuts = 1 if kind == "anchor" else CUTS
    offsets = torch.randint(longest - length + 1, (samples, cuts)).sort(1).values
    places = torch.full((samples, 1), ANCHORS)
    if kind == "gaps":
        places = torch.randint(1, length, (samples, cuts)).sort(1).values
    wider = offsets.diff(dim=1, prepend=torch.zeros(samples, 1, dtype=torch.int64))
    return positions + (wider[..., None] * (positions[:, None] >= places[..., None])).sum(1)


def default_length(target: Stack) -> int:
    """The positions of the target whose rotary frequencies are the same, as far as it is trained."""
    return min(target.spec.rope.trained or LONGEST, target.spec.context_limit, LONGEST)


def fresh_block(target: Stack) -> Block:
    """A block in fp32 that adds nothing to a token's embedding yet, with the target's last norm."""
    spec, config = target.spec, target.model.config
    sizes = Sizes(
        spec.hidden_size, config.num_attention_heads, spec.kv_heads, spec.head_dim, int(config.intermediate_size)
    )
    block = Block(sizes)
    for layer in (block.q, block.k, block.v, block.cross_q, block.gate, block.up):
        nn.init.normal_(layer.weight, std=spec.hidden_size**-0.5)
    for layer in (block.o, block.cross_o, block.down):
        nn.init.zeros_(layer.weight)
    with torch.no_grad():
        block.norm.weight.copy_(norm_weight(target))
    return block


@torch.no_grad()
def norm_weight(target: Stack) -> Tensor:
    """What the target's last norm multiplies dimensions by, ``[hidden]``, fp32, whichever form it has."""
    signs = torch.ones(1, target.spec.hidden_size, device=target.device, dtype=target.model.dtype)
    signs[:, 1::2] = -1  # of length 1 a dimension, and of mean 0
    weight = (target.norm(signs) - target.norm(-signs)) / (2 * signs)
    return weight[0].float().cpu()
