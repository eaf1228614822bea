"""Trains Hidden Transfer (Wu et al., arXiv 2404.12022): the target stays frozen and is its own teacher.

A batch is read once without gradients, which gives every layer's input, keys and values. Pseudo rows then run through
the layers above their transfer, behind these keys and values, as they do in decoding; gradients flow through them
alone. Pseudo row ``(n, k)`` learns the distribution that the real row ``n + k`` gives the token after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from springtide.drafting.hidden_transfer import HiddenTransfer
from springtide.model.stack import Stack
from springtide.training.progress import Steps
from springtide.training.trainer import MOST_NORM
from springtide.training.windows import Windows

DECAY = 0.8  # weight of a step's loss, relative to the step before
ANCHORS = 64  # rows of a window that get pseudo rows
GUESSES = 10  # best guesses of a step whose accuracy is measured
BATCH = 8  # windows that are measured at a time
LEARNING_RATE = 1.28  # divided by the hidden size: what a step changes in a product grows with the matrix's width


@dataclass(frozen=True)
class Reading:
    """What the target computes for tokens ``[B, T]``.

    ``inputs [B, T, hidden]``: each layer's, and last the LM head's. ``keys, values [B, H_kv, T, D]``: each layer's.
    """

    inputs: Sequence[Tensor]
    keys: Sequence[Tensor]
    values: Sequence[Tensor]

    @classmethod
    @torch.no_grad()
    def of(cls, model: PreTrainedModel, tokens: Tensor) -> Reading:
        """Read ``tokens [B, T]``, int64, on any device."""
        cache = DynamicCache()
        out = model.model(tokens.to(model.device), past_key_values=cache, use_cache=True, output_hidden_states=True)
        return cls(out.hidden_states, [layer.keys for layer in cache.layers], [layer.values for layer in cache.layers])

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """What rows with these keys and values read at ``layer``: a transformers cache, but for one that keeps none."""
        return torch.cat([self.keys[layer], keys], -2), torch.cat([self.values[layer], values], -2)


class HiddenTransferObjective:
    """K linear maps, identities at first, that learn to transfer hidden states at ``layers`` of a frozen target.

    Attributes:
        weight, bias: ``[K, hidden, hidden]`` and ``[K, hidden]``, fp32.
        accuracy: share of rows where each guess of each step was the target's choice, once :meth:`calibrate` measured.
    """

    name = "hidden-transfer"

    def __init__(self, target: Stack, layers: Sequence[int], anchors: int = ANCHORS) -> None:
        self.target = target
        self.model: PreTrainedModel = target.model.requires_grad_(False)
        self.layers = tuple(layers)
        self.anchors = anchors
        size = target.spec.hidden_size
        self.weight = nn.Parameter(torch.eye(size, device=target.device).repeat(len(layers), 1, 1))
        self.bias = nn.Parameter(torch.zeros(len(layers), size, device=target.device))
        self.accuracy: list[list[float]] | None = None

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": [self.weight, self.bias], "lr": LEARNING_RATE / self.target.spec.hidden_size}]

    def state_dict(self) -> dict[str, Tensor]:
        return {"weight": self.weight.detach(), "bias": self.bias.detach()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            self.weight.copy_(state["weight"])
            self.bias.copy_(state["bias"])

    @property
    def drafter(self) -> HiddenTransfer:
        """The drafter as trained so far."""
        spec = self.target.spec
        return HiddenTransfer(
            self.weight.detach(),
            self.bias.detach(),
            layers=self.layers,
            num_layers=spec.num_layers,
            vocab_size=spec.vocab_size,
            base=self.target.fingerprint,
            accuracy=self.accuracy,
        )

    def save(self, folder: Path) -> None:
        self.drafter.save(folder)

    def loss(self, tokens: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Loss of ``tokens [B, T]`` and, by step, the divergence (nats) and the accuracy of the best 1 and 5 guesses.

        ``sum_k 0.8^k KL(target's || guessed)`` at random rows, for ``k`` from 1.
        """
        return self.loss_of(Reading.of(self.model, tokens), self.random_anchors(tokens.shape[1]))

    def loss_of(self, real: Reading, anchors: Tensor) -> tuple[Tensor, dict[str, float]]:
        """See :meth:`loss`; of rows ``anchors [A]`` of what was read already."""
        guessed, wanted = self.guess(real, anchors), self.teach(real, anchors)
        divergence = F.kl_div(guessed.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="none")
        losses = divergence.sum(-1).mean(dim=(1, 2))
        decay = DECAY ** torch.arange(1, len(losses) + 1, device=losses.device)
        shares = hits(guessed, wanted).cumsum(-1)
        metrics: dict[str, float] = {}
        for step, (loss, share) in enumerate(zip(losses.tolist(), shares.tolist(), strict=True), start=1):
            metrics |= {f"loss_{step}": loss, f"top1_{step}": share[0], f"top5_{step}": share[4]}
        return (decay * losses).sum(), metrics

    @torch.no_grad()
    def calibrate(self, tokens: Tensor) -> list[list[float]]:
        """Measure ``accuracy`` on windows ``[N, T]``, against the target's most probable token, and return it."""
        found = [
            len(part) * hits(self.guess(real, anchors), self.teach(real, anchors))
            for part, real, anchors in self._readings(tokens)
        ]
        self.accuracy = (torch.stack(found).sum(0) / len(tokens)).tolist()
        return self.accuracy

    @torch.no_grad()
    def cosines(self, tokens: Tensor) -> list[dict[str, float]]:
        """Mean cosine of pseudo states ``(n, k)`` with the real ones of row ``n + k``, by depth, in windows ``[N, T]``.

        ``depth``: of the layer whose input it is; that of the LM head counts as one layer more.
        """
        total: dict[tuple[int, int], float] = {}
        for part, real, anchors in self._readings(tokens):
            for depth, states in self.states(real, anchors).items():
                for step, pseudo in enumerate(states.unbind(1), start=1):
                    mean = F.cosine_similarity(pseudo, real.inputs[depth][:, anchors + step], dim=-1).mean()
                    total[step, depth] = total.get((step, depth), 0.0) + len(part) * mean.item()
        return [
            {"step": step, "depth": depth, "cosine": cosine / len(tokens)}
            for (step, depth), cosine in sorted(total.items())
        ]

    def guess(self, real: Reading, anchors: Tensor) -> Tensor:
        """Logits ``[K, B, A, V]`` of the pseudo rows behind rows ``anchors [A]``."""
        final = self.states(real, anchors)[len(self.model.model.layers)]
        return self._decode(final.transpose(0, 1))

    @torch.no_grad()
    def teach(self, real: Reading, anchors: Tensor) -> Tensor:
        """Logits ``[K, B, A, V]`` of the real rows that the pseudo rows behind ``anchors [A]`` stand for."""
        steps = range(1, len(self.layers) + 1)
        return self._decode(torch.stack([real.inputs[-1][:, anchors + step] for step in steps]))

    def states(self, real: Reading, anchors: Tensor) -> dict[int, Tensor]:
        """Hidden states ``[B, k, A, hidden]`` of the pseudo rows behind rows ``anchors [A]``, by depth.

        From the first transfer on: each layer's input, and last the LM head's; ``k`` steps were transferred up to it.
        """
        decoder, states = self.model.model, {}
        pseudo = real.inputs[0].new_empty(len(real.inputs[0]), 0, len(anchors), self.target.spec.hidden_size)
        for index, layer in enumerate(decoder.layers):
            for step in [step for step, at in enumerate(self.layers) if at == index]:
                source = real.inputs[index][:, anchors]
                weight, bias = self.weight[step].to(source.dtype), self.bias[step].to(source.dtype)
                pseudo = torch.cat([pseudo, F.linear(source, weight, bias)[:, None]], dim=1)
            if pseudo.shape[1]:
                states[index] = pseudo
                pseudo = self._layer(layer, index, pseudo, real, anchors)
        states[len(decoder.layers)] = decoder.norm(pseudo)
        return states

    def _layer(self, layer: nn.Module, index: int, pseudo: Tensor, real: Reading, anchors: Tensor) -> Tensor:
        window, kind = self.target.spec.windows[index], self.target.rotary_kinds[index]
        steps, length = pseudo.shape[1], real.keys[index].shape[-2]
        positions = _positions(anchors, steps)
        mask = torch.zeros(len(positions), length + len(positions), dtype=pseudo.dtype, device=pseudo.device)
        out: Tensor = layer(
            pseudo.flatten(1, 2),
            attention_mask=mask.masked_fill_(~visible(anchors, steps, length, window), -torch.inf)[None, None],
            position_embeddings=self.model.model.rotary_emb(pseudo, positions[None], *kind),
            past_key_values=real,
        )
        return out.view_as(pseudo)

    def _decode(self, normed: Tensor) -> Tensor:
        return self.target.scaled(self.model.lm_head(normed))

    def random_anchors(self, length: int) -> Tensor:
        """Rows ``[A]``, ascending, of windows of ``length`` tokens, none too late for a real row of every step."""
        places = torch.randperm(length - len(self.layers))[: self.anchors]
        return places.sort().values.to(self.target.device)

    def _readings(self, tokens: Tensor) -> Iterator[tuple[Tensor, Reading, Tensor]]:
        """Windows, a few at a time, what the target computes for them, and rows that are spread evenly over them."""
        last = tokens.shape[1] - len(self.layers) - 1
        anchors = torch.linspace(0, last, min(self.anchors, last + 1)).long().to(self.target.device)
        for part in torch.split(tokens, BATCH):
            yield part, Reading.of(self.model, part), anchors


@dataclass(frozen=True)
class Swept:
    """``accuracy``: share of rows where each guess of a ``step`` is the target's choice, all transfers at ``layer``."""

    layer: int
    step: int
    accuracy: list[float]

    def top(self, guesses: int) -> float:
        """Share of rows where the target's choice is among the best ``guesses``."""
        return sum(self.accuracy[:guesses])


def sweep(
    target: Stack, layers: Sequence[int], windows: Windows, held: Tensor, *, steps: int, batch: int, ahead: int = 3
) -> Iterator[list[Swept] | None]:
    """Train briefly with all ``ahead`` transfers at one layer, for each of ``layers``, and measure on ``held [N, T]``.

    All learn from the same rows of the same readings. Yields after each of ``steps`` steps and each layer's
    measurement, the last time with the result.
    """
    objectives = [HiddenTransferObjective(target, [layer] * ahead) for layer in layers]
    groups = [group for objective in objectives for group in objective.parameter_groups()]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    progress = Steps(steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: progress.lr_scale)
    torch.manual_seed(0)
    while not progress.done:
        (tokens,) = windows.batch(progress.step, batch, seed=0)
        real, anchors = Reading.of(target.model, tokens), objectives[0].random_anchors(tokens.shape[1])
        for objective in objectives:
            loss, _ = objective.loss_of(real, anchors)
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_([objective.weight, objective.bias], MOST_NORM)
        optimizer.step()
        optimizer.zero_grad()
        progress.step += 1
        schedule.step()
        yield None
    found: list[Swept] = []
    for layer, objective in zip(layers, objectives, strict=True):
        found += [Swept(layer, step, shares) for step, shares in enumerate(objective.calibrate(held), start=1)]
        yield found if layer == layers[-1] else None


def visible(anchors: Tensor, steps: int, length: int, window: int | None) -> Tensor:
    """What pseudo rows see of ``length`` real rows and of each other: bool ``[steps A, length + steps A]``.

    They stand step by step, in each step by rows ``anchors [A]``. Row ``(n, k)`` sees the real rows up to ``n`` and
    ``(n, 1) .. (n, k)``, less those that are ``window`` or more positions before it.
    """
    own, step = anchors.repeat(steps), torch.arange(steps, device=anchors.device).repeat_interleave(len(anchors))
    real = torch.arange(length, device=anchors.device)
    chain = (own[:, None] == own) & (step[:, None] >= step)
    seen = torch.cat([real <= own[:, None], chain], dim=1)
    if window is not None:
        positions = _positions(anchors, steps)
        seen &= positions[:, None] - torch.cat([real, positions]) < window
    return seen


def _positions(anchors: Tensor, steps: int) -> Tensor:
    return torch.cat([anchors + step for step in range(1, steps + 1)])


def hits(guessed: Tensor, wanted: Tensor) -> Tensor:
    """``[K, n]``: the share of rows of logits ``[K, B, A, V]`` where the n-th best guess is the wanted choice."""
    guesses = guessed.detach().topk(min(GUESSES, guessed.shape[-1])).indices
    return (guesses == wanted.argmax(-1, keepdim=True)).double().mean(dim=(1, 2))
