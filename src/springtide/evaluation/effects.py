"""What reading a selection instead of everything does to a model's predictions, for all pairs of layers at once.

A sparse layer's attention output is off by some ``delta``. With ``g`` the gradient, with respect to that output, of the
log-probability of a token drawn from the model's own predictions, the divergence of the predictions is to second order
``KL = E[(sum over sparse layers of g . delta)^2] / 2`` (the Fisher information along ``delta``). The gradients are
those of a dense pass. ``g . delta`` of every pair of a selecting and a reading layer, the *effects*, then predict the
divergence of every layout without running it.

A divergence has no sign. Whether right answers become less or more probable has one, and adds up over heads: with the
gradient of that probability instead, ``g . delta`` are the *gains*.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import one_hot, pad

from springtide.attention.policy import Layer, Policy, gathered
from springtide.attention.tidal import Tidal
from springtide.model.stack import Pass, Stack
from springtide.rows.cache import Cache
from springtide.rows.segment import PREFIX, Segment

SAMPLES = 8  # predictions drawn for each gradient's mean
TEMPERATURE = 0.5  # at which answers are drawn: near enough to 0 to tell which is first, far enough to have a gradient


class Behind(Cache):
    """What is written to it follows the rows of another cache, which stays as it is; gradients flow through it."""

    def __init__(self, before: Cache) -> None:
        super().__init__(before.pool)
        self.follow(before, before.length)
        self.before = before
        self.rows: dict[int, tuple[Tensor, Tensor]] = {}

    def write(self, layer: int, start: int, keys: Tensor, values: Tensor) -> None:
        """Store rows ``[H_kv, n, D]`` behind the first ``start`` of the other cache."""
        super().write(layer, start, keys.detach(), values.detach())
        old = self.before.read(layer, 0, start)
        self.rows[layer] = (torch.cat([old[0], keys], 1), torch.cat([old[1], values], 1))

    def read(self, layer: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys and values ``[H_kv, stop - start, D]`` of those slots."""
        keys, values = self.rows[layer]
        return keys[:, start:stop], values[:, start:stop]


class Attention(Function):
    """:func:`springtide.kernels.reference.attend`, with gradients; those of keys and values for the last R slots alone.

    The slots before are a context, which no gradient is asked for. Torch's own backward pass through products and a
    softmax takes four times as long on a CPU, that of its fused attention ten times.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float | None
    ) -> Tensor:
        folded = _by_kv_head(q, len(k))
        logits = folded @ k.transpose(1, 2)
        logits = (logits if logits.dtype.itemsize > 4 else logits.float()) * scale
        slope: float | Tensor = scale
        if softcap is not None:
            capped = (logits / softcap).tanh_()
            logits, slope = capped * softcap, (1 - capped.square_()).mul_(scale).to(q.dtype)
        if mask is not None:
            logits.view(len(k), len(q), -1, k.shape[1]).masked_fill_(~mask[:, None], -torch.inf)
        probs = logits.softmax(-1).to(v.dtype)
        out = probs @ v
        ctx.slope = slope
        ctx.save_for_backward(folded, k, v, probs, out)
        return _by_row(out, len(q))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        folded, k, v, probs, out = ctx.saved_tensors
        rows = len(gradients[0])
        gradient = _by_kv_head(gradients[0], len(k))
        offset = -(gradient * out).sum(-1, keepdim=True)
        change = torch.baddbmm(offset, gradient, v.transpose(1, 2)).mul_(probs).mul_(ctx.slope)
        before = k.shape[1] - rows
        of_keys, of_values = (
            pad(own[..., before:].transpose(1, 2) @ other, (0, 0, before, 0))
            for own, other in ((change, folded), (probs, gradient))
        )
        return _by_row(change @ k, rows), of_keys, of_values, None, None, None


def _by_kv_head(q: Tensor, kv_heads: int) -> Tensor:
    """``[R, H, D]`` as ``[H_kv, R * H / H_kv, D]``."""
    rows, heads, head_dim = q.shape
    return q.reshape(rows, kv_heads, heads // kv_heads, head_dim).transpose(0, 1).flatten(1, 2)


def _by_row(x: Tensor, rows: int) -> Tensor:
    """``[H_kv, R * H / H_kv, D]`` as ``[R, H, D]``."""
    return x.view(len(x), rows, -1, x.shape[2]).transpose(0, 1).flatten(1, 2)


class Recorder(Pass):
    """A pass of one segment with dense attention that gradients can flow through.

    It keeps by layer what it was asked, what it answered, and what ``tidal`` would select.
    """

    def __init__(self, stack: Stack, segment: Segment, tidal: Tidal) -> None:
        super().__init__(stack, [segment])
        self.segment, self.tidal = segment, tidal
        self.queries: dict[int, tuple[Layer, Tensor]] = {}
        self.outputs: dict[int, Tensor] = {}
        self.selected: dict[int, Tensor] = {}

    def attend(self, layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        segment = self.segment
        segment.cache.write(layer.index, segment.prefix, k, v)
        keys, values = segment.cache.read(layer.index, 0, segment.length)
        mask = segment.seen(layer.window).mask
        out: Tensor = Attention.apply(  # type: ignore[no-untyped-call]
            q, keys, values, mask, layer.scale, layer.softcap
        )
        if layer.window is None:
            self.queries[layer.index] = layer, q.detach()
            self.outputs[layer.index] = out
            with torch.no_grad():
                self.selected[layer.index] = self.tidal.best(layer, q.detach(), segment)
        return out


@dataclass(frozen=True)
class Branches:
    """Texts that go on from one context side by side: rows whose parents form a tree.

    Attributes:
        tokens, parents: of the rows, as in :class:`springtide.rows.segment.Segment`.
        chain: which text each row belongs to, the first of those that share it.
        counted: rows whose predictions count, int64.
        answers: the token that truly follows each of them.
    """

    tokens: list[int]
    parents: list[int]
    chain: Tensor
    counted: Tensor
    answers: Tensor

    @classmethod
    def of(cls, texts: Sequence[tuple[list[int], int]], joined: bool = False) -> Branches:
        """Texts as tokens and how many of the last of them are to be predicted; the last one is no row.

        ``joined``: texts that begin alike share rows, as far as nothing is predicted.
        """
        shared: dict[tuple[int, int], int] = {}
        tokens: list[int] = []
        parents, chain, counted, answers = [], [], [], []
        for number, (text, predicted) in enumerate(texts):
            parent = PREFIX
            for place, token in enumerate(text[:-1]):
                known = shared.get((parent, token))
                if joined and known is not None and place + 1 < len(text) - predicted:
                    parent = known
                    continue
                shared[parent, token] = len(tokens)
                parents.append(parent)
                parent = len(tokens)
                tokens.append(token)
                chain.append(number)
                if place + 1 >= len(text) - predicted:
                    counted.append(parent)
                    answers.append(text[place + 1])
        return cls(tokens, parents, *(torch.tensor(x) for x in (chain, counted, answers)))

    def segment(self, cache: Cache, policy: Policy, device: torch.device) -> Segment:
        """The rows behind what ``cache`` holds, decoded."""
        state = policy.new_state()
        return Segment(cache, cache.length, self.tokens, self.parents, "decode", policy, state, device=device)

    def chances(self, predicted: Tensor) -> Tensor:
        """With what probability each text is drawn at ``TEMPERATURE``: ``[texts]``, from ``predicted [counted, V]``."""
        logs = (predicted.float() / TEMPERATURE).log_softmax(-1)
        right = logs.gather(1, self.answers.to(logs.device)[:, None])[:, 0]
        chain = self.chain[self.counted].to(logs.device)
        return right.new_zeros(int(self.chain.max()) + 1).index_add(0, chain, right).exp()


@dataclass(frozen=True)
class Recording:
    """A dense pass over ``rows`` and gradients with respect to what its layers' attention gave.

    ``gradients [SAMPLES + 1, R, H_kv, H / H_kv * D]`` by layer, fp32, the last of them that of the texts' chances;
    ``member [R, texts]`` says which text a row is of; ``weight [texts]`` makes squares of effects sum up to nats.
    """

    segment: Segment
    recorder: Recorder
    gradients: dict[int, Tensor]
    member: Tensor
    weight: Tensor

    @classmethod
    def of(cls, stack: Stack, cache: Cache, rows: Branches, tidal: Tidal, generator: torch.Generator) -> Recording:
        """Run ``rows`` behind what ``cache`` holds, which stays as it is; ``generator`` draws predictions."""
        segment = rows.segment(Behind(cache), tidal, stack.device)
        recorder = Recorder(stack, segment, tidal)
        drawn: list[tuple[Tensor, ...]] = []
        with torch.enable_grad():
            hidden = recorder.run(recorder.embed().clone().requires_grad_(), 0, stack.spec.num_layers)
            predicted = stack.predict(stack.norm(hidden[rows.counted.to(stack.device)])).log_softmax(-1)
            outputs = list(recorder.outputs.values())
            probs = predicted.detach().exp().cpu()
            tokens = torch.multinomial(probs, SAMPLES, replacement=True, generator=generator).to(stack.device)
            for sample in range(SAMPLES):
                total = predicted.gather(1, tokens[:, sample : sample + 1]).sum()
                drawn.append(torch.autograd.grad(total, outputs, retain_graph=True))
            drawn.append(torch.autograd.grad(rows.chances(predicted).sum(), outputs))
        kv_heads = segment.cache.read(0, 0, 1)[0].shape[0]
        by_layer = zip(recorder.outputs, zip(*drawn, strict=True), strict=True)
        gradients = {layer: torch.stack(own).float() for layer, own in by_layer}
        gradients = {layer: own.reshape(*own.shape[:2], kv_heads, -1) for layer, own in gradients.items()}
        member = one_hot(rows.chain).float()
        weight = (0.5 / SAMPLES / member.shape[1] / member[rows.counted].sum(0)).sqrt()
        return cls(segment, recorder, gradients, member.to(stack.device), weight)

    @property
    def layers(self) -> list[int]:
        """Layers without a sliding window."""
        return list(self.recorder.outputs)

    def effects(self) -> tuple[Tensor, Tensor]:
        """``g . delta`` of every pair of ``layers``, fp32.

        Effects ``[SAMPLES * texts, selecting, reading, KV head]``: the sum over sparse layers and their heads, squared
        and summed over the first dimension, predicts the mean divergence of a counted token from its dense prediction,
        in nats. Gains ``[texts, selecting, reading, KV head]``: the sum predicts how much more probable a text becomes.
        """
        found = torch.stack(
            [
                torch.stack([self._effect(to, self.recorder.selected[by], by < to) for to in self.layers], 2)
                for by in self.layers
            ],
            2,
        )
        return self._weighted(found), found[-1]

    def by_set(self, selecting: int, reading: int) -> Tensor:
        """Effects of one pair: ``[SAMPLES * texts, set, KV head]``, each head reading each KV head's set."""
        index = self.recorder.selected[selecting]
        sets = range(index.shape[1])
        return self._weighted(
            torch.stack([self._effect(reading, index[:, i : i + 1].expand_as(index)) for i in sets], 2)
        )

    def _weighted(self, found: Tensor) -> Tensor:
        weight = self.weight.view(-1, *[1] * (found.dim() - 2))
        return (found[:-1] * weight).flatten(0, 1)

    @torch.no_grad()
    def _effect(self, reading: int, index: Tensor, valid: bool = True) -> Tensor:
        """``[SAMPLES + 1, texts, KV head]`` of a layer's reading ``index [R, H_kv, B]``; 0 if that is not ``valid``."""
        layer, q = self.recorder.queries[reading]
        gradient = self.gradients[reading]
        if not valid:
            return torch.zeros(len(gradient), self.member.shape[1], gradient.shape[2])
        sparse = gathered(layer, q, self.segment, self.recorder.tidal.sparse(layer, self.segment, index.contiguous()))
        delta = (sparse.float() - self.recorder.outputs[reading].detach().float()).reshape(gradient.shape[1:])
        return torch.einsum("srkd,rkd,rt->stk", gradient, delta, self.member).cpu()
