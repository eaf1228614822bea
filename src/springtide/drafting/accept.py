"""Which tokens of a draft tree the target keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from springtide.drafting.tree import TokenTree
from springtide.engine.sampling import Sampling, sample


@dataclass(frozen=True)
class Accepted:
    """``path``: accepted nodes from node 0 down. ``tokens``: what is committed, one for each node of the path."""

    path: list[int]
    tokens: list[int]


def accept(tree: TokenTree, logits: Tensor, sampling: Sampling, committed: Sequence[int]) -> Accepted:
    """Walk down ``tree`` along the target's own tokens.

    At each node one token is drawn from the target's distribution there (``logits [N, V]``); if a child holds it, go
    on there, else stop. Every committed token is thus a draw of the target's, whatever the tree holds, and a child is
    taken with exactly its probability: the output is distributed as without drafting, and, since noise is keyed by
    position, it is the very same. ``committed`` ends with the token of node 0.
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
