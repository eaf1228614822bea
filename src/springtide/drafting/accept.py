"""Which tokens of a draft tree the target keeps.

**Exact** acceptance, the default, leaves the output as it is without a drafter, greedy or sampled. **Typical**
acceptance is lossy: it keeps guesses that the target finds probable enough, so that the output depends on the drafter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from math import log

import torch
from torch import Tensor

from springtide.drafting.tree import TokenTree
from springtide.rows.sampling import Place, Sampling, Seen, distribution, sample

EPSILON, DELTA = 0.09, 0.3  # of typical acceptance


@dataclass(frozen=True)
class Accepted:
    """``path``: accepted nodes from node 0 down. ``tokens``: what is committed, one for each node of the path."""

    path: list[int]
    tokens: list[int]


@dataclass(frozen=True, eq=False)
class Draft:
    """A tree that the target has tried: its ``logits [N, V]`` at the nodes, and how the sequence is sampled.

    ``seen`` are the committed tokens; they end with the token of node 0.
    """

    tree: TokenTree
    logits: Tensor
    sampling: Sampling
    seen: Seen

    def follow(self, way: Accepted, token: int) -> bool:
        """Commit ``token`` after ``way``; whether the way goes on, to a child that holds it."""
        child = self.tree.child(way.path[-1], token)
        way.tokens.append(token)
        if child is not None:
            way.path.append(child)
        return child is not None


def accept(drafts: Sequence[Draft]) -> list[Accepted]:
    """What is kept of each draft, as its ``sampling`` says."""
    kept: dict[int, Accepted] = {}
    for rule in (greedy, exact, typical):
        own = [draft for draft in drafts if _rule(draft.sampling) is rule]
        kept |= zip(map(id, own), rule(own) if own else (), strict=True)
    return [kept[id(draft)] for draft in drafts]


def _rule(sampling: Sampling) -> Callable[[Sequence[Draft]], list[Accepted]]:
    if sampling.accept == "typical":
        return typical
    return greedy if sampling.temperature == 0 and sampling.repetition_penalty == 1 else exact


def exact(drafts: Sequence[Draft]) -> list[Accepted]:
    """Walk down every tree along the target's own tokens, all trees side by side.

    At each node one token is drawn from the target's distribution there; if a child holds it, go on there, else stop.
    Every committed token is thus a draw of the target's, whatever the tree holds, and a child is taken with exactly
    its probability: the output is distributed as without drafting, and, since noise is keyed by position, it is the
    very same.
    """
    ways = [Accepted([0], []) for _ in drafts]
    walking = list(zip(drafts, ways, strict=True))
    while walking:  # a draw costs more than a look, so that only nodes that are reached are asked
        logits = torch.stack([draft.logits[way.path[-1]] for draft, way in walking])
        drawn = sample(logits, [Place(draft.sampling, draft.seen, way.tokens) for draft, way in walking])
        walking = [pair for pair, token in zip(walking, drawn, strict=True) if pair[0].follow(pair[1], token)]
    return ways


def greedy(drafts: Sequence[Draft]) -> list[Accepted]:
    """:func:`exact` where nothing but the target's most probable tokens counts: one look at all nodes of all trees."""
    said = iter(torch.cat([draft.logits.argmax(-1) for draft in drafts]).tolist())
    ways = []
    for draft in drafts:
        own, way = list(islice(said, len(draft.tree.tokens))), Accepted([0], [])
        while draft.follow(way, own[way.path[-1]]):
            pass
        ways.append(way)
    return ways


def typical(drafts: Sequence[Draft]) -> list[Accepted]:
    """**Lossy.** The longest path of typical tokens, then the target's most probable one.

    Medusa's rule (Cai et al., arXiv 2401.10774, section 2.3.1): a child ``x`` of a node is typical if ``p(x) >
    min(epsilon, delta * exp(-H(p)))``, where ``p`` is what the next token would be drawn from (penalties count the
    path's tokens too) and ``H`` its entropy in nats. Of paths of the same length the more probable one wins. Nothing
    is drawn: without a draft this is greedy decoding.
    """
    return [_best(draft, 0, [])[2] for draft in drafts]


def _best(draft: Draft, node: int, path: list[int]) -> tuple[int, float, Accepted]:
    """The best way to go on from ``node``: how many nodes, the log-probability of their tokens, and the way."""
    log_probs = distribution(draft.logits[node, None], [Place(draft.sampling, draft.seen, path)])[0]
    entropy = float(torch.special.entr(log_probs.exp()).sum())
    ways = [(0, 0.0, Accepted([node], [int(log_probs.argmax())]))]
    for child in (other for other, parent in enumerate(draft.tree.parents) if parent == node):
        token = draft.tree.tokens[child]
        score = float(log_probs[token])
        if score > min(log(EPSILON), log(DELTA) - entropy):
            length, further, way = _best(draft, child, [*path, token])
            ways.append((length + 1, score + further, Accepted([node, *way.path], [token, *way.tokens])))
    return max(ways, key=lambda way: way[:2])
