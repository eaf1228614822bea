"""Which tokens of a draft tree the target keeps.

**Exact** acceptance, the default, leaves the output as it is without a drafter, greedy or sampled. **Typical**
acceptance is lossy: it keeps guesses that the target finds probable enough, so that the output depends on the drafter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

from springtide.drafting.tree import TokenTree
from springtide.rows.sampling import Sampling, distribution, sample

EPSILON, DELTA = 0.09, 0.3  # of typical acceptance


@dataclass(frozen=True)
class Accepted:
    """``path``: accepted nodes from node 0 down. ``tokens``: what is committed, one for each node of the path."""

    path: list[int]
    tokens: list[int]


def accept(tree: TokenTree, logits: Tensor, sampling: Sampling, committed: Sequence[int]) -> Accepted:
    """What ``sampling`` keeps of ``tree``, by the target's ``logits [N, V]`` at its nodes.

    ``committed`` ends with the token of node 0.
    """
    rule = typical if sampling.accept == "typical" else exact
    return rule(tree, logits, sampling, committed)


def exact(tree: TokenTree, logits: Tensor, sampling: Sampling, committed: Sequence[int]) -> Accepted:
    """Walk down ``tree`` along the target's own tokens.

    At each node one token is drawn from the target's distribution there; if a child holds it, go on there, else stop.
    Every committed token is thus a draw of the target's, whatever the tree holds, and a child is taken with exactly
    its probability: the output is distributed as without drafting, and, since noise is keyed by position, it is the
    very same.
    """
    node: int | None = 0
    path: list[int] = []
    history = list(committed)
    while node is not None:
        path.append(node)
        token = sample(logits[node], sampling, history, position=len(history))
        history.append(token)
        node = tree.child(node, token)
    return Accepted(path, history[len(committed) :])


def typical(tree: TokenTree, logits: Tensor, sampling: Sampling, committed: Sequence[int]) -> Accepted:
    """**Lossy.** The longest path of typical tokens, then the target's most probable one.

    Medusa's rule (Cai et al., arXiv 2401.10774, section 2.3.1): a child ``x`` of a node is typical if ``p(x) >
    min(epsilon, delta * exp(-H(p)))``, where ``p`` is what the next token would be drawn from (penalties count the
    path's tokens too) and ``H`` its entropy in nats. Of paths of the same length the more probable one wins. Nothing
    is drawn: without a draft this is greedy decoding.
    """

    def best(node: int, history: list[int]) -> tuple[int, float, Accepted]:
        """The best way to go on from ``node``: how many nodes, the log-probability of their tokens, and the way."""
        log_probs = distribution(logits[node], sampling, history)
        entropy = float(torch.special.entr(log_probs.exp()).sum())
        ways = [(0, 0.0, Accepted([node], [int(log_probs.argmax())]))]
        for child in (other for other, parent in enumerate(tree.parents) if parent == node):
            token = tree.tokens[child]
            score = float(log_probs[token])
            if score > min(log(EPSILON), log(DELTA) - entropy):
                length, further, way = best(child, [*history, token])
                ways.append((length + 1, score + further, Accepted([node, *way.path], [token, *way.tokens])))
        return max(ways, key=lambda way: way[:2])

    return best(0, list(committed))[2]
