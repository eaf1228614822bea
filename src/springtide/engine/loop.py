"""The decoding loop: plan the rows, run them, keep what the target agrees with."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from springtide.drafting.accept import Accepted, Draft, accept
from springtide.drafting.drafter import Drafter
from springtide.drafting.tree import TokenTree
from springtide.engine.decide import decide
from springtide.engine.governor import Governor
from springtide.engine.request import Decision, Request
from springtide.model.stack import Stack
from springtide.rows.segment import Kind, Segment

CHUNK = 1024  # prompt rows in a pass
GIVEN_ROWS = 64  # rows in a pass that decodes tokens which are known already
PLAIN = Drafter()


@dataclass(frozen=True)
class Plan:
    """A request's rows in a pass, and the tree to choose from when they reach its last token."""

    request: Request
    segment: Segment
    tree: TokenTree | None = None


@dataclass
class Loop:
    """Steps requests forward, each under its own policy and with its own drafter.

    With a ``governor``, which makes one for a drafter of so many ways, each pass is drafted in the way that is fastest,
    or not at all. Without one, drafters draft always, in the first of their ways.
    """

    stack: Stack
    eos: frozenset[int]
    governor: Callable[[int], Governor] | None = None
    max_rows: int = CHUNK
    clock: Callable[[], float] = time.perf_counter
    _governors: dict[int, tuple[Drafter, Governor]] = field(default_factory=dict)

    def step(self, requests: Sequence[Request]) -> list[tuple[Request, Decision]]:
        """One pass over ``requests``; returns what each of them gained."""
        began = self.clock()
        plans = self.plan(requests)
        hidden = self.stack.forward([plan.segment for plan in plans])
        logits = self._logits(plans, hidden)
        accepted = _accepted(plans, logits)
        decisions = [self._finish(*each) for each in zip(plans, hidden, logits, accepted, strict=True)]
        self._record(plans, sum(len(decision.tokens) for decision in decisions), self.clock() - began)
        return list(zip(requests, decisions, strict=True))

    def plan(self, requests: Sequence[Request]) -> list[Plan]:
        """The rows of each request in the next pass.

        A prompt is cut into chunks. A refresh runs from the first inexact token to the last one, as a prompt does.
        Tokens that were given, but are to be decoded, go one at a time where the policy's answer depends on it.
        """
        plans = {request: self._given(request) for request in requests}
        decoding = [request for request, plan in plans.items() if plan is None]
        drafted = {plan.request: plan for plan in self._drafts(decoding)}
        return [plan or drafted[request] for request, plan in plans.items()]

    @property
    def chunk(self) -> int:
        """Rows that a pass has of a prompt, at most: they do not depend on what else is in the pass."""
        return min(CHUNK, self.max_rows)

    def _given(self, request: Request) -> Plan | None:
        """Rows of tokens that are known; None where the last of them alone is left, which is to be decoded."""
        if request.until_reread(self.stack.spec.rope) == 0:
            request.reread()
        cached, known = request.cache.length, len(request.tokens)
        start = request.policy.resume(request.cache, request.prefilling)
        if request.prefilling:
            return self._chain(request, "prompt", start, min(start + self.chunk, request.prefill_end))
        if start < cached:
            return self._chain(request, "refresh", start, cached + 1)
        if cached < known - 1:
            return self._chain(request, "decode", start, min(start + self._given_rows(request), known - 1))
        return None

    def _chain(self, request: Request, kind: Kind, start: int, stop: int) -> Plan:
        tokens, parents = request.tokens[start:stop], list(range(-1, stop - start - 1))
        last = stop == len(request.tokens)
        outputs, drafter = int(last), request.drafter.using(request.way) if last else None
        if request.watch is not None:
            # The row before a token predicts it; those that a refresh computes again have done so before.
            outputs, drafter = max(0, stop - max(start, request.cache.length, request.prefill_end - 1)), None
        segment = request.segment(
            kind, start, tokens, parents, outputs=outputs, drafter=drafter, device=self.stack.device
        )
        return Plan(request, segment, TokenTree.single(tokens[-1]) if last else None)

    def _drafts(self, requests: Sequence[Request]) -> Iterator[Plan]:
        """Trees for requests that decode; a drafter sees all that are its own at once."""
        for drafter in {id(request.drafter): request.drafter for request in requests}.values():
            own = [request for request in requests if request.drafter is drafter]
            way = self._way(own)
            for request in own:
                request.way = request.way if way is None else way
            depths = [self._depth(request) for request in own]
            views = [request.view(depth) for request, depth in zip(own, depths, strict=True)]
            began = time.perf_counter()
            trees = (PLAIN if way is None else drafter).propose(views)
            seconds = (time.perf_counter() - began) / len(own)
            used = PLAIN if way is None else drafter.using(way)
            for request, tree, depth in zip(own, trees, depths, strict=True):
                request.drafting += seconds
                yield self._tree(request, tree.limited(depth), used)

    def _tree(self, request: Request, tree: TokenTree, drafter: Drafter) -> Plan:
        rows = len(tree.tokens)
        segment = request.segment(
            "verify" if rows > 1 else "decode",
            request.cache.length,
            tree.tokens,
            tree.parents,
            outputs=rows,
            drafter=drafter,
            device=self.stack.device,
        )
        return Plan(request, segment, tree)

    def _depth(self, request: Request) -> int:
        """How deep a tree may be: no further than the next refresh, the request's end and the context limit."""
        limits = [
            request.sampling.max_tokens - len(request.output),
            self.stack.spec.context_limit - request.span,
        ]
        headroom = self._headroom(request)
        if headroom is not None:
            limits.append(headroom)
        return max(0, min(limits) - 1)

    def _given_rows(self, request: Request) -> int:
        if not request.policy.rows_independent:
            return 1
        headroom = self._headroom(request)
        return GIVEN_ROWS if headroom is None else min(GIVEN_ROWS, headroom)

    def _headroom(self, request: Request) -> int | None:
        """How many tokens may be committed before rows are computed in another way; None for no limit."""
        limits = (request.policy.headroom(request.cache), request.until_reread(self.stack.spec.rope))
        return min((limit for limit in limits if limit is not None), default=None)

    def _logits(self, plans: Sequence[Plan], hidden: Sequence[Tensor]) -> Sequence[Tensor]:
        """Logits ``[outputs, V]`` of each request's rows that are asked for a token: the LM head runs once for all."""
        asked = [plan.segment.outputs for plan in plans]
        rows = [
            own[len(plan.segment.tokens) - plan.segment.outputs : len(plan.segment.tokens)]
            for plan, own in zip(plans, hidden, strict=True)
        ]
        joined = rows[0] if len(rows) == 1 else torch.cat(rows)
        return torch.split(self.stack.logits(joined) if len(joined) else joined, asked)

    def _finish(self, plan: Plan, hidden: Tensor, logits: Tensor, accepted: Accepted | None) -> Decision:
        """Decide what the request gains, keep the rows that stay, and forget the others."""
        request, segment = plan.request, plan.segment
        before, kept = len(segment.tokens) - segment.outputs, list(range(len(segment.tokens)))
        decision = Decision()
        if accepted is not None:
            decision = decide(request, accepted, self.eos, self.stack.spec.context_limit)
            kept = [*range(before), *(before + node for node in decision.path)]
            request.choose(logits, decision)
            request.drafter.commit(segment, hidden, kept)
        request.cache.commit(segment.prefix, kept, exact=request.policy.exact(segment))
        request.policy.commit(segment, kept)
        request.gain(decision, segment.bytes_read, segment.outputs - 1, time.perf_counter())
        if request.watch is not None:
            if len(logits):
                request.watch(logits)
            request.finish_reason = "length" if request.cache.length == len(request.tokens) - 1 else None
        return decision

    def _governor(self, requests: Sequence[Request]) -> Governor | None:
        """Who decides how ``requests``, which have one drafter, are drafted for; None where time must not decide."""
        drafter = requests[0].drafter
        if self.governor is None or drafter.name == PLAIN.name or any(map(shows_drafts, requests)):
            return None
        if id(drafter) not in self._governors:
            self._governors[id(drafter)] = drafter, self.governor(len(drafter.ways))
        return self._governors[id(drafter)][1]

    def _way(self, requests: Sequence[Request]) -> int | None:
        """The way in which the next pass over ``requests``, which have one drafter, is drafted; None: it is plain."""
        governor = self._governor(requests)
        context = sum(request.cache.length for request in requests) // len(requests)
        arm = 1 if governor is None else governor.choose(len(requests), context)
        return arm - 1 if arm else None

    def _record(self, plans: Sequence[Plan], tokens: int, seconds: float) -> None:
        """Let the governor know what a pass took, if it was made of one drafter's drafts alone."""
        requests = [plan.request for plan in plans]
        drafters = {id(request.drafter) for request in requests}
        decoded = all(plan.tree is not None and plan.segment.decoding for plan in plans)
        governor = self._governor(requests) if decoded and len(drafters) == 1 else None
        if governor is not None:
            governor.record(tokens, seconds)
            for request in requests:
                request.measured_gain, request.fastest = governor.gain, governor.best


def shows_drafts(request: Request) -> bool:
    """Whether leaving out drafts, or making others, which depends on time, would change the output."""
    return request.sampling.accept == "typical" or not request.policy.rows_independent


def _accepted(plans: Sequence[Plan], logits: Sequence[Tensor]) -> list[Accepted | None]:
    """What is kept of each plan's tree, where it has one."""
    drafts = [
        Draft(plan.tree, own, plan.request.sampling, plan.request.seen)
        for plan, own in zip(plans, logits, strict=True)
        if plan.tree is not None
    ]
    found = iter(accept(drafts))
    return [None if plan.tree is None else next(found) for plan in plans]
