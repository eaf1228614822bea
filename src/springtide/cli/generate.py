"""``springtide generate``."""

from __future__ import annotations

import sys
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
    MaxTokens,
    MinP,
    Model,
    Penalty,
    PolicyText,
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
from springtide.cli.show import print_pieces, stats_line


def generate(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; '-' or nothing reads standard input.")] = None,
    model: Model = "pocket",
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
    sampling = Sampling(
        max_tokens, temperature, top_p, top_k, min_p, repetition_penalty, seed, tuple(stop or ()), accept=accept
    )
    chosen = read_policy(policy, budget)
    text = read_prompt(prompt, prompt_file)
    engine = load_engine(model, device, dtype, policy=chosen, draft=draft)
    if chat:
        tokens = engine.render([{"role": "user", "content": text}], special_tokens=special_tokens)
    else:
        tokens = engine.encode(text, special_tokens=special_tokens)
    session = engine.session()
    request = session.add(tokens, sampling=sampling)
    interrupted = False
    try:
        print_pieces(session, request, coloured=stats)
    except KeyboardInterrupt:
        interrupted = True
    print(flush=True)
    output = engine.output(request)
    if stats:
        print(stats_line(output.stats), file=sys.stderr)
    if json_file:
        write_json(json_file, output.as_json())
    if interrupted:
        raise typer.Exit(130)
