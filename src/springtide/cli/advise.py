"""``springtide advise``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from springtide.cli.inputs import Json, Model, Policies, Temperature, read_numbers, read_temperatures, read_texts
from springtide.cli.show import measured, result_of


def advise(
    *,
    model: Model,
    context: Annotated[str, typer.Option(help="Comma list of context lengths, tokens.")] = "4096",
    policy: Annotated[
        str | None,
        typer.Option(help="Comma list of policies beside dense (default: tidal, if the model is calibrated)."),
    ] = None,
    draft: Annotated[
        str | None,
        typer.Option(help="Comma list of drafters (default: lookup, those beside the model, self if calibrated)."),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 text file, or a folder of .txt files (default: the bundled excerpt).")
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of each length that are cut from the text.")] = 4,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens to decode after each prompt.")] = 96,
    temperature: Temperature = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the places in the text.")] = 0,
    json_file: Json = None,
) -> None:
    """Measure policies and drafters on this machine, and keep the fastest lossless drafters for --draft auto."""
    from springtide.benchmarks import advise as benchmark
    from springtide.engine import advice as kept
    from springtide.engine.drafters import find_adapter
    from springtide.evaluation.drafts import passages as cut
    from springtide.evaluation.drafts import steps
    from springtide.evaluation.report import check_target, write_json
    from springtide.model.source import find_model, homes
    from springtide.training.running import make_folder

    check_target(json_file)
    contexts, texts = sorted(read_numbers(context, "--context")), read_texts(text)
    [heat] = read_temperatures(str(temperature))
    given = None if draft is None else benchmark.read_drafters(draft)
    asked = None if policy is None else Policies(policy).read()
    folder = find_model(model.name, model.revision).folder
    own = [name for name in given or () if find_adapter(name, folder) is not None]  # these change the model
    engine = model.load()
    benchmark.check_contexts(engine, contexts, max_tokens)
    home = homes(engine.stack.model)[0]
    make_folder(home)
    check_target(home / kept.FILE, json_file)
    named = benchmark.policies(engine, asked)
    names = benchmark.default_drafters(engine) if given is None else given
    changed = {name: model.load(draft=name) for name in own}
    contenders = benchmark.contenders(engine, changed, names, list(named))
    cutting = cut(engine.tokenizer, texts, contexts, prompts * len(contexts), 0, seed)
    passages = result_of(cutting, len(texts), "texts")
    timing = benchmark.costs(engine, list(named), contexts)
    costs = result_of(timing, benchmark.steps_of(len(named), len(contexts)), "passes")
    decoding = benchmark.advise(contenders, named, passages, costs, heat, max_tokens)
    found = measured(decoding, steps(passages), "prompts")
    if json_file:
        write_json(json_file, found.as_json())
    benchmark.show(found.rows)
    found.end()
    advices = benchmark.advice(found.rows)
    drafters = benchmark.drafters(advices, found.rows, contenders)
    path = kept.write(engine.stack, drafters, [each.as_json() for each in advices])
    print(benchmark.said(advices))
    if engine.stack.spec.calibration is None and None in (asked, given):
        print("The model is not calibrated, so that tidal and self were left out; run `springtide calibrate` first.")
    print(f"Wrote the advice to {path}: --draft auto takes {', '.join(drafters) or 'none'}.")
