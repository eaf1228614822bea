"""Self-drafting: the target under a sparse policy drafts what one pass under its own policy verifies.

Drafts are decoded on a branch of the request's cache, whose rows are forgotten with it: the pass that verifies writes
them anew. So a policy that approximates drafts for exact output (as in TriForce, Sun et al., arXiv 2404.11912), and the
queries of the pass that verifies choose what the next draft reads (as in SparseSpec, arXiv 2512.01278).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal, Self

from torch import Tensor

from springtide.attention.held import Held
from springtide.attention.policy import Layer, State
from springtide.attention.tidal import Tidal
from springtide.drafting.drafter import Drafter, View
from springtide.drafting.tree import TokenTree
from springtide.engine.loop import PLAIN, Loop
from springtide.engine.request import Request
from springtide.errors import SpringtideError
from springtide.model.cost import cost_of_rows, when_asked
from springtide.model.stack import Stack
from springtide.options import Share, at_least, option
from springtide.registry import Nested
from springtide.rows.segment import Segment

WAYS = 3  # numbers of drafted tokens that may be tried, each half of the one before
SPARSE = Tidal(budget=Share(5))


@dataclass
class SelfState:
    """What is remembered of a request.

    Attributes:
        sparse: the sparse policy's state of the committed tokens.
        inner: the draft state of the drafter below.
        queries: of each layer, those ``[1, H, D]`` of the last row that stayed of a draft.
        length: the tokens at that row, its own included.
    """

    sparse: State
    inner: Any
    queries: dict[int, tuple[Layer, Tensor]] = field(default_factory=dict)
    length: int = 0

    @property
    def nbytes(self) -> int:
        own = sum(q.nbytes for _, q in self.queries.values())
        return own + self.sparse.nbytes + int(getattr(self.inner, "nbytes", 0))

    def __copy__(self) -> SelfState:
        return SelfState(self.sparse.fork(), copy(self.inner), dict(self.queries), self.length)


@dataclass(frozen=True, eq=False)
class SelfDraft(Drafter):
    """The model itself, reading less: drafts some tokens under a sparse policy, which may be drafted for in turn."""

    name: ClassVar[str] = "self"

    policy: Annotated[Any, Nested("policy")] = option(None, "sparse policy that drafts, by default tidal:budget=5%")
    tokens: int = option(6, "tokens that are drafted for a pass that verifies them, at most")
    draft: Annotated[Any, Nested("drafter", late=True)] = option(
        None, "drafter whose drafts the sparse policy verifies"
    )
    select: Literal["verified", "own"] = option(
        "own", "who chooses what is read: queries of the pass that verified the last draft, or the draft's own"
    )
    loop: Loop | None = None

    def resolve(self, target: Any) -> Self:
        at_least(self.tokens, 1, f"{self.name}: tokens")
        policy, below = self.policy or SPARSE, self.draft or PLAIN
        if policy.budget is None:
            raise SpringtideError(
                f"{self.name}: the policy is {policy.name}, which leaves nothing out; give one that has a budget, such "
                "as policy=(tidal:budget=256)."
            )
        if isinstance(below, SelfDraft):
            raise SpringtideError(
                f"{self.name}: the drafter below it is '{below.name}' again, which is one level too deep; give lookup, "
                "or one with weights."
            )
        assert isinstance(target, Stack)
        return replace(
            self, policy=policy.resolve(target.spec), draft=below.resolve(target), loop=Loop(target, eos=frozenset())
        )

    def tuned(self, cost: Callable[[int], float]) -> Self:
        """The drafter below is verified under the sparse policy, and pays by what rows cost there."""
        below = when_asked(lambda: cost_of_rows(self._loop.stack, self.policy))
        return replace(self, draft=self.draft.tuned(below))

    @property
    def counts(self) -> Sequence[int]:
        """How many tokens are drafted, in each of its ways."""
        return [self.tokens >> half for half in range(WAYS) if half == 0 or self.tokens >> half > 1]

    @property
    def ways(self) -> Sequence[str]:
        return [f"{self.name}, {count} tokens" for count in self.counts]

    @property
    def most_rows(self) -> int:
        return 1 + self.tokens

    @property
    def branch_rows(self) -> int:
        below: int = self.draft.most_rows
        return self.tokens + below

    def memory(self, tokens: int) -> int:
        stack = self._loop.stack
        heads: int = stack.spec.num_layers * stack.model.config.num_attention_heads
        queries: int = heads * stack.spec.head_dim * stack.model.dtype.itemsize
        means: int = self.policy.remembered(tokens, stack.spec) * stack.slot_bytes
        below: int = self.draft.memory(tokens)
        return queries + means + below

    @property
    def _loop(self) -> Loop:
        assert self.loop is not None, "it was resolved"
        return self.loop

    def new_state(self) -> SelfState:
        return SelfState(self.policy.new_state(), self.draft.new_state())

    @property
    def observes(self) -> bool:
        return self.select == "verified"

    def commit(self, segment: Segment, hidden: Tensor, kept: Sequence[int]) -> None:
        state: SelfState = segment.draft
        row = kept[-1]
        state.queries = {index: (layer, q[row, None].clone()) for index, (layer, q) in segment.queries.items()}
        state.length = segment.prefix + len(kept)
        self.draft.commit(replace(segment, draft=state.inner), hidden, kept)

    def propose(self, views: Sequence[View]) -> list[TokenTree]:
        branches = [self._branch(view) for view in views]
        while running := [branch for branch in branches if branch.finish_reason is None]:
            self._loop.step(running)
        for view, branch in zip(views, branches, strict=True):
            self._back(view, branch)
        return [_chain(branch.tokens[len(view.tokens) - 1 :]) for view, branch in zip(views, branches, strict=True)]

    def _branch(self, view: View) -> Request:
        """A request that goes on from here under the sparse policy, with the drafter below."""
        request: Request = view.request
        state: SelfState = view.draft
        count = min(self.counts[view.way], view.depth)
        branch = request.branch(
            self.policy, state.sparse, self.draft, self.draft.branch(state.inner, view.tokens), count
        )
        if state.queries and state.length == request.cache.length:
            branch.policy = self._held(branch, state)
        return branch

    def _held(self, branch: Request, state: SelfState) -> Held:
        """What the last row that was verified would read under the sparse policy."""
        last = branch.cache.length - 1
        segment = branch.segment("decode", last, branch.tokens[last : last + 1], [-1], device=self._loop.stack.device)
        slots = {index: self.policy.reads(layer, q, segment) for index, (layer, q) in sorted(state.queries.items())}
        self.policy.commit(segment, [0])
        branch.decode_bytes += segment.bytes_read
        return Held({index: own for index, own in slots.items() if own is not None}, branch.cache.length)

    def _back(self, view: View, branch: Request) -> None:
        """Remember what holds for the committed tokens, and count what was read."""
        view.draft.sparse = branch.state
        branch.state.crop(view.cache.length)
        view.request.decode_bytes += branch.decode_bytes


def _chain(tokens: list[int]) -> TokenTree:
    return TokenTree(tokens, list(range(-1, len(tokens) - 1)))
