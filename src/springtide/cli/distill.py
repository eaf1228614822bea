"""``springtide distill``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from springtide.cli.inputs import MaxTokens, Model, OnePolicy, Temperature
from springtide.cli.show import resumable


def distill(
    *,
    data: Annotated[Path, typer.Option(help="Text file, folder of .txt files, or .jsonl file (text or messages).")],
    out: Annotated[Path, typer.Option(help="File for the lines, .jsonl; lines that are there are kept.")],
    model: Model,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts to continue.")] = 512,
    length: Annotated[int, typer.Option(min=1, help="Most tokens of a prompt.")] = 128,
    facts: Annotated[float, typer.Option(help="Share of prompts that ask for facts hidden in them.")] = 0.0,
    hold_out: Annotated[
        list[str] | None, typer.Option(help="File name in the folder to leave out; may be repeated.")
    ] = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    batch: Annotated[int, typer.Option(min=1, help="Texts that are written at once.")] = 16,
    policy: OnePolicy,
    seed: Annotated[int, typer.Option(help="Seed of prompts and sampling.")] = 0,
) -> None:
    """Have the model continue excerpts of texts, for its drafter to learn from; run again, it adds what is missing."""
    from springtide.evaluation.report import check_target
    from springtide.rows.sampling import Sampling
    from springtide.training.distill import Prompts
    from springtide.training.distill import distill as run
    from springtide.training.windows import read_documents

    check_target(out)
    sampling, chosen = Sampling(max_tokens, temperature, seed=seed), policy.read()
    documents, _ = read_documents(data, hold_out or ())
    source = Prompts(model.load(policy=chosen), documents, length, facts, seed)
    with resumable(out):
        written = run(source, out, prompts, sampling, batch)
    print(f"'{out}' holds {written.texts} texts of {written.tokens} tokens, of which the model wrote {written.own}.")
