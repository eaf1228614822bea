"""``springtide generate``."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from springtide.cli.inputs import (
    Accept,
    Budget,
    Device,
    Draft,
    Dtype,
    Json,
    Logprobs,
    MaxTokens,
    MinP,
    Model,
    Penalty,
    PolicyText,
    Revision,
    Samples,
    Seed,
    SpecialTokens,
    Stats,
    Stop,
    Temperature,
    TopK,
    TopP,
    load_engine,
    read_policy,
    read_prompt,
)
from springtide.cli.show import finish, print_pieces, stats_line
from springtide.errors import SpringtideError


def generate(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; '-' or nothing reads standard input.")] = None,
    model: Model = "pocket",
    revision: Revision = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Read the prompt from this UTF-8 file.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap the prompt in the model's chat template.")] = False,
    special_tokens: SpecialTokens = False,
    policy: PolicyText = "dense",
    budget: Budget = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = 0,
    n: Samples = None,
    logprobs: Logprobs = None,
    stop: Stop = None,
    draft: Draft = None,
    accept: Accept = "exact",
    stats: Stats = False,
    json_file: Json = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Complete a prompt and print the text as it comes."""
    from springtide.evaluation.report import check_target, write_json
    from springtide.rows.sampling import Sampling

    check_target(json_file)
    if logprobs is not None and json_file is None:
        raise SpringtideError("--logprobs has no effect without --json; give a file to write them to.")
    sampling = Sampling(
        *(max_tokens, temperature, top_p, top_k, min_p, repetition_penalty, seed, tuple(stop or ())),
        accept=accept,
        logprobs=logprobs,
    )
    chosen = read_policy(policy, budget)
    text = read_prompt(prompt, prompt_file)
    engine = load_engine(model, device, dtype, revision, policy=chosen, draft=draft)
    if chat:
        tokens = engine.render([{"role": "user", "content": text}], special_tokens=special_tokens)
    else:
        tokens = engine.encode(text, special_tokens=special_tokens)
    session = engine.session()
    samples = [replace(sampling, seed=seed + number) for number in range(n or 1)]
    requests = [session.add(tokens, sampling=sample) for sample in samples]
    interrupted = False
    try:
        if n is None:
            print_pieces(session, requests[0], coloured=stats)
        else:
            finish(session, requests)
    except KeyboardInterrupt:
        interrupted = True
    outputs = [engine.output(request) for request in requests]
    if n is None:
        print(flush=True)
    else:
        for sample, output in zip(samples, outputs, strict=True):
            print(f"[seed {sample.seed}]\n{output.text}", flush=True)
    if stats:
        for output in outputs:
            print(stats_line(output.stats), file=sys.stderr)
    if json_file:
        write_json(json_file, outputs[0].as_json() if n is None else [output.as_json() for output in outputs])
    if interrupted:
        raise typer.Exit(130)
