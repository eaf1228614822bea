"""A Hugging Face causal model as a stack of layers that rows run through, enterable at any layer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib import import_module
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import AttentionInterface

from springtide import kernels
from springtide.attention.policy import Layer, Policy, State, gathered
from springtide.drafting.drafter import Drafter
from springtide.errors import SpringtideError
from springtide.kernels import KV, PAGE, Reads, native
from springtide.model.architecture import Architecture
from springtide.model.fused import FusedLayer, hooked
from springtide.rows.cache import Cache
from springtide.rows.pool import Pool
from springtide.rows.segment import Segment
from springtide.rows.spec import ModelSpec

ATTENTION = "springtide"
LOCKS: WeakKeyDictionary[PreTrainedModel, Lock] = WeakKeyDictionary()  # one for each model, whose stacks may be many


def fingerprint(model: PreTrainedModel) -> str:
    """Tells models apart: of the embedding's first rows and the last norm, in bf16, whatever dtype they are in.

    Raises SpringtideError for an unsupported architecture.
    """
    Architecture.of(model.config.model_type)  # others may have no such parts
    weights = (model.model.embed_tokens.weight[:64], model.model.norm.weight)
    data = torch.cat([weight.detach().bfloat16().flatten() for weight in weights]).view(torch.int16).cpu()
    return hashlib.sha256(data.numpy().tobytes()).hexdigest()[:16]


class Stack:
    """Runs rows through the layers of a model, whose weights and configuration it leaves as they are.

    Attributes:
        rotary_kinds: what each layer's rotary embedding depends on beside positions: its type, or nothing.
    """

    def __init__(self, model: PreTrainedModel, calibration: dict[str, Any] | None = None) -> None:
        config = model.config
        self.architecture = Architecture.of(config.model_type)
        self.model = model.eval()
        self.spec = ModelSpec.of(config, calibration, reread=self.architecture.reread)
        for parameter in model.parameters():
            native.huge_pages(parameter, now=True)
        fused = self.architecture.fused and native.level() is not None
        self.fused = [FusedLayer(layer) if fused else None for layer in model.model.layers]
        by_type, layers = self.architecture.rotary_by_layer_type, range(self.spec.num_layers)
        self.rotary_kinds = [(config.layer_types[layer],) if by_type else () for layer in layers]
        self.pool = Pool(self.spec.windows)
        self._routed: list[str | None] = []  # where the layers' attention goes otherwise, while it is routed here

    @property
    def device(self) -> torch.device:
        weight: Tensor = self.model.model.embed_tokens.weight
        return weight.device

    @property
    def page_bytes(self) -> dict[int | None, int]:
        """Bytes of a page of the cache, by the sliding window of the layers that it is of."""
        sizes = {window: len(group.places) * PAGE * self.slot_bytes for window, group in self.pool.groups.items()}
        return {window: group.page_bytes or sizes[window] for window, group in self.pool.groups.items()}

    @property
    def slot_bytes(self) -> int:
        """Bytes of a token's keys and values in one layer."""
        bytes_of_each: int = self.model.dtype.itemsize
        return 2 * self.spec.kv_heads * self.spec.head_dim * bytes_of_each

    def new_cache(self) -> Cache:
        return Cache(self.pool)

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.model)

    @torch.inference_mode()
    def forward(self, segments: Sequence[Segment]) -> list[Tensor]:
        """Final hidden states ``[rows, hidden]`` of each segment, whose keys and values are written to their caches.

        Those of rows that drafters added in mid-pass come after those of the rows that were planned.
        """
        step = Pass(self, segments)
        hidden, start = step.embed(), 0
        for layer, drafter, number in _growths(segments):
            hidden = step.grow(step.run(hidden, start, layer), drafter, number)
            start = layer
        return step.split(step.run(hidden, start, self.spec.num_layers))

    def peek(
        self,
        cache: Cache,
        policy: Policy,
        tokens: Sequence[int],
        parents: Sequence[int],
        asked: Tensor | None = None,
        state: State | None = None,
    ) -> Tensor:
        """Logits ``[n, V]`` at decoded rows behind what ``cache`` holds, none of which stays there.

        ``parents`` are those of the rows, as in :class:`springtide.rows.segment.Segment`; ``asked`` the rows that
        logits are wanted of, int64 (default: all). ``state`` is what the policy remembers of the sequence (default:
        nothing yet), and keeps what this pass adds.
        """
        state = policy.new_state() if state is None else state
        rows = list(tokens), list(parents)
        segment = Segment(cache, cache.length, *rows, "decode", policy, state, device=self.device)
        (hidden,) = self.forward([segment])
        policy.commit(segment, [])
        return self.logits(hidden if asked is None else hidden[asked.to(self.device)])

    def read(self, tokens: Sequence[int]) -> Cache:
        """A cache that holds ``tokens``, computed densely in one pass."""
        cache = self.new_cache()
        self.forward([Segment.chain(cache, 0, tokens, "prompt", Policy(), device=self.device)])
        cache.commit(0, range(len(tokens)), exact=True)
        return cache

    def layer(self, index: int, hidden: Tensor, embeddings: tuple[Tensor, Tensor], step: Pass) -> Tensor:
        """Output of one layer for ``hidden [R, hidden]``; ``embeddings``: what :meth:`rotary` gives for the layer."""
        layer, fused = self.model.model.layers[index], self.fused[index]
        if fused is None or not fused.takes(layer, hidden):
            self._route()
            out: Tensor = layer(hidden[None], attention_mask=None, position_embeddings=embeddings, springtide=step)
            return out[0]
        cos, sin = embeddings
        q, k, v = fused.before(hidden, cos[0], sin[0])
        return fused.after(
            hidden, step.attend(Layer(index, layer.self_attn.scaling, None, self.spec.windows[index]), q, k, v)
        )

    def embed(self, ids: Tensor) -> Tensor:
        """Input of layer 0, ``[..., hidden]``, for token ids, int64."""
        vectors: Tensor = self.model.model.embed_tokens(ids)
        return self.architecture.embeds(vectors, self.model.config)

    def norm(self, hidden: Tensor) -> Tensor:
        """What the LM head reads, ``[R, hidden]``, from the output of the last layer."""
        normed: Tensor = self.model.model.norm(hidden)
        return normed

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits ``[R, V]``, fp32 or wider, from the output of the last layer."""
        return self.head(self.norm(hidden))

    @torch.inference_mode()
    def head(self, normed: Tensor) -> Tensor:
        """Next-token logits ``[R, V]``, fp32 or wider, from what the LM head reads."""
        return self.predict(normed)

    def predict(self, normed: Tensor) -> Tensor:
        """:meth:`head`, for gradients to flow through."""
        return self.scaled(self._head(normed))

    def scaled(self, logits: Tensor) -> Tensor:
        """Next-token logits, fp32 or wider, from the LM head's product."""
        logits = self.architecture.logits(logits, self.model.config)
        return logits if logits.dtype == torch.float64 else logits.float()

    def _head(self, hidden: Tensor) -> Tensor:
        head = self.model.lm_head
        plain = type(head) is nn.Linear and not hidden.requires_grad and not hooked(head)
        level = native.of(hidden, head.weight) if plain else None
        if level is None or len(hidden) > native.most_rows(level, hidden.dtype):
            logits: Tensor = head(hidden)
            return logits
        return native.linear(level, hidden, head.weight, head.bias)

    def rotary(self, hidden: Tensor, segments: Sequence[Segment]) -> list[tuple[Tensor, Tensor]]:
        """Cosines and sines of the rows' positions, for each layer."""
        places = [place for s in segments for place in s.positions]
        reaches = [reach for s in segments for reach in s.reaches] if self.spec.rope.trained else places
        known = {kind: self._rotary(hidden, places, reaches, *kind) for kind in set(self.rotary_kinds)}
        return [known[kind] for kind in self.rotary_kinds]

    def _rotary(
        self, hidden: Tensor, places: Sequence[int], reaches: Sequence[int], *kind: str
    ) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[1, R, D]`` of rows at ``places``, with the frequencies for sequences that long."""
        rotary, rope = self.model.model.rotary_emb, self.spec.rope
        positions = torch.tensor([places], device=self.device)
        if not rope.trained:
            cos, sin = rotary(hidden, positions, *kind)
            return cos, sin
        lengths = [rope.shortest(reach) for reach in reaches]
        order, parts = list[int](), list[Tensor]()
        for length in set(lengths):
            rows = [row for row, own in enumerate(lengths) if own == length]
            rotary(hidden, torch.zeros_like(positions[:, :1]), *kind)  # else it keeps those of the longest that it saw
            last = positions.new_full((1, 1), max(length - 1, 0))  # its largest position tells it the length
            parts.append(torch.cat(rotary(hidden, torch.cat([positions[:, rows], last], 1), *kind))[:, :-1])
            order += rows
        cos, sin = torch.cat(parts, 1)[:, torch.tensor(order).argsort(), None].transpose(1, 2)
        return cos, sin

    def rotate(self, layer: int, q: Tensor, positions: Sequence[int]) -> Tensor:
        """Queries ``[R, H, D]`` as a layer turns them at ``positions``, each the last of its sequence."""
        with self.passing():
            cos, sin = self._rotary(q, positions, [place + 1 for place in positions], *self.rotary_kinds[layer])
        return self.turned(layer, q.transpose(0, 1)[None], cos, sin)[0].transpose(0, 1)

    def turned(self, layer: int, q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Queries ``[B, H, R, D]`` as a layer turns them by ``cos, sin [B, R, n]``: not at all, where it has none."""
        attention = self.model.model.layers[layer].self_attn
        if not self.architecture.rotates(attention):
            return q
        turned: Tensor = import_module(type(attention).__module__).apply_rotary_pos_emb(q, q, cos, sin)[0]
        return turned

    @contextmanager
    def passing(self) -> Iterator[None]:
        """While a pass runs: the model is the user's again when it is over.

        One thread at a time: others that have passes of the model to run wait.
        """
        with LOCKS.setdefault(self.model, Lock()):
            try:
                yield
            finally:
                if self._routed:
                    (self.model.config._attn_implementation,) = self._routed
                    self._routed.clear()

    def _route(self) -> None:
        """Route the layers' attention to :func:`attention` until the pass is over."""
        if not self._routed:  # to look at the configuration takes long
            self._routed.append(self.model.config._attn_implementation)
            self.model.config._attn_implementation = ATTENTION


class Pass:
    """One forward pass: the rows of ``segments`` side by side, each attending by its own policy."""

    def __init__(self, stack: Stack, segments: Sequence[Segment]) -> None:
        if any(segment.cache.pool is not segments[0].cache.pool for segment in segments):
            raise SpringtideError("The caches of a pass must be of one pool; make them with the same model.")
        self.stack = stack
        self.segments = segments
        self._reads: dict[Any, Reads] = {}  # none before the caches have room for the rows
        self._observed = [
            place for place, segment in enumerate(segments) if segment.drafter is not None and segment.drafter.observes
        ]

    def embed(self) -> Tensor:
        """Input of layer 0, ``[R, hidden]``."""
        ids = torch.tensor([token for s in self.segments for token in s.tokens], device=self.stack.device)
        hidden = self.stack.embed(ids.clamp(min=0))  # NO_TOKEN has no vector of its own
        if all(segment.embeds is None for segment in self.segments):
            return hidden
        return torch.cat([_given(s, own) for s, own in zip(self.segments, self.split(hidden), strict=True)])

    def run(self, hidden: Tensor, start: int, stop: int) -> Tensor:
        """Take ``hidden [R, hidden]``, the input of layer ``start``, through layers ``start .. stop - 1``."""
        if start == stop:
            return hidden
        stack = self.stack
        with stack.passing():
            rotary = stack.rotary(hidden[None], self.segments)
            for index in range(start, stop):
                hidden = stack.layer(index, hidden, rotary[index], self)
        return hidden

    def attend(self, layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention ``[R, H, D]`` of all rows; their keys and values ``[H_kv, R, D]`` are written to the caches.

        Rows that read everything do so in one call, in which pages that requests share are read once.
        """
        segments = self.segments
        if not self._reads:
            for segment in segments:
                segment.cache.reserve(segment.prefix, segment.length, k)
        everyone = tuple(range(len(segments)))
        kernels.write(self._kv(layer, everyone), k, v)
        rows = self.split(q)
        for place in self._observed:
            segments[place].queries[layer.index] = layer, rows[place]
        slots = [segment.policy.reads(layer, own, segment) for segment, own in zip(segments, rows, strict=True)]
        dense = tuple(place for place in everyone if slots[place] is None)
        outputs = list(rows)
        if dense:
            queries = q if dense == everyone else torch.cat([rows[place] for place in dense])
            kv = self._kv(layer, dense)
            for place, count in zip(dense, kernels.bytes_read(queries, kv), strict=True):
                segments[place].bytes_read += count
            out, _ = kernels.attend(queries, kv, layer.scale, layer.softcap, lse=False)
            if dense == everyone:
                return out
            for place, own in zip(dense, torch.split(out, [segments[place].rows for place in dense]), strict=True):
                outputs[place] = own
        for place, own in enumerate(slots):
            if own is not None:
                outputs[place] = gathered(layer, rows[place], segments[place], own)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _kv(self, layer: Layer, places: tuple[int, ...]) -> KV:
        """A layer's keys and values, as the rows of the segments at ``places`` read them side by side."""
        known = self._reads.get((places, layer.window))
        if known is None:
            parts = [self.segments[place].reads(layer.window) for place in places]
            known = self._reads[places, layer.window] = Reads.joined(parts)
        return KV(self.segments[0].cache.pages(layer.index), known)

    def split(self, hidden: Tensor) -> list[Tensor]:
        """Each segment's rows of ``hidden [R, ...]``."""
        if len(self.segments) == 1:
            return [hidden]
        return list(torch.split(hidden, [segment.rows for segment in self.segments]))

    def grow(self, hidden: Tensor, drafter: Drafter, number: int) -> Tensor:
        """``hidden`` with the rows that ``drafter`` adds to its segments the ``number``-th time, behind their own."""
        parts = self.split(hidden)
        mine = [place for place, segment in enumerate(self.segments) if segment.drafter is drafter]
        segments = [self.segments[place] for place in mine]
        for place, growth in zip(mine, drafter.grow(number, segments, [parts[place] for place in mine]), strict=True):
            segment = self.segments[place]
            segment.grow(growth.parents)
            self._reads.clear()
            segment.policy.grown(segment, growth.origins)
            parts[place] = torch.cat([parts[place], growth.rows])
        return torch.cat(parts)


def _given(segment: Segment, hidden: Tensor) -> Tensor:
    """A segment's input of layer 0, ``[rows, hidden]``: vectors that its prompt gives in place of tokens' own."""
    if segment.embeds is None:
        return hidden
    given = segment.embeds.vectors[segment.prefix : segment.prefix + len(hidden)]
    return torch.cat([given.to(hidden), hidden[len(given) :]])


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    springtide: Pass,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in place of its own attention: ``query [1, H, R, D]``, ``key, value [1, H_kv, R, D]``.

    Returns ``[1, R, H, D]``, see :meth:`Pass.attend`.
    """
    layer = Layer(module.layer_idx, scaling, softcap, springtide.stack.spec.windows[module.layer_idx])
    return springtide.attend(layer, query[0].transpose(0, 1), key[0], value[0])[None], None


def _growths(segments: Sequence[Segment]) -> list[tuple[int, Drafter, int]]:
    """Where rows are added in mid-pass, in order: before which layer, by which drafter, and its how manieth time."""
    drafters = {id(segment.drafter): segment.drafter for segment in segments if segment.drafter is not None}
    found = [(layer, drafter, n) for drafter in drafters.values() for n, layer in enumerate(drafter.grows)]
    return sorted(found, key=lambda growth: growth[0])


AttentionInterface.register(ATTENTION, attention)
