"""Springtide as the decoding method of transformers' ``generate``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import GenerateDecoderOnlyOutput

from springtide.attention.calibration import read_calibration
from springtide.attention.policy import Policy
from springtide.engine.engine import Engine
from springtide.engine.sampling import Sampling
from springtide.errors import SpringtideError

# What the engine does itself; anything else that transformers would apply to logits or to stopping is refused.
PROCESSORS = {
    "TemperatureLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "MinPLogitsWarper",
    "RepetitionPenaltyLogitsProcessor",
}
CRITERIA = {"MaxLengthCriteria", "EosTokenCriteria", "StopStringCriteria"}


def hf_generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    generation_config: GenerationConfig | None = None,
    synced_gpus: bool = False,
    streamer: Any = None,
    policy: Policy | str = "dense",
    tokenizer: Any = None,
    **model_kwargs: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """``model.generate(**inputs, custom_generate=springtide.hf_generate, policy="tidal:budget=256")``.

    Prompts may be padded on either side, with an attention mask. Temperature, top-k, top-p, min-p, repetition penalty,
    stop strings, lengths and end-of-sequence tokens come from the generation configuration; sampling follows torch's
    global seed. The layers of ``springtide.json`` are used when the model was loaded from a folder that has it.

    Returns what ``generate`` returns: ids ``[batch, length]``, padded on the right. Raises SpringtideError for
    anything that the engine does not do, such as beam search.
    """
    assert generation_config is not None
    _refuse_unsupported(generation_config, logits_processor, stopping_criteria)
    folder = Path(model.name_or_path)
    engine = Engine(model, tokenizer, policy, calibration=read_calibration(folder) if folder.is_dir() else None)
    mask = model_kwargs.get("attention_mask")
    seed = int(torch.randint(2**31, (1,))) if generation_config.do_sample else 0
    sequences = []
    for row, ids in enumerate(input_ids):
        kept = ids if mask is None else ids[mask[row].bool()]
        sequences.append(engine.start(kept.tolist(), _sampling(generation_config, input_ids.shape[1], seed + row)))
    engine = _with_eos(engine, generation_config)
    if streamer is not None:
        streamer.put(input_ids.cpu())
    sent = 0
    for sequence, _ in engine.run(sequences):
        if streamer is not None:
            for token in sequence.output[sent:]:
                streamer.put(torch.tensor([token]))
            sent = len(sequence.output)
    if streamer is not None:
        streamer.end()
    pad = generation_config.pad_token_id
    longest = max(len(sequence.output) for sequence in sequences)
    filler = pad if pad is not None else next(iter(engine.eos), 0)
    outputs = torch.tensor([s.output + [filler] * (longest - len(s.output)) for s in sequences])
    result = torch.cat([input_ids, outputs.to(input_ids.device)], dim=1)
    return GenerateDecoderOnlyOutput(sequences=result) if generation_config.return_dict_in_generate else result


def _with_eos(engine: Engine, config: GenerationConfig) -> Engine:
    """The engine with the end-of-sequence tokens of this call."""
    ids = config.eos_token_id
    engine.eos = frozenset([] if ids is None else [ids] if isinstance(ids, int) else ids)
    return engine


def _sampling(config: GenerationConfig, prompt: int, seed: int) -> Sampling:
    """The engine's options for a transformers configuration; ``prompt`` is the padded prompt's length."""
    options: dict[str, Any] = {
        "max_tokens": config.max_length - prompt,
        "repetition_penalty": config.repetition_penalty or 1.0,
        "seed": seed,
        "stop": tuple([config.stop_strings] if isinstance(config.stop_strings, str) else config.stop_strings or ()),
    }
    if config.do_sample:
        options |= {
            "temperature": 1.0 if config.temperature is None else config.temperature,
            "top_k": config.top_k or 0,
            "top_p": 1.0 if config.top_p is None else config.top_p,
            "min_p": config.min_p or 0.0,
        }
    return Sampling(**options)


def _refuse_unsupported(config: GenerationConfig, processors: Any, criteria: Any) -> None:
    if (config.num_beams or 1) > 1:
        raise SpringtideError("Springtide has no beam search; use num_beams=1 or leave out custom_generate.")
    for kind, found, known in (
        ("logits processor", processors, PROCESSORS),
        ("stopping criterion", criteria, CRITERIA),
    ):
        for item in found or ():
            name = type(item).__name__
            if name not in known:
                raise SpringtideError(f"Springtide does not apply the {kind} {name}; leave it or custom_generate out.")
