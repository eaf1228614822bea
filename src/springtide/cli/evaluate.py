"""``springtide eval``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from springtide.cli.inputs import (
    Chat,
    Device,
    Images,
    Json,
    Model,
    Policies,
    PolicyNames,
    Results,
    Text,
    chats,
    quiet_transformers,
    read_decimals,
    read_numbers,
    read_temperatures,
    read_text,
    read_texts,
    resolved,
)
from springtide.cli.show import measured, progress, result_of
from springtide.errors import SpringtideError


def needle(
    *,
    model: Model,
    length: Annotated[str, typer.Option(help="Comma list of context lengths, tokens.")] = "4096",
    trials: Annotated[
        int, typer.Option(min=1, help="Contexts of each length and task, each with 2 or 5 questions.")
    ] = 50,
    task: Annotated[
        str, typer.Option(help="Comma list of tasks: single, multikey, multivalue, tracking, quote.")
    ] = "single",
    policies: Policies,
    text: Text = None,
    chat: Chat = None,
    distractors: Annotated[int, typer.Option(help="More facts in the context, which nobody asks about.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of facts and places.")] = 0,
    results: Results,
) -> None:
    """Answers about what is hidden in a book: exact match, and divergence from dense predictions."""
    from springtide.evaluation.needle import Haystack, table
    from springtide.evaluation.needle import needle as run
    from springtide.evaluation.report import plot_lines, print_table
    from springtide.evaluation.tasks import parse_tasks

    results.check()
    lengths, wanted, book = read_numbers(length, "--length"), policies.read(), read_text(text)
    tasks = parse_tasks(task)
    engine = model.load()
    compared = resolved(engine, wanted)
    haystack = Haystack(engine.tokenizer, book, seed, distractors, chats(engine, chat))
    steps, total = run(engine, haystack, tasks, compared, lengths, trials), len(lengths) * len(tasks) * trials
    found = measured(steps, total, "trials")
    results.write(found.as_json())
    print_table(table(found.rows))
    if results.plot:
        rows = [asdict(cell) for cell in found.rows if cell.depth is None]
        for row in rows if len(tasks) > 1 else ():
            row["policy"] += f", {row['task']}"
        plot_lines(
            results.plot,
            _series(rows, "budget", "exact_match", lengths),
            x="budget (tokens per KV head)",
            y="exact match",
            log_x=True,
        )
    found.end()


def ppl(
    *,
    model: Model,
    length: Annotated[int, typer.Option(help="Tokens in a window; its second half is scored.")] = 4096,
    windows: Annotated[int, typer.Option(min=1, help="Windows, spread over the text.")] = 4,
    policies: Policies,
    text: Text = None,
    results: Results,
) -> None:
    """Perplexity of a text, teacher-forced through the decode path, and KL divergence from dense predictions."""
    from springtide.evaluation.perplexity import perplexity
    from springtide.evaluation.report import plot_lines, print_table

    results.check()
    wanted, book = policies.read(), read_text(text)
    if results.plot and "dense" not in [policy.name for policy in wanted]:
        raise SpringtideError("--plot shows the divergence from dense predictions; add dense to --policy.")
    engine = model.load()
    compared = resolved(engine, wanted)
    tokens = engine.encode(book)
    steps, total = perplexity(engine, tokens, compared, length, windows), windows * (length - length // 2)
    found = measured(steps, total, "tokens")
    results.write(found.as_json())
    rows = [asdict(row) for row in found.rows]
    curves = [row | {"tokens": at, "kl": kl} for row in rows for at, kl in row.pop("kl_curve") or ()]
    print_table(rows)
    if results.plot:
        plot_lines(results.plot, _series(curves, "tokens", "kl"), x="decoded tokens", y="KL to dense (nats a token)")
    found.end()


def recall(
    *,
    model: Model,
    length: Annotated[int, typer.Option(help="Context length, tokens.")] = 4096,
    trials: Annotated[int, typer.Option(min=1, help="Contexts.")] = 4,
    policies: Policies = Policies("tidal,quest,streaming,oracle"),
    text: Text = None,
    results: Results,
) -> None:
    """Attention mass and true top tokens that each sparse layer still reads while questions are answered."""
    from springtide.evaluation.needle import Haystack
    from springtide.evaluation.recall import recall as run
    from springtide.evaluation.report import plot_lines, print_table

    results.check()
    wanted, book = policies.read(), read_text(text)
    engine = model.load()
    compared = resolved(engine, wanted)
    haystack = Haystack(engine.tokenizer, book)
    found = measured(run(engine, haystack, compared, length, trials), trials, "trials")
    results.write(found.as_json())
    rows = [asdict(row) for row in found.rows]
    print_table([{name: value for name, value in row.items() if name != "mass_by_head"} for row in rows])
    if results.plot:
        plot_lines(results.plot, _series(rows, "layer", "mass"), x="layer", y="attention mass kept")
    found.end()


def drafts(
    *,
    model: Model,
    draft: Annotated[
        str, typer.Option(help="Comma list of drafters, see generate --draft; several that are one in parentheses.")
    ] = "lookup",
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 text file, or a folder of .txt files (default: the bundled excerpt).")
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts that are cut from the text.")] = 200,
    recall: Annotated[int, typer.Option(min=0, help="Prompts that ask for facts hidden in the text, besides.")] = 0,
    length: Annotated[str, typer.Option(help="Comma list of prompt lengths, tokens, which take turns.")] = "1024,2048",
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens to decode after each prompt.")] = 128,
    temperature: Annotated[str, typer.Option(help="Comma list of temperatures.")] = "0",
    policies: Policies = Policies("dense"),
    adaptive: Annotated[
        bool, typer.Option("--adaptive", help="Leave out drafts while they do not pay, as generate does.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the places in the text.")] = 0,
    results: Results,
) -> None:
    """Drafters against the same engine without one: acceptance, speed, and whether the output is the same."""
    from springtide.engine.drafters import find_adapter
    from springtide.evaluation import drafts as evaluation
    from springtide.model.source import find_model
    from springtide.registry import split

    results.check()
    names = list(dict.fromkeys(split(draft, folders=True)))
    if not names:
        raise SpringtideError("--draft names no drafter; give at least one, such as lookup.")
    lengths, temperatures = read_numbers(length, "--length"), read_temperatures(temperature)
    wanted = policies.read()
    texts, folder = read_texts(text), find_model(model.name, model.revision).folder
    own = [name for name in names if find_adapter(name, folder) is not None]  # these change the model
    engine = model.load()
    changed = {name: model.load(draft=name) for name in own}
    contenders = evaluation.contenders(engine, changed, names, resolved(engine, wanted), adaptive)
    cutting = evaluation.passages(engine.tokenizer, texts, lengths, prompts, recall, seed)
    passages = result_of(cutting, len(texts), "texts")
    steps = evaluation.drafts(contenders, passages, temperatures, max_tokens)
    found = measured(steps, evaluation.steps(passages), "prompts")
    results.write(found.as_json())
    evaluation.show(found.rows)
    if results.plot:
        evaluation.plot(results.plot, found.rows)
    found.end()


def captioner(
    model: Annotated[str, typer.Option(help="Captioner's folder, or 'pocket' for the bundled one.")] = "pocket",
    keep: Annotated[str, typer.Option(help="Comma list of shares of the image's tokens to keep.")] = "1,0.36",
    policy: PolicyNames = "dense",
    images: Annotated[int, typer.Option(min=1, help="Scenes to ask about, which no training has seen.")] = 200,
    json_file: Json = None,
    device: Device = None,
) -> None:
    """Right answers about scenes with all image tokens and with some, and what leaving tokens out saves."""
    from springtide.evaluation.report import check_target, print_table, write_json
    from springtide.vision.captioner import Captioner
    from springtide.vision.evaluation import captioner as evaluation
    from springtide.vision.scenes import Scenes

    check_target(json_file)
    shares, policies = read_decimals(keep, "--keep"), Policies(policy).read()
    quiet_transformers()
    captioner = Captioner.load(model, device=device)
    scenes = Scenes(captioner.vit.config.image_size).held_out_scenes(images)
    steps = evaluation.evaluate(captioner, scenes, shares, policies)
    rows = list(progress(steps, len(shares) * len(policies), "asking"))
    if json_file:
        write_json(json_file, rows)
    print_table([{name: row[name] for name in evaluation.SHOWN} for row in rows])


def dependency_vit(
    *,
    model: Annotated[
        str, typer.Option(help="Comma list of folders that train dependency-vit wrote, or 'pocket', the bundled one.")
    ] = "pocket",
    data: Images = "scenes",
    images: Annotated[int, typer.Option(min=1, help="Images held out to measure on, at most.")] = 1000,
    costs: Annotated[bool, typer.Option(help="Measure operations, memory and time, too.")] = True,
    results: Results,
    device: Device = None,
) -> None:
    """Accuracy, pruning and cost of DependencyViTs; on scenes saliency and parts too. Seeds of a model go together."""
    from springtide.loading import as_device
    from springtide.vision.evaluation import dependency_vit as vision
    from springtide.vision.folder import find_vit, load_config
    from springtide.vision.training.dependency_vit import find_data

    results.check()
    folders = list(dict.fromkeys(find_vit(name.strip()) for name in model.split(",") if name.strip()))
    if not folders:
        raise SpringtideError("--model names no folder; give at least one.")
    quiet_transformers()
    configs = [load_config(folder) for folder in folders]
    source = find_data(data, configs[0].image_size)
    measured = vision.evaluate(folders, source, images, as_device(device), costs)
    found = result_of(measured, vision.steps(folders, images, costs), "measuring")
    results.write([asdict(row) for row in found])
    vision.show(found)
    if results.plot:
        vision.plot(results.plot, found)


def _series(
    rows: Sequence[dict[str, Any]], x: str, y: str, lengths: Sequence[int] = ()
) -> dict[str, tuple[list[float | None], list[float]]]:
    """Lines of ``y`` over ``x``, one for each policy (and length or budget, where there are several)."""
    budgets = {row["budget"] for row in rows if row["budget"] is not None}
    series: dict[str, tuple[list[float | None], list[float]]] = {}
    for row in rows:
        name = row["policy"]
        if len(lengths) > 1:
            name += f", {row['length']}"
        if x != "budget" and len(budgets) > 1 and row["budget"] is not None:
            name += f", budget {row['budget']}"
        xs, ys = series.setdefault(name, ([], []))
        xs.append(row[x])
        ys.append(row[y])
    return series
