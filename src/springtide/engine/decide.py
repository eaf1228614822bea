"""What a pass gives a request: end of sequence, limits and stop strings, before anything is kept."""

from __future__ import annotations

from collections.abc import Collection

from springtide.drafting.accept import Accepted
from springtide.engine.request import Decision, FinishReason, Request


def decide(request: Request, accepted: Accepted, eos: Collection[int], limit: int) -> Decision:
    """The tokens that ``request`` gains by what is accepted of its tree, all cuts made.

    ``eos`` are the tokens that end a sequence, ``limit`` the positions that the model has. What ends the output is part
    of the tokens: the end-of-sequence token, or the one that completes a stop string.
    """
    sampling, writer = request.sampling, request.writer
    room = min(sampling.max_tokens - len(request.output), limit - request.span)
    text, reason, count = "", None, 0
    for count, token in enumerate(accepted.tokens, start=1):
        text += "" if writer is None else writer.add([token])
        reason = _reason(request, token in eos, count == room)
        if reason is not None:
            text += "" if writer is None else writer.finish()
            break
    drafted = min(count, len(accepted.tokens) - 1)
    return Decision(accepted.path[:count], accepted.tokens[:count], text, reason, drafted)


def _reason(request: Request, ends: bool, full: bool) -> FinishReason | None:
    stopped = request.writer is not None and request.writer.stopped
    if stopped or (ends and not request.sampling.ignore_eos):
        return "stop"
    return "length" if full else None
