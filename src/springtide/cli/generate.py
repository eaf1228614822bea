"""``springtide generate``."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from springtide.cli.inputs import Draft, Json, Model, OnePolicy, Sampling, Stats, read_prompt
from springtide.cli.show import finish, print_pieces, stats_line
from springtide.errors import SpringtideError


def generate(
    *,
    prompt: Annotated[str | None, typer.Argument(help="The prompt; '-' or nothing reads standard input.")] = None,
    model: Model,
    prompt_file: Annotated[Path | None, typer.Option(help="Read the prompt from this UTF-8 file.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap the prompt in the model's chat template.")] = False,
    special_tokens: Annotated[
        bool,
        typer.Option(
            "--special-tokens",
            help="Take control tokens that the prompt spells out, such as <|im_end|>, for themselves.",
        ),
    ] = False,
    policy: OnePolicy,
    sampling: Sampling,
    n: Annotated[
        int | None, typer.Option("--n", min=1, help="Samples to draw, with --seed and the seeds after it.")
    ] = None,
    logprobs: Annotated[
        int | None,
        typer.Option(
            min=0, help="To --json: log-probabilities of the tokens, and of this many most probable ones beside."
        ),
    ] = None,
    draft: Draft = None,
    stats: Stats = False,
    json_file: Json = None,
) -> None:
    """Complete a prompt and print the text as it comes."""
    from springtide.evaluation.report import check_target, write_json

    check_target(json_file)
    if logprobs is not None and json_file is None:
        raise SpringtideError("--logprobs has no effect without --json; give a file to write them to.")
    first, chosen = sampling.read(logprobs), policy.read()
    text = read_prompt(prompt, prompt_file)
    engine = model.load(policy=chosen, draft=draft)
    if chat:
        tokens = engine.render([{"role": "user", "content": text}], special_tokens=special_tokens)
    else:
        tokens = engine.encode(text, special_tokens=special_tokens)
    session = engine.session()
    samples = [replace(first, seed=first.seed + number) for number in range(n or 1)]
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
            print(stats_line(output.stats, draft is not None), file=sys.stderr)
    if json_file:
        write_json(json_file, outputs[0].as_json() if n is None else [output.as_json() for output in outputs])
    if interrupted:
        raise typer.Exit(130)
