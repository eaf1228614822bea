"""The engine that users hold: prompts in, text out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import NoneType
from typing import Any, overload

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedModel

from springtide.attention import parse_policy
from springtide.attention.policy import Policy
from springtide.drafting.drafter import Drafter
from springtide.drafting.several import Several
from springtide.engine import advice
from springtide.engine.drafters import AUTO, find_adapter, find_drafter
from springtide.engine.governor import Governor
from springtide.engine.loop import CHUNK, PLAIN, Loop, shows_drafts
from springtide.engine.memory import Memory
from springtide.engine.request import FinishReason, Request, Stats
from springtide.engine.session import Event, Session
from springtide.engine.text import Detokenizer
from springtide.errors import SpringtideError
from springtide.model.cost import cost_of_rows, when_asked
from springtide.model.stack import Stack
from springtide.options import Size, at_least, read
from springtide.rows.cache import Cache
from springtide.rows.sampling import Logprob, Sampling
from springtide.rows.segment import NO_TOKEN, PromptEmbeds
from springtide.rows.spec import ModelSpec

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Output:
    """What came of one prompt. ``token_ids`` end with the end-of-sequence token if it ended the output.

    ``logprobs`` has an entry for each token, if they were asked for (see :class:`springtide.Sampling`).
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stats: Stats
    logprobs: list[Logprob] | None = None

    def as_json(self) -> dict[str, Any]:
        """The documented fields of ``generate --json``."""
        stats = dataclasses.asdict(self.stats)
        own = {"text": self.text, "token_ids": self.token_ids, "finish_reason": self.finish_reason, **stats}
        return own | {"logprobs": None if self.logprobs is None else [_as_json(each) for each in self.logprobs]}


def _as_json(found: Logprob) -> dict[str, Any]:
    top = [{"token_id": token, "logprob": logprob} for token, logprob in found.top.items()]
    return {"token_id": found.token_id, "logprob": found.logprob, "top": top}


class Engine:
    """Generates with one model under one attention policy.

    Args:
        model: a Hugging Face causal model of a supported architecture; it is left as it is.
        tokenizer: its tokenizer; None if prompts are token ids only.
        policy: an attention policy, or its text form such as ``"tidal:budget=256"``.
        drafter: proposes tokens to try; the output does not depend on it if the policy's rows are independent.
        calibration: the content of the model's ``springtide.json``.
        adaptive: draft in the way that is measured to be fastest, and not while none is faster than plain decoding;
            without it every pass is drafted, in the first way.

    Attributes:
        eos: tokens that end a sequence: the model's generation configuration's, else the tokenizer's.

    Raises SpringtideError for an unsupported architecture or a policy that does not fit the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any = None,
        policy: Policy | str = "dense",
        drafter: Drafter | None = None,
        calibration: dict[str, Any] | None = None,
        adaptive: bool = True,
    ) -> None:
        self.stack = Stack(model, calibration)
        _check_calibration(self.stack.spec)
        self.tokenizer = tokenizer
        self.drafter = (drafter or Drafter()).resolve(self.stack)
        self._drafters: dict[tuple[int | str, Policy], tuple[Drafter | str | Path, Drafter]] = {}
        self.policy = self.resolve(policy)
        self.adaptive = adaptive
        self.eos = _eos(model, tokenizer)

    def resolve(self, policy: Policy | str) -> Policy:
        """The policy with everything that depends on the model filled in."""
        policy = parse_policy(policy) if isinstance(policy, str) else policy
        if not isinstance(policy, Policy):
            raise SpringtideError(f"A policy is text such as 'tidal:budget=256', or a Policy, but not {policy!r}.")
        return policy.resolve(self.stack.spec)

    def using(self, policy: Policy | str) -> Engine:
        """The same model under another policy."""
        other = copy(self)
        other.policy = self.resolve(policy)
        return other

    def drafting(self, drafter: Drafter) -> Engine:
        """The same model and policy with another drafter."""
        other = copy(self)
        other.drafter = drafter.resolve(self.stack)
        return other

    def drafter_of(self, draft: Drafter | str | Path, policy: Policy | None = None) -> Drafter:
        """A drafter, or the one of that name or folder, ready for the model and kept.

        Its draft tree is chosen by what rows cost on this machine under the ``policy`` (default: the engine's). Raises
        SpringtideError if it is missing or broken, or would change the model.
        """
        if not isinstance(draft, (Drafter, str, Path)):
            raise SpringtideError(f"A drafter is a name such as 'lookup', a folder, or a Drafter, but not {draft!r}.")
        policy = policy or self.policy
        key = (id(draft) if isinstance(draft, Drafter) else str(draft), policy)
        if key not in self._drafters:
            drafter = (draft if isinstance(draft, Drafter) else self.named(draft)).resolve(self.stack)
            self._drafters[key] = draft, drafter.tuned(when_asked(lambda: cost_of_rows(self.stack, policy)))
        return self._drafters[key][1]

    def named(self, draft: str | Path) -> Drafter:
        """The drafter of that name or folder; raises SpringtideError if it is missing or would change the model.

        ``auto`` is what :mod:`springtide.engine.advice` has for this machine, else lookup and all beside the model.
        """
        name = self.stack.model.name_or_path
        folder = Path(name) if name else None
        advised = advice.advised(self.stack, folder) if draft == AUTO else None
        if advised is not None:
            return advised
        if find_adapter(draft, folder) is not None:
            raise SpringtideError(
                f"The drafter '{draft}' comes with an adapter, which would change your model; "
                "give springtide.load the model's folder instead of the loaded model."
            )
        return find_drafter(draft, folder)

    @overload
    def generate(self, prompts: str | Sequence[int], *, n: None = None, **options: Any) -> Output: ...
    @overload
    def generate(self, prompts: str | Sequence[int], *, n: int, **options: Any) -> list[Output]: ...
    @overload
    def generate(
        self, prompts: Sequence[str] | Sequence[Sequence[int]], *, n: None = None, **options: Any
    ) -> list[Output]: ...
    @overload
    def generate(
        self, prompts: Sequence[str] | Sequence[Sequence[int]], *, n: int, **options: Any
    ) -> list[list[Output]]: ...
    def generate(self, prompts: Any, *, n: int | None = None, **options: Any) -> Any:
        """Complete one prompt (text or token ids) or a list of them, which run as one batch; none for an empty list.

        With ``n`` there is a list of n outputs for each prompt: samples with the seeds ``seed``, ``seed + 1`` and so
        on. Options are those of :meth:`start` and :meth:`encode`; ``policy`` and ``draft`` may be lists, one each for
        the prompts. Raises SpringtideError for an empty prompt, one beyond the context limit, or a bad option.
        """
        if n is not None:
            at_least(n, 1, "n")
        prompts = prompts.tolist() if hasattr(prompts, "tolist") else prompts
        if not isinstance(prompts, Sequence):
            raise SpringtideError("Prompts are a text, a list of token ids, or a list of such prompts.")
        single = isinstance(prompts, (str, bytes)) or any(isinstance(p, int) for p in prompts)
        session = self.session()
        requests = [
            [session.add(prompt, **sample) for sample in _samples(own, n)]
            for prompt, own in zip(
                [prompts] if single else prompts, _for_each(options, 1 if single else len(prompts)), strict=True
            )
        ]
        for _ in session.run():
            pass
        outputs = [[self.output(request) for request in own] for own in requests]
        found = outputs if n is not None else [output for own in outputs for output in own]
        return found[0] if single else found

    def stream(self, prompt: Prompt, **options: Any) -> Iterator[str]:
        """Complete one prompt, yielding pieces of text as they come."""
        self._tokenizer()
        session = self.session()
        session.add(prompt, **options)
        return (event.text for event in session.run() if event.text)

    def chat(self, messages: Sequence[dict[str, str]], *, special_tokens: bool = False, **options: Any) -> Output:
        """Answer ``messages`` (``{"role": ..., "content": ...}``) in the model's chat template, see :meth:`render`."""
        outputs: list[Output] = self.generate([self.render(messages, special_tokens=special_tokens)], **options)
        return outputs[0]

    def encode(self, prompt: Prompt, *, special_tokens: bool = False) -> list[int]:
        """Token ids of a prompt; ids pass through.

        ``special_tokens``: control tokens that are written in a text, such as ``<|im_end|>``, are those tokens, not
        text. Those that the tokenizer adds to every text are there either way.
        """
        if isinstance(prompt, str):
            _check_unicode(prompt)
            return list(self._tokenizer().encode(prompt, split_special_tokens=not special_tokens))
        return _ids(prompt)

    def render(self, messages: Sequence[dict[str, str]], *, special_tokens: bool = False) -> list[int]:
        """Token ids of a conversation in the model's chat template.

        Control tokens are those of the template alone: what the messages hold is text, and cannot end a turn, unless
        ``special_tokens`` are asked for.
        """
        tokenizer = self._tokenizer()
        if tokenizer.chat_template is None:
            raise SpringtideError(
                "The model's tokenizer has no chat template; use a model that was trained to chat, or generate."
            )
        if not isinstance(messages, Sequence) or not all(
            isinstance(message, dict) and {"role", "content"} <= message.keys() for message in messages
        ):
            raise SpringtideError('Messages are a list of {"role": ..., "content": ...}.')
        for message in messages:
            if isinstance(message["content"], str):
                _check_unicode(message["content"])
        try:
            ids: list[int] = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=False, sanitize_control_tokens=not special_tokens
            )
        except (TemplateError, ValueError) as error:
            reason = str(error).rstrip(".")
            raise SpringtideError(f"The model's chat template does not take these messages: {reason}.") from None
        return ids

    def session(self, cache_memory: int | str | None = None, max_rows: int = CHUNK, max_requests: int = 16) -> Session:
        """Requests that come and go and share passes.

        Args:
            cache_memory: bytes that caches, and what policies and drafters remember, may take, as a number or a text
                such as ``"4GiB"`` (default: no bound). Requests wait until there is room for all that they may take.
            max_rows: rows of a pass; more of them read prompts faster, and make those that decode wait longer.
            max_requests: that run at a time; others wait.

        Raises SpringtideError for a size that cannot be read or numbers below 1.
        """
        limit = read(Size, cache_memory, "cache_memory") if isinstance(cache_memory, str) else cache_memory
        for name, value in (("max_rows", max_rows), ("max_requests", max_requests)):
            at_least(value, 1, name)
        if limit is not None:
            at_least(limit, 1, "cache_memory")
        loop = Loop(self.stack, self.eos, Governor if self.adaptive else None, max_rows)
        memory = Memory(self.stack, loop.chunk, limit)
        return Session(loop, self._start, memory, max_requests)

    def _start(self, prompt: Prompt, *, special_tokens: bool = False, **options: Any) -> Request:
        return self.start(self.encode(prompt, special_tokens=special_tokens), **options)

    def start(
        self,
        tokens: Sequence[int],
        sampling: Sampling | None = None,
        *,
        policy: Policy | str | None = None,
        draft: Drafter | str | Path | None = None,
        prefill: int | None = None,
        reuse: Request | None = None,
        embeds: PromptEmbeds | None = None,
        watch: Callable[[Tensor], None] | None = None,
        meter: Callable[..., None] | None = None,
        **options: Any,
    ) -> Request:
        """A request to complete ``tokens``, for a session to run.

        Args:
            sampling: how tokens are chosen and when to stop; or its fields as ``options``.
            policy: the attention policy (default: the engine's).
            draft: what proposes tokens to try (default: the engine's drafter), see :meth:`drafter_of`; one way of it
                alone where the output depends on drafts.
            prefill: how many tokens are computed as a prompt; the rest is decoded like generated ones (default: all).
            reuse: an earlier request of this model, whose cache is taken over as far as its tokens agree and are as a
                dense pass writes them; it is left with an empty one.
            embeds: vectors in place of the first tokens, which may be any.
            watch, meter: see :class:`springtide.engine.request.Request`.

        Raises SpringtideError for a prompt that is empty or too long, tokens that do not exist, vectors that do not
        fit the model or have no token after them, a request to reuse of another engine, and bad options.
        """
        limit, vocab, tokens = self.stack.spec.context_limit, self.stack.spec.vocab_size, _ids(tokens)
        if not isinstance(sampling, (Sampling, NoneType)):
            raise SpringtideError("sampling is a springtide.Sampling; or give its fields as options.")
        sampling = Sampling.of(**({} if sampling is None else vars(sampling)) | options)
        if sampling.stop:
            self._tokenizer()
        if not tokens:
            raise SpringtideError("The prompt is empty; give at least one token.")
        if embeds is not None:
            _check_embeds(embeds, len(tokens), self.stack.spec.hidden_size)
            tokens = [NO_TOKEN] * len(embeds) + list(tokens[len(embeds) :])
        span = len(tokens) + (0 if embeds is None else embeds.gaps)
        if span >= limit:
            raise SpringtideError(
                f"The prompt has {span} tokens, but the model's context holds {limit}, "
                "one of them to generate; shorten the prompt."
            )
        if not all(0 <= token < vocab for token in tokens[0 if embeds is None else len(embeds) :]):
            raise SpringtideError(f"Token ids must be between 0 and {vocab - 1}.")
        prefill, most = len(tokens) if prefill is None else prefill, len(tokens) - (watch is not None)
        if not 1 <= prefill <= most:
            raise SpringtideError(f"prefill is {prefill}, but it must be between 1 and {most} for these tokens.")
        policy = self.policy if policy is None else self.resolve(policy)
        request = Request(
            list(tokens),
            sampling,
            policy,
            self.drafter if draft is None else self.drafter_of(draft, policy),
            self.stack.new_cache() if reuse is None else self._taken_over(reuse, tokens, prefill, embeds),
            prefill_end=prefill,
            output_start=len(tokens),
            embeds=embeds,
            writer=None if self.tokenizer is None else Detokenizer(self.tokenizer, sampling.stop),
            watch=watch,
            meter=meter,
        )
        if isinstance(request.drafter, Several) and shows_drafts(request):
            raise SpringtideError(
                f"With typical acceptance, or under '{policy.name}' as it is set, the output depends on drafts, and "
                f"{', '.join(request.drafter.ways)} would be chosen by measured time; choose one drafter."
            )
        if watch is not None:  # the last row of the prompt predicts the first token that is watched
            request.cache.crop(prefill - 1)
        return request

    def read(self, tokens: Sequence[int]) -> Request:
        """A request whose cache holds ``tokens``, computed densely, for :meth:`start` to reuse under any policy."""
        request = self.start(tokens, Sampling(max_tokens=1), policy="dense", draft=PLAIN)
        for _ in self.run([request]):
            pass
        return request

    def run(self, requests: Iterable[Request]) -> Iterator[Event]:
        """Complete requests together: what each of them gains, pass by pass."""
        session = self.session()
        for request in requests:
            session.admit(request)
        return session.run()

    def output(self, request: Request) -> Output:
        """The result of a request; one that has not finished counts as cancelled."""
        logprobs = None if request.sampling.logprobs is None else request.logprobs
        return Output(request.text, request.output, request.finish_reason or "cancelled", request.stats(), logprobs)

    def score(self, tokens: Sequence[int], prefill: int, reuse: Request | None = None) -> Tensor:
        """Log-probability of each of ``tokens[prefill:]`` given those before it, fp32 ``[len(tokens) - prefill]``.

        See :meth:`predictions`.
        """
        scores, start = [], prefill
        for logits in self.predictions(tokens, prefill, reuse):
            targets = torch.tensor(tokens[start : start + len(logits)], device=logits.device)
            scores.append(logits.log_softmax(-1).gather(1, targets[:, None])[:, 0].float().cpu())
            start += len(logits)
        return torch.cat(scores)

    def predictions(
        self,
        tokens: Sequence[int],
        prefill: int,
        reuse: Request | None = None,
        meter: Callable[..., None] | None = None,
    ) -> Iterator[Tensor]:
        """Logits ``[n, V]`` for each of ``tokens[prefill:]`` given those before it, a few rows at a time.

        The first ``prefill`` tokens (at least one) are computed as a prompt and the others through the decode path,
        as if they had been generated. ``reuse``: see :meth:`start`. ``meter`` is called with every sparse read.
        """
        predicted: list[Tensor] = []
        session = self.session()
        session.admit(
            self.start(tokens, draft=PLAIN, prefill=prefill, reuse=reuse, watch=predicted.append, meter=meter)
        )
        while session.unfinished:
            session.step()
            yield from predicted
            predicted.clear()

    def _taken_over(self, reuse: Request, tokens: Sequence[int], prefill: int, embeds: PromptEmbeds | None) -> Cache:
        """The cache of an earlier request as far as it is what ``tokens`` need: theirs, but the last, and exact.

        Nothing of it, where rotary frequencies are others for a prompt of ``prefill`` tokens.
        """
        if reuse.cache.pool is not self.stack.pool:
            raise SpringtideError("The request to reuse is of another engine; give one of this engine, or none.")
        rope, gaps = self.stack.spec.rope, 0 if embeds is None else embeds.gaps
        turned_alike = rope.shortest(reuse.prefill_end + gaps) == rope.shortest(prefill + gaps)
        alike = _common_prefix(reuse.tokens, tokens[:-1]) if reuse.embeds is embeds and turned_alike else 0
        cache, reuse.cache = reuse.cache, reuse.cache.fork(0)
        kept = min(alike, cache.exact)
        cache.crop(kept if cache.reaches(kept) else 0)
        return cache

    def _tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise SpringtideError("The engine has no tokenizer: load one, or give token ids and no stop strings.")
        return self.tokenizer


def _ids(tokens: Any) -> list[int]:
    """Token ids as a list; raises SpringtideError for anything else."""
    ids = tokens.tolist() if hasattr(tokens, "tolist") else tokens
    if not isinstance(ids, Sequence) or isinstance(ids, bytes) or not all(isinstance(token, int) for token in ids):
        raise SpringtideError("A prompt is text or a list of token ids.")
    return list(ids)


def _check_unicode(text: str) -> None:
    """Raise SpringtideError for text with surrogates, which is how bytes that are not UTF-8 get into a string."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise SpringtideError("The prompt holds bytes that are not UTF-8 text; convert it first.") from None


def _check_embeds(embeds: PromptEmbeds, tokens: int, hidden_size: int) -> None:
    """Raise SpringtideError unless vectors, positions and tokens fit together."""
    if embeds.vectors.shape != (len(embeds), hidden_size):
        raise SpringtideError(
            f"The {len(embeds)} rows that are given as vectors must be [{len(embeds)}, {hidden_size}] for this model, "
            f"but are {list(embeds.vectors.shape)}."
        )
    if len(embeds) >= tokens:
        raise SpringtideError("A prompt must have a token after the rows that are given as vectors.")
    steps = pairwise((-1, *embeds.positions, embeds.end))
    if not all(before < after for before, after in steps):
        raise SpringtideError("Positions of rows that are given as vectors must ascend, from 0, and end before `end`.")


def _check_calibration(spec: ModelSpec) -> None:
    """Raise SpringtideError if the calibration names layers that the model does not have, or not for selecting."""
    layout = (spec.calibration or {}).get("tidal", {})
    wrong = [layer for role in ("full", "select") for layer in layout.get(role, ()) if layer not in spec.global_layers]
    if wrong:
        raise SpringtideError(
            f"springtide.json names layer {wrong[0]}, but the model's layers without a sliding window are "
            f"{', '.join(map(str, spec.global_layers))}; run `springtide calibrate` again or delete the file."
        )


def _eos(model: PreTrainedModel, tokenizer: Any) -> frozenset[int]:
    ids = model.generation_config.eos_token_id if model.generation_config else None
    if ids is None:
        ids = getattr(tokenizer, "eos_token_id", None)
    return frozenset([] if ids is None else [ids] if isinstance(ids, int) else ids)


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


def _for_each(options: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """The options of each of ``count`` prompts: a list of policies or drafters has one for each."""
    each: list[dict[str, Any]] = [dict(options) for _ in range(count)]
    for name in ("policy", "draft"):
        values = options.get(name)
        if not isinstance(values, (list, tuple)):
            continue
        if len(values) != count:
            raise SpringtideError(f"{name} has {len(values)} values, but there are {count} prompts; give one for each.")
        for own, value in zip(each, values, strict=True):
            own[name] = value
    return each


def _samples(options: dict[str, Any], n: int | None) -> list[dict[str, Any]]:
    """The options of each of ``n`` samples of a prompt, which differ in their seeds; as they are without ``n``."""
    if n is None:
        return [options]
    seed = Sampling(seed=options.get("seed", getattr(options.get("sampling"), "seed", 0))).seed
    return [{**options, "seed": seed + number} for number in range(n)]
