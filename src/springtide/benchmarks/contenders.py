"""Who takes part in a benchmark, and the cache that they start from."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, TypeVar

import torch
from transformers import PreTrainedModel

from springtide.attention.policy import Policy
from springtide.engine.engine import Engine
from springtide.engine.request import Request
from springtide.errors import SpringtideError
from springtide.evaluation.report import labels
from springtide.rows.sampling import Sampling

PAUSE = 0.05  # seconds between contenders: idle OpenMP threads spin for a while and would disturb the next one

T = TypeVar("T")
Fill = Literal["prefill", "random"]


class Contender(Protocol):
    """Something that reads a prompt and decodes greedily, one sequence at a time.

    ``policy`` and ``budget`` are Springtide's; None for a peer, and the budget for a policy without one.
    """

    name: str
    policy: str | None
    budget: int | str | None

    def read(self, tokens: list[int]) -> int:
        """Read a prompt and return the token after it. The sequence before must have been forgotten."""

    def resume(self, reader: Request) -> int:
        """The same for the tokens in ``reader``'s cache, taking keys and values from there if that is possible."""

    def step(self) -> int:
        """Decode one more token and return it."""

    def kv_bytes(self) -> float | None:
        """Mean bytes of cache that decoding a token had to read so far; None for all that dense attention reads."""

    def forget(self) -> None:
        """Drop the sequence, if there is one, and its cache."""


class Springtide:
    """The engine under one policy."""

    name = "springtide"

    def __init__(self, engine: Engine, policy: str) -> None:
        self.engine = engine
        self.policy: str | None = policy
        self.budget = engine.policy.named_budget

    def read(self, tokens: list[int]) -> int:
        return self._start(tokens, None)

    def resume(self, reader: Request) -> int:
        return self._start(reader.tokens[: reader.cache.length], reader.fork())

    def step(self) -> int:
        next(self._passes)
        return self.sequence.tokens[-1]

    def kv_bytes(self) -> float | None:
        return self.sequence.stats().kv_bytes_per_token

    def forget(self) -> None:
        del self.sequence, self._passes

    def _start(self, tokens: list[int], reuse: Request | None) -> int:
        endless = Sampling(max_tokens=self.engine.stack.spec.context_limit, ignore_eos=True)
        self.sequence = self.engine.start(tokens, endless, reuse=reuse)
        self._passes = self.engine.run([self.sequence])
        while not self.sequence.output:
            next(self._passes)
        return self.sequence.tokens[-1]


def springtides(engine: Engine, policies: Sequence[Policy]) -> list[Springtide]:
    """A contender for each policy."""
    names = labels(policies)
    return [Springtide(engine.using(policy), name) for policy, name in zip(policies, names, strict=True)]


def title(contender: str | None, policy: str | None, budget: int | str | None) -> str:
    """A short name for a line of a table or a picture: a peer's own, or Springtide's policy with its budget."""
    if policy is None:
        return contender or ""
    return policy if budget is None else f"{policy} {budget}"


def dtype_name(model: PreTrainedModel) -> str:
    """The dtype of weights and cache, such as ``"bfloat16"``."""
    return str(model.dtype).removeprefix("torch.")


def random_prompt(engine: Engine, length: int) -> list[int]:
    """Tokens drawn with seed 0."""
    generator = torch.Generator().manual_seed(0)
    tokens: list[int] = torch.randint(engine.stack.spec.vocab_size, (length,), generator=generator).tolist()
    return tokens


@torch.inference_mode()
def filled(engine: Engine, length: int, fill: Fill) -> Request:
    """A sequence with ``length`` random tokens in its cache: computed by the model, or with random keys and values."""
    tokens = random_prompt(engine, length)
    if fill == "prefill":
        return engine.read(tokens)
    reader = engine.read(tokens[:1])  # so that the cache knows its shapes
    for layer in range(engine.stack.spec.num_layers):
        keys, values = (
            torch.randn(x.shape[0], length - 1, x.shape[2], dtype=x.dtype, device=x.device)
            for x in reader.cache.read(layer, 0, 1)
        )
        reader.cache.write(layer, 1, keys, values)
    reader.cache.commit(1, range(length - 1), exact=True)
    reader.tokens = tokens
    return reader


def check_context(engine: Engine, contexts: Sequence[int], more: int) -> None:
    """Raise SpringtideError unless the model's context holds the longest of ``contexts`` and ``more`` tokens."""
    limit = engine.stack.spec.context_limit
    if max(contexts) + more > limit:
        raise SpringtideError(
            f"A context of {max(contexts)} takes {max(contexts) + more} tokens, but the model's context holds {limit}; "
            "ask for fewer tokens."
        )


def attempt(contender: Contender, context: int, action: Callable[..., T], *arguments: Any) -> T | None:
    """What ``action`` returns; None, with a warning, if a peer failed."""
    time.sleep(PAUSE)
    try:
        return action(*arguments)
    except Exception as error:  # a peer may fail in any way, and the others' results must not be lost
        if contender.policy is not None:
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        warnings.warn(f"{contender.name} failed at a context of {context} ({reason:.200})", stacklevel=2)
        return None


def timed(action: Callable[[], object], count: int) -> list[float]:
    """Seconds that each of ``count`` calls takes."""
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return seconds


def ratio(value: float | None, to: float | None) -> float | None:
    """``value / to``; None if either was not measured."""
    return None if value is None or to is None else value / to
