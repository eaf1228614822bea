"""The decoding loop: plan the rows, run them, keep what the target agrees with."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from springtide.attention.policy import Policy
from springtide.drafting.accept import Accepted, accept
from springtide.drafting.drafter import Drafter
from springtide.drafting.tree import TokenTree
from springtide.engine.governor import Governor
from springtide.engine.request import Request
from springtide.model.stack import Pass, Stack
from springtide.rows.segment import Segment

CHUNK = 1024  # prompt rows in a pass
GIVEN_ROWS = 64  # rows in a pass that decodes tokens which are known already
PLAIN = Drafter()


@dataclass
class Loop:
    """Steps sequences forward under one policy and one drafter, which a ``governor`` may leave out of a pass."""

    stack: Stack
    policy: Policy
    drafter: Drafter
    eos: frozenset[int]
    governor: Governor | None = None
    clock: Callable[[], float] = time.perf_counter

    def step(self, running: Iterable[Request]) -> list[tuple[Request, list[int]]]:
        """One pass over ``running``; returns the tokens that each sequence gained."""
        sequences, began = list(running), self.clock()
        # Typical acceptance keeps what was drafted, so that leaving out drafts would change the output.
        governor = None if any(s.sampling.accept == "typical" for s in sequences) else self.governor
        drafter = self.drafter if governor is None or governor.drafts(len(sequences)) else PLAIN
        plans = [self.plan(sequence, drafter) for sequence in sequences]
        segments = [segment for segment, _ in plans]
        hidden = torch.split(self.forward(segments, drafter), [len(segment.tokens) for segment in segments])
        gained = [
            (sequence, self.commit(sequence, segment, tree, own))
            for sequence, (segment, tree), own in zip(sequences, plans, hidden, strict=True)
        ]
        if governor and all(s.decoding and s.outputs == len(s.tokens) for s in segments):
            governor.record(len(sequences), sum(len(tokens) for _, tokens in gained), self.clock() - began)
        return gained

    @torch.inference_mode()
    def forward(self, segments: list[Segment], drafter: Drafter) -> Tensor:
        """Final hidden states ``[R, hidden]`` of the rows that were planned."""
        return drafter.forward(Pass(self.stack, segments, self.policy), self.stack.spec.num_layers)

    def plan(self, sequence: Request, drafter: Drafter = PLAIN) -> tuple[Segment, TokenTree | None]:
        """The sequence's rows in the next pass, and the tree to choose from when they reach the last token.

        A prompt is cut into chunks. A refresh runs from the first inexact token to the last one, as a prompt does.
        Tokens that were given, but are to be decoded, go one at a time where the policy's answer depends on it.
        """
        cached, known = sequence.cache.length, len(sequence.tokens)
        start = self.policy.resume(sequence.state, cached, sequence.prefilling)
        if sequence.prefilling:
            stop = min(start + CHUNK, sequence.prefill_end)
            return self._chain(sequence, start, stop, decoding=False)
        if start < cached:
            return self._chain(sequence, start, cached + 1, decoding=False)
        if cached < known - 1:
            stop = min(start + self._given_rows(sequence), known - 1)
            return self._chain(sequence, start, stop, decoding=True)
        tree = drafter.propose(sequence.draft, sequence.tokens).limited(self._depth(sequence))
        segment = Segment(
            sequence.cache,
            start,
            tree.tokens,
            tree.parents,
            decoding=True,
            state=sequence.state,
            outputs=len(tree.tokens),
            draft=sequence.draft,
            embeds=sequence.embeds,
            device=self.stack.device,
        )
        return segment, tree

    def _chain(self, sequence: Request, start: int, stop: int, *, decoding: bool) -> tuple[Segment, TokenTree | None]:
        tokens, last = sequence.tokens[start:stop], stop == len(sequence.tokens)
        segment = Segment.chain(
            sequence.cache,
            start,
            tokens,
            decoding=decoding,
            state=sequence.state,
            outputs=int(last),
            draft=sequence.draft,
            embeds=sequence.embeds,
            device=self.stack.device,
        )
        return segment, TokenTree.single(tokens[-1]) if last else None

    def _given_rows(self, sequence: Request) -> int:
        if not self.policy.rows_independent:
            return 1
        headroom = self.policy.headroom(sequence.state, sequence.cache.length)
        return GIVEN_ROWS if headroom is None else min(GIVEN_ROWS, headroom)

    def _depth(self, sequence: Request) -> int:
        """How deep a tree may be: no further than the next refresh, the request's end and the context limit."""
        limits = [
            sequence.output_start + sequence.sampling.max_tokens - len(sequence.tokens),
            self.stack.spec.context_limit - sequence.span,
        ]
        headroom = self.policy.headroom(sequence.state, sequence.cache.length)
        if headroom is not None:
            limits.append(headroom)
        return max(0, min(limits) - 1)

    def commit(self, sequence: Request, segment: Segment, tree: TokenTree | None, hidden: Tensor) -> list[int]:
        """Keep the accepted rows, forget the others, and append the new tokens, which are returned."""
        if tree is None:
            accepted = Accepted(path=list(range(len(segment.tokens))), tokens=[])
        else:
            before = len(segment.tokens) - segment.outputs
            logits = self.stack.logits(hidden[before:])
            accepted = accept(tree, logits, sequence.sampling, sequence.tokens)
            accepted = Accepted([*range(before), *(before + node for node in accepted.path)], accepted.tokens)
            self.drafter.commit(segment, hidden, accepted.path)
        segment.cache.commit(segment.prefix, accepted.path)
        self.policy.commit(segment, len(accepted.path))
        return self._append(sequence, segment, accepted.tokens)

    def _append(self, sequence: Request, segment: Segment, tokens: list[int]) -> list[int]:
        """Append tokens up to an end of sequence or a limit; tokens cut off leave the cache too."""
        now, limit = time.perf_counter(), self.stack.spec.context_limit
        if tokens and sequence.output:
            sequence.decode_bytes += segment.bytes_read
            sequence.passes += 1
            sequence.drafted += segment.outputs - 1
        kept = []
        for token in tokens:
            kept.append(token)
            sequence.tokens.append(token)
            if token in self.eos and not sequence.sampling.ignore_eos:
                sequence.finish_reason = "stop"
            elif len(sequence.output) >= sequence.sampling.max_tokens or sequence.span >= limit:
                sequence.finish_reason = "length"
            if sequence.finish_reason is not None:
                break
        sequence.crop(len(sequence.tokens) - 1)
        from_draft = [i < len(tokens) - 1 for i in range(len(kept))]
        sequence.accepted += sum(from_draft)
        sequence.from_draft += from_draft
        if kept:
            first = sequence.first_token is None
            sequence.first_token = sequence.first_token or now
            sequence.last_token = now
            sequence.decoded += 0 if first else len(kept)
        return kept
