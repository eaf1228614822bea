"""LongSpec: one small transformer block that reads the context in the target's own cache (arXiv 2502.17421).

The block stands between the target's frozen embedding and its LM head. Windowed self-attention reads the last tokens;
cross-attention reads the keys and values of the target's last layer without a sliding window, of which there is no
copy. What the drafter remembers of a sequence is therefore of constant size, whatever the context.

Its self-attention reads embeddings alone, so that a token's keys and values there depend on the token and its position
and on nothing else. They are computed when a draft is asked for, for tokens that are not held yet.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, fields, replace
from itertools import accumulate
from math import inf, isfinite
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from springtide import kernels
from springtide.drafting.drafter import Target, View
from springtide.drafting.folder import check_base, read_folder, write_folder
from springtide.drafting.guesser import NODES, Guesser
from springtide.drafting.shape import MOST_NODES, best, expected
from springtide.drafting.tree import TokenTree
from springtide.errors import SpringtideError
from springtide.kernels import KV, Pages, Reads, Visible, native
from springtide.options import at_least, option
from springtide.rows.segment import NO_TOKEN, PREFIX

WINDOW = 512  # tokens that the self-attention sees, at most
WIDTH = 16  # nodes of a level that are followed further, at most
GUESSES = 10  # best guesses behind a node that are looked at
MOST_STEPS = 8
ROTARY_BASE = 10_000.0  # of the self-attention
SINKS, RECENT = 4, 0.25  # of a sparse read: the first tokens, and the share of the newest ones
CONTEXT, TIMED = 128, 8  # tokens in the cache when a level is timed, and how often it is


@dataclass(frozen=True)
class Sizes:
    """Of a block: ``heads`` of both attentions, ``kv_heads`` of the self-attention's keys and of the target's.

    Raises ValueError for sizes that no block has.
    """

    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int

    def __post_init__(self) -> None:
        if min(asdict(self).values()) < 1 or self.heads % self.kv_heads or self.head_dim % 2:
            raise ValueError(self)


class Block(nn.Module):
    """Windowed self-attention, cross-attention to the target's cache and a gated MLP; norms before each, and last.

    Linear layers have no biases. The cross-attention has a query and an output projection only.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        hidden, inner, own = sizes.hidden_size, sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
        self.sizes = sizes
        self.self_norm, self.cross_norm, self.mlp_norm, self.norm = (nn.RMSNorm(hidden, 1e-6) for _ in range(4))
        self.q, self.k, self.v = (nn.Linear(hidden, size, bias=False) for size in (inner, own, own))
        self.o = nn.Linear(inner, hidden, bias=False)
        self.cross_q, self.cross_o = nn.Linear(hidden, inner, bias=False), nn.Linear(inner, hidden, bias=False)
        self.gate, self.up = (nn.Linear(hidden, sizes.intermediate_size, bias=False) for _ in range(2))
        self.down = nn.Linear(sizes.intermediate_size, hidden, bias=False)

    def project(self, embedded: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries ``[..., n, H, D]``, keys and values ``[..., H_kv, n, D]`` of the self-attention.

        They are those of embeddings ``[..., n, hidden]`` at ``positions [..., n]``.
        """
        normed = self.self_norm(embedded)
        q, k, v = (self._heads(_linear(normed, layer)) for layer in (self.q, self.k, self.v))
        q, k = torch.split(
            turned(torch.cat([q, k], -2), positions[..., None]), [self.sizes.heads, self.sizes.kv_heads], -2
        )
        return q, k.transpose(-3, -2), v.transpose(-3, -2)

    def forward(self, embedded: Tensor, attended: Tensor, cross: Callable[[Tensor], Tensor]) -> Tensor:
        """What the LM head reads, ``[..., n, hidden]``, at rows of embeddings ``[..., n, hidden]``.

        ``attended [..., n, H, D]`` is what the self-attention gave. ``cross`` attends to the target's keys, from
        queries ``[..., n, H, D]`` that are not turned yet to as many outputs.
        """
        hidden = embedded + _linear(attended.flatten(-2), self.o)
        q = self._heads(_linear(self.cross_norm(hidden), self.cross_q))
        hidden = hidden + _linear(cross(q).flatten(-2), self.cross_o)
        normed = self.mlp_norm(hidden)
        hidden = hidden + _linear(F.silu(_linear(normed, self.gate)) * _linear(normed, self.up), self.down)
        out: Tensor = self.norm(hidden)
        return out

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, self.sizes.head_dim)


def turned(x: Tensor, positions: Tensor) -> Tensor:
    """``x [..., D]`` with rotary embeddings of ``positions``, which broadcast to its other axes.

    They are the self-attention's own, so that its keys depend on nothing but position, whatever the target's do.
    """
    half = x.shape[-1] // 2
    wide = torch.promote_types(x.dtype, torch.float32)
    frequencies = ROTARY_BASE ** (-torch.arange(half, device=x.device, dtype=wide) / half)
    angles = positions[..., None].to(wide) * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def _linear(x: Tensor, layer: nn.Linear) -> Tensor:
    level = None if torch.is_grad_enabled() or x.ndim != 2 else native.of(x, layer.weight)
    if level is None or len(x) > native.most_rows(level, x.dtype):
        return F.linear(x, layer.weight)
    return native.linear(level, x, layer.weight)


class Entry(NamedTuple):
    """A token whose keys and values are to lie in ``slot`` of a ring."""

    slot: int
    position: int
    token: int


class Ring:
    """Keys and values of a sequence's last ``window`` tokens, and behind them those of ``nodes`` of a draft tree.

    Position ``p`` lies in slot ``p % window``. What a slot holds is known, and compared with the tokens before it is
    read: they may have been taken back, or computed elsewhere. ``first`` is the first position that is a token's.
    """

    def __init__(self, window: int, nodes: int) -> None:
        self.window, self.nodes = window, nodes
        self.pages: Pages | None = None  # none before there is something to write
        self.held: list[tuple[int, int] | None] = [None] * window  # the position and the token of each slot
        self.first = 0
        self.warned = False

    def fork(self) -> Ring:
        """An independent copy."""
        twin = Ring(self.window, self.nodes)
        twin.held, twin.first, twin.warned = list(self.held), self.first, self.warned
        twin.pages = None if self.pages is None else Pages(tuple(slab.clone() for slab in self.pages.slabs))
        return twin

    __copy__ = fork

    @property
    def nbytes(self) -> int:
        """Bytes that it takes: the same for any number of tokens."""
        return 0 if self.pages is None else sum(slab.nbytes for slab in self.pages.slabs)

    @property
    def table(self) -> tuple[int, ...]:
        assert self.pages is not None
        return tuple(range(len(self.pages.slabs[0])))

    def missing(self, tokens: Sequence[int], gaps: int) -> list[Entry]:
        """What it lacks of the tokens that the last of them sees, but for that one; ``gaps``: see :class:`View`."""
        last, window, held = len(tokens) - 1, self.window, self.held
        start = max(0, last - window + 1)
        while start < last and tokens[start] == NO_TOKEN:
            start += 1
        self.first = start + gaps
        return [
            Entry(position % window, position, token)
            for position, token in enumerate(tokens[start:last], self.first)
            if held[position % window] != (position, token)
        ]

    def write(self, entries: Sequence[Entry], keys: Tensor, values: Tensor) -> None:
        """Store keys and values ``[H_kv, n, D]`` of n entries; those of the tree have slots from ``window`` on."""
        if self.pages is None:
            self.pages = Pages.empty(self.window + self.nodes, keys)
        for start, stop in _runs([entry.slot for entry in entries]):
            self.pages.write(self.table, entries[start].slot, keys[:, start:stop], values[:, start:stop])
        for entry in entries:
            if entry.slot < self.window:
                self.held[entry.slot] = entry.position, entry.token

    def attend(self, q: Tensor, position: int, root: int, nodes: Tensor) -> Tensor:
        """Attention ``[R, H, D]`` of rows at ``position`` over what they see of the tokens before ``root``, and nodes.

        ``nodes``: bool ``[R, n]``, which of the tree's a row sees, the first of them at position ``root``.
        """
        assert self.pages is not None
        slots = torch.arange(self.window, device=q.device)
        latest = root - 1 - (root - 1 - slots) % self.window  # the position that a slot has
        tokens = latest >= max(self.first, position - self.window + 1)
        mask = torch.cat([tokens.expand(len(q), -1), nodes], 1)
        seen = KV(self.pages, Reads((self.table,), (Visible.by(mask),)))
        return kernels.attend(q, seen, q.shape[-1] ** -0.5, lse=False)[0]


def _runs(slots: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Where runs of slots that follow one another begin and end."""
    start = 0
    for stop in range(1, len(slots) + 1):
        if stop == len(slots) or slots[stop] != slots[stop - 1] + 1:
            yield start, stop
            start = stop


class Growing:
    """A draft tree while it grows, level by level.

    ``odds[i]``: how probable it is that node ``i`` and those above it are right. The nodes ``followed`` have been run;
    those of the ``frontier`` are to be next. Those ``kept`` are worth their rows so far. ``slots``: what a sparse
    cross-attention reads, once it is chosen.
    """

    def __init__(self, view: View) -> None:
        self.view, self.ring = view, view.draft
        self.root = len(view.tokens) - 1 + view.gaps
        self.tokens, self.parents, self.odds = [view.tokens[-1]], [PREFIX], [1.0]
        self.frontier, self.followed, self.kept = [0], list[int](), [0]
        self.slots: Tensor | None = None

    @property
    def length(self) -> int:
        """Slots of the target's cache that the rows see."""
        return min(self.view.cache.length, len(self.view.tokens) - 1)

    def follow(self, step: int) -> list[Entry]:
        """Run the frontier, ``step`` nodes below the root, next: its places in the ring."""
        slot = self.ring.window + len(self.followed)
        self.followed += self.frontier
        return [Entry(slot + i, self.root + step, self.tokens[node]) for i, node in enumerate(self.frontier)]

    def seen(self) -> list[list[bool]]:
        """Of each node of the frontier, which of those that were followed it sees: its ancestors and itself."""
        rows = []
        for node in self.frontier:
            path = set[int]()
            while node != PREFIX:
                path.add(node)
                node = self.parents[node]
            rows.append([other in path for other in self.followed])
        return rows

    def add(
        self,
        guesses: Sequence[Sequence[int]],
        shares: Sequence[Sequence[float]],
        prices: Sequence[float],
        rate: float,
    ) -> None:
        """Go on to guesses behind each node of the frontier, with their probabilities; see :func:`worthwhile`."""
        count = len(self.tokens)
        for node, own, odds in zip(self.frontier, guesses, shares, strict=True):
            self.tokens += own
            self.parents += [node] * len(own)
            self.odds += [self.odds[node] * share for share in odds]
        self.kept = worthwhile(self.odds, prices, rate)
        new = [node for node in self.kept if node >= count]
        self.frontier = sorted(new, key=lambda node: -self.odds[node])[:WIDTH]

    @property
    def tree(self) -> TokenTree:
        """Of the nodes that are kept."""
        place = {PREFIX: PREFIX} | {node: i for i, node in enumerate(self.kept)}
        return TokenTree([self.tokens[n] for n in self.kept], [place[self.parents[n]] for n in self.kept])


def worthwhile(odds: Sequence[float], prices: Sequence[float], rate: float) -> list[int]:
    """The nodes of a tree that are worth their rows, the root always, ascending.

    Each is worth its odds, which are no more than its parent's; ``n`` rows cost ``rate * prices[n - 1]``.
    """
    order = sorted(range(len(odds)), key=lambda node: (-odds[node], node))
    value, most, count = 0.0, -inf, 1
    for number, (node, price) in enumerate(zip(order, prices, strict=False), start=1):
        value += odds[node]
        if odds[node] > 0 and value - rate * price > most:
            most, count = value - rate * price, number
    return sorted(order[:count])


@dataclass(frozen=True, eq=False)
class LongSpec(Guesser):
    """LongSpec: a small block of its own, which reads the context in the model's cache, drafts token by token.

    Attributes:
        block: of any floating dtype.
        vocab_size, base: the target's vocabulary and fingerprint (None: not known).
        window: tokens that the self-attention sees.
        trained: positions that it was trained for, from 0.
        temperatures: for each token ahead, what logits are divided by for probabilities that are right.
        prices: of a pass of 1, 2, ... rows, in plain passes; by default 16 rows cost no more than one.
        level: price of a level of the tree, likewise.

    For the others see :class:`springtide.drafting.guesser.Guesser`.
    """

    name: ClassVar[str] = "longspec"

    block: Block
    vocab_size: int
    base: str | None = None
    window: int = WINDOW
    trained: int = WINDOW
    temperatures: tuple[float, ...] = (1.0,) * 4
    prices: tuple[float, ...] = (1.0,) * NODES
    level: float = 0.0
    cross: int | Literal["all"] = option("all", "tokens of the context that it reads, the ones that matter most")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The drafter in ``folder``; raises SpringtideError for files that are missing, broken or contradictory."""
        config, tensors = read_folder(folder)
        try:
            with torch.device("meta"):
                block = Block(Sizes(**{size.name: config[size.name] for size in fields(Sizes)}))
            block.load_state_dict(tensors, assign=True)
            own = {name: config[name] for name in ("vocab_size", "base", "window", "trained", "accuracy")}
            drafter = cls(block, temperatures=tuple(config["temperatures"]), **own)
            whole = drafter._config == config and drafter._fits
        except (KeyError, TypeError, ValueError, RuntimeError):
            whole = False
        if not whole:
            raise SpringtideError(f"'{folder}' holds no {cls.name} drafter whose parts fit together; train it again.")
        if drafter.window > WINDOW:
            raise SpringtideError(
                f"The drafter in '{folder}' sees {drafter.window} tokens, but only the last {WINDOW} are kept for it; "
                "train one with a smaller window."
            )
        return drafter

    def save(self, folder: Path) -> None:
        """Write the drafter to ``folder``, in bf16; raises SpringtideError when it cannot be written."""
        write_folder(folder, self._config, self.block.state_dict())

    @property
    def _config(self) -> dict[str, Any]:
        return {
            "drafter": self.name,
            **asdict(self.block.sizes),
            "vocab_size": self.vocab_size,
            "base": self.base,
            "window": self.window,
            "trained": self.trained,
            "temperatures": list(self.temperatures),
            "accuracy": self.accuracy,
        }

    @property
    def _fits(self) -> bool:
        """Whether numbers are ones that it can have, and there is an accuracy for each token ahead."""
        accuracy = self.accuracy
        return (
            1 <= self.steps <= min(self.window, MOST_STEPS)
            and self.trained >= 1
            and all(temperature > 0 and isfinite(temperature) for temperature in self.temperatures)
            and (
                accuracy is None
                or (len(accuracy) == self.steps and all(0 <= share <= 1 for row in accuracy for share in row))
            )
        )

    def resolve(self, target: Target) -> Self:
        check_base(self._config, target)
        context_layer(target)
        sizes, spec = self.block.sizes, target.spec
        if (sizes.kv_heads, sizes.head_dim) != (spec.kv_heads, spec.head_dim):
            raise SpringtideError(
                f"The {self.name} drafter is for a model with {sizes.kv_heads} KV heads of size {sizes.head_dim}, but "
                f"this one has {spec.kv_heads} of size {spec.head_dim}; use a drafter that was trained for this model."
            )
        if self.cross != "all":
            at_least(self.cross, 1, f"{self.name}: cross")
        block = deepcopy(self.block).requires_grad_(False).to(target.model.device, target.model.dtype)
        return replace(self, block=block, base=target.fingerprint, target=target)

    @property
    def steps(self) -> int:
        return len(self.temperatures)

    @property
    def most_rows(self) -> int:
        return len(self.prices)

    @property
    def _nodes(self) -> int:
        """Nodes of a tree that are run, at most."""
        return 1 + WIDTH * (self.steps - 1)

    def memory(self, tokens: int) -> int:
        """The same for any number of tokens."""
        sizes = self.block.sizes
        keys = torch.empty(sizes.kv_heads, 0, sizes.head_dim, dtype=self.block.k.weight.dtype, device="meta")
        return Pages.empty(self.window + self._nodes, keys).slabs[0].nbytes

    def new_state(self) -> Ring:
        return Ring(self.window, self._nodes)

    def tuned(self, cost: Callable[[int], float]) -> Self:
        """See :meth:`Guesser.tuned`; a level of its own is timed too.

        A node is worth what it adds to the tokens to expect, and costs the tokens that its time is worth otherwise, by
        the ``gain`` that the accuracy promises.
        """
        prices, level = [cost(rows) / cost(1) for rows in range(1, MOST_NODES + 1)], self._level_time() / cost(1)
        gain = max(1.0, *(self._promised(depth, prices, level) for depth in range(1, self.steps + 1)))
        payable = [price for price in prices if gain * (price - 1) < self.steps]  # a tree adds no more than its depth
        return replace(self, prices=tuple(payable), level=level, gain=gain)

    def _promised(self, depth: int, prices: Sequence[float], level: float) -> float:
        """Tokens in the time of a plain pass, with the best tree of so many levels that is always the same."""
        accuracy, drafting = self._accuracy[:depth], depth * level
        shape = best(accuracy, lambda nodes: prices[nodes - 1] + drafting)
        return expected(accuracy, shape) / (prices[len(shape.parents) - 1] + drafting)

    def _level_time(self) -> float:
        """Milliseconds of a level behind a short context: the best of some, what else runs only adds to them."""
        assert self.target is not None
        tokens = [0] * max(2, min(CONTEXT + 1, self.target.spec.context_limit - MOST_STEPS))
        view = View(tokens, self.steps, self.new_state(), self.target.read(tokens[:-1]), None, None)
        ready, seconds = replace(self, prices=(1.0,) * NODES, level=0.0, trained=len(tokens)), []
        for _ in range(TIMED):
            start = time.perf_counter()
            ready.propose([view])
            seconds.append(time.perf_counter() - start)
        return 1e3 * min(seconds) / self.steps

    @torch.inference_mode()
    def propose(self, views: Sequence[View]) -> list[TokenTree]:
        trees = [Growing(view) for view in views]
        growing = [tree for tree in trees if tree.length]
        for step in range(self.steps):
            growing = [tree for tree in growing if step < tree.view.depth and self._pays(tree, step)]
            if not growing:
                break
            self._warn(growing)
            for tree, guesses, shares in zip(growing, *self.guess(growing, step), strict=True):
                tree.add(guesses, shares, self.prices, self._rate)
        return [tree.tree for tree in trees]

    @property
    def _rate(self) -> float:
        """Tokens that the time of a plain pass is worth."""
        return self.gain or 1.0

    def _pays(self, tree: Growing, step: int) -> bool:
        """Whether the tokens to expect of another level are worth its time."""
        right = sum(tree.odds[node] for node in tree.frontier) * sum(self._accuracy[step])
        return right > self._rate * self.level

    def guess(self, trees: Sequence[Growing], step: int) -> tuple[list[Any], list[Any]]:
        """Of each tree, the best guesses behind each node of its frontier, and their probabilities."""
        target = self.target
        assert target is not None
        missing = [tree.ring.missing(tree.view.tokens, tree.view.gaps) if step == 0 else [] for tree in trees]
        entries = [[*before, *tree.follow(step)] for before, tree in zip(missing, trees, strict=True)]
        device = target.model.device
        ids, positions = torch.tensor([(e.token, e.position) for own in entries for e in own], device=device).unbind(1)
        embedded = target.embed(ids)
        q, *new = self.block.project(embedded, positions)
        counts, rows = [len(own) for own in entries], [len(tree.frontier) for tree in trees]
        for tree, own, *parts in zip(trees, entries, *(torch.split(x, counts, 1) for x in new), strict=True):
            tree.ring.write(own, *parts)
        places = [tree.root + step for tree in trees for _ in tree.frontier]
        ends = zip(accumulate(counts), rows, strict=True)
        asked = [row for stop, count in ends for row in range(stop - count, stop)]  # those of the frontiers
        embedded, q = embedded[asked], q[asked]
        attended = [
            tree.ring.attend(part, tree.root + step, tree.root, torch.tensor(tree.seen(), device=device))
            for tree, part in zip(trees, torch.split(q, rows), strict=True)
        ]

        def cross(q: Tensor) -> Tensor:
            return self._read(target.rotate(context_layer(target), q, places), trees, rows)

        logits = target.head(self.block(embedded, torch.cat(attended), cross))
        shares = (logits / self.temperatures[step]).softmax(-1).nan_to_num()
        odds, guesses = shares.topk(min(GUESSES, shares.shape[-1]))
        found = [torch.split(tensor, rows) for tensor in (guesses, odds)]
        return [part.tolist() for part in found[0]], [part.tolist() for part in found[1]]

    def _read(self, q: Tensor, trees: Sequence[Growing], rows: Sequence[int]) -> Tensor:
        """Attention ``[R, H, D]`` of turned queries, ``rows`` of each tree, over the target's keys and values."""
        assert self.target is not None
        layer, scale = context_layer(self.target), q.shape[-1] ** -0.5
        reads = [_all(tree, layer, count, q.device) for tree, count in zip(trees, rows, strict=True)]
        pages = trees[0].view.cache.pages(layer)
        if self.cross == "all":
            return kernels.attend(q, KV(pages, Reads.joined(reads)), scale, lse=False)[0]
        parts = []
        for tree, part, own in zip(trees, torch.split(q, list(rows)), reads, strict=True):
            kv, budget = KV(pages, own), min(self.cross, tree.length)
            if tree.slots is None:  # by the root's query: they serve the levels below, too
                recent = max(1, int(RECENT * budget))
                tree.slots = kernels.choose(part, kv, scale, budget, sinks=SINKS, recent=recent)
            index = tree.slots.expand(len(part), -1, -1)
            parts.append(kernels.attend_gathered(part, kv, index, scale, lse=False)[0])
        return torch.cat(parts)

    def _warn(self, trees: Sequence[Growing]) -> None:
        """Say once of a request that it is longer than what the drafter was trained for."""
        for tree in trees:
            if tree.root >= self.trained and not tree.ring.warned:
                tree.ring.warned = True
                warnings.warn(
                    f"the {self.name} drafter was trained for {self.trained} positions: further on it may guess worse; "
                    "train it with a larger --max-length",
                    stacklevel=2,
                )


def context_layer(target: Target) -> int:
    """The target's layer that is read: its last one without a sliding window.

    Raises SpringtideError if all of its layers have one.
    """
    layers = target.spec.global_layers
    if not layers:
        raise SpringtideError(
            "All layers of this model have a sliding window, but longspec reads the context in one that has none; "
            "use another drafter."
        )
    return layers[-1]


def _all(tree: Growing, layer: int, rows: int, device: torch.device) -> Reads:
    """All that the rows of a tree see of a layer of the target's cache."""
    cache = tree.view.cache
    return Reads((cache.tables[cache.pool.windows[layer]],), (Visible.all(rows, tree.length, device),))
