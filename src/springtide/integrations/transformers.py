"""Springtide as the decoding method of transformers' ``generate``."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, StopStringCriteria
from transformers.generation import GenerateDecoderOnlyOutput

from springtide.attention.policy import Policy
from springtide.drafting.drafter import Drafter
from springtide.engine.engine import Engine
from springtide.engine.request import Request
from springtide.errors import SpringtideError
from springtide.loading import calibration_of, drafting, under
from springtide.rows.sampling import Place, Sampling, processed

# What the engine does to logits itself, in its order: transformers' name, its attribute, and the engine's option.
PROCESSORS = {
    "RepetitionPenaltyLogitsProcessor": ("penalty", "repetition_penalty"),
    "TemperatureLogitsWarper": ("temperature", "temperature"),
    "TopKLogitsWarper": ("top_k", "top_k"),
    "TopPLogitsWarper": ("top_p", "top_p"),
    "MinPLogitsWarper": ("min_p", "min_p"),
}
MODES = ("greedy_search", "sample", "assisted_generation")  # an assistant does not change the output
EXTRAS = ("output_attentions", "output_hidden_states")


def hf_generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    generation_config: GenerationConfig | None = None,
    synced_gpus: bool = False,
    streamer: Any = None,
    policy: Policy | str = "dense",
    draft: str | Path | Drafter | None = None,
    stop_strings: str | list[str] | None = None,
    tokenizer: Any = None,
    **model_kwargs: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """``model.generate(**inputs, custom_generate=springtide.hf_generate, policy="tidal:budget=256")``.

    Prompts may be padded on either side, with an attention mask. Temperature, top-k, top-p, min-p, repetition penalty,
    lengths, end-of-sequence tokens, ``stop_strings`` (with ``tokenizer``), stopping criteria and ``streamer`` are
    those of ``generate``; a stopping criterion sees one sequence at a time, and no scores. Sampling follows torch's
    global seed. The layers of ``springtide.json`` are used when the model was loaded from a folder that has it.
    ``draft`` is what :func:`springtide.load` takes, less what changes the model: the output is as without it.

    Returns what ``generate`` returns: ids ``[batch, length]``, padded on the right; with ``return_dict_in_generate``
    also ``output_scores`` and ``output_logits``, which are 0 where a sequence has ended before others. Raises
    SpringtideError for anything that the engine does not do, such as beam search.
    """
    if generation_config is None:
        raise SpringtideError(
            "Call model.generate with custom_generate=springtide.hf_generate, not hf_generate itself."
        )
    _refuse_unsupported(generation_config, model_kwargs)
    sampling = _sampling(generation_config, logits_processor, input_ids.shape[1])
    criteria = list(stopping_criteria or ())
    if stop_strings is not None:
        criteria.append(_stop_criterion(stop_strings, tokenizer or _kept_back("tokenizer")))
    streamer = streamer or _kept_back("streamer")
    if streamer is not None and len(input_ids) > 1:
        raise SpringtideError(f"A streamer takes one sequence, but there are {len(input_ids)}; leave it out.")
    training = model.training
    try:
        engine = under(Engine(model, calibration=calibration_of(model)), policy)
        if draft is not None:
            engine = drafting(engine, draft)
        engine.eos = _eos(generation_config)
        mask = model_kwargs.get("attention_mask")
        whole = generation_config.return_dict_in_generate
        wanted = [name for name in ("scores", "logits") if whole and getattr(generation_config, f"output_{name}")]
        found = _run(engine, input_ids, mask, sampling, criteria, streamer, _padding(generation_config), wanted)
    finally:
        model.train(training)
    return found if whole else found.sequences


@dataclass
class Record:
    """What a request's tokens were chosen by, ``[V]`` each: the model's ``logits``, and ``scores``, made of them."""

    request: Request
    logits: list[Tensor] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)

    def add(self, logits: Tensor, tokens: list[int]) -> None:
        """Take in the logits of the tokens that are about to be appended."""
        places = [Place(self.request.sampling, self.request.seen, tokens[:number]) for number in range(len(tokens))]
        self.logits += logits.float().unbind()
        self.scores += processed(logits, places).float().unbind()


def _by_step(rows: list[list[Tensor]], done: list[int]) -> tuple[Tensor, ...]:
    """``[batch, V]`` for each step, of the first ``done`` of each row; 0 behind them."""
    blank = torch.zeros_like(rows[0][0])
    return tuple(
        torch.stack([own[step] if step < count else blank for own, count in zip(rows, done, strict=True)])
        for step in range(max(done))
    )


def _run(
    engine: Engine,
    input_ids: Tensor,
    mask: Tensor | None,
    sampling: Sampling,
    criteria: list[Any],
    streamer: Any,
    padding: int,
    wanted: Sequence[str],
) -> GenerateDecoderOnlyOutput:
    """Complete the prompts in one batch: ids ``[batch, length]``, and those of scores and logits that are wanted."""
    batch, width = input_ids.shape
    session = engine.session()
    numbers: dict[Request, int] = {}
    records = []
    for row, ids in enumerate(input_ids):
        kept = ids if mask is None else ids[mask[row].bool()]
        request = session.add(kept.tolist(), sampling=replace(sampling, seed=sampling.seed + row))
        numbers[request] = row
        records.append(Record(request))
        request.record = records[row].add if wanted else None
    room = min(sampling.max_tokens, engine.stack.spec.context_limit)
    rows = torch.cat([input_ids, input_ids.new_full((batch, room), padding)], dim=1)
    done = [0] * batch
    for event in session.run():
        row = numbers[event.request]
        for token in event.token_ids:
            done[row] += 1
            end = width + done[row]
            rows[row, end - 1] = token
            if streamer is not None:  # generate has given it the prompt already
                streamer.put(torch.tensor([token]))
            if any(bool(criterion(rows[row : row + 1, :end], None)) for criterion in criteria):
                if event.finish_reason is None:
                    session.cancel(event.request)
                break
    if streamer is not None:
        streamer.end()
    kept = {name: _by_step([getattr(record, name) for record in records], done) for name in wanted}
    return GenerateDecoderOnlyOutput(sequences=rows[:, : width + max(done)], **kept)


def _sampling(config: GenerationConfig, processors: Any, width: int) -> Sampling:
    """The engine's options for what transformers would apply to logits; ``width`` is the padded prompt's length."""
    known, options = list(PROCESSORS), {}
    last = -1
    for processor in processors or ():
        name = type(processor).__name__
        if name not in known or isinstance(getattr(processor, "prompt_ignore_length", None), int):
            raise SpringtideError(
                f"Springtide does not apply the logits processor {name}; leave it or custom_generate out."
            )
        if known.index(name) <= last:
            raise SpringtideError(
                f"Springtide applies {', '.join(known)} once and in this order; give options instead."
            )
        last = known.index(name)
        attribute, option = PROCESSORS[name]
        options[option] = getattr(processor, attribute)
    if config.do_sample:
        options = {"temperature": 1.0, "seed": int(torch.randint(2**31, (1,))), **options}
    else:
        options = {name: value for name, value in options.items() if name == "repetition_penalty"}
    return Sampling(max_tokens=config.max_length - width, **options)


def _refuse_unsupported(config: GenerationConfig, model_kwargs: dict[str, Any]) -> None:
    mode = config.get_generation_mode().value
    if mode not in MODES:
        raise SpringtideError(f"Springtide has no {mode.replace('_', ' ')}; leave it or custom_generate out.")
    if model_kwargs.get("inputs_embeds") is not None:
        raise SpringtideError(
            "Springtide reads token ids, not inputs_embeds; give input_ids or leave custom_generate out."
        )
    extras = [name for name in EXTRAS if config.return_dict_in_generate and getattr(config, name, False)]
    if extras:
        raise SpringtideError(f"Springtide does not return what {extras[0]} asks for; leave it or custom_generate out.")


def _stop_criterion(stop_strings: str | list[str], tokenizer: Any) -> StopStringCriteria:
    if tokenizer is None:
        raise SpringtideError("stop_strings need the tokenizer; give generate tokenizer=... as well.")
    return StopStringCriteria(tokenizer, stop_strings)


def _kept_back(name: str) -> Any:
    """``tokenizer`` or ``streamer`` as given to transformers' ``generate``, None if it was not.

    Up to version 5.23 ``generate`` takes both and hands neither on to a callable, so they are looked up in its call:
    the nearest ``no_grad`` wrapper, which ``generate`` has.
    """
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_name != "decorate_context":
        frame = frame.f_back
    return None if frame is None else frame.f_locals.get("kwargs", {}).get(name)


def _eos(config: GenerationConfig) -> frozenset[int]:
    ids = config.eos_token_id
    return frozenset([] if ids is None else torch.as_tensor(ids).flatten().tolist())


def _padding(config: GenerationConfig) -> int:
    """What fills a row after its end: the padding token, else the first that ends a sequence, as in transformers."""
    ids = config.eos_token_id if config.pad_token_id is None else config.pad_token_id
    return 0 if ids is None else int(torch.as_tensor(ids).flatten()[0])
