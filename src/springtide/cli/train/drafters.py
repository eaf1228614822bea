"""``springtide train medusa``, ``medusa2``, ``hidden-transfer`` and ``longspec``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from springtide.cli.inputs import LAST_SEED, Json, Model
from springtide.cli.show import resumable
from springtide.errors import SpringtideError
from springtide.files import EXCERPT

if TYPE_CHECKING:
    from springtide.engine.engine import Engine
    from springtide.model.stack import Stack
    from springtide.training.progress import Progress
    from springtide.training.trainer import Objective

HeadCount = Annotated[int, typer.Option("--heads", min=1, max=8, help="Heads, that is tokens to guess ahead.")]
FullHeads = Annotated[
    bool, typer.Option("--full/--shared", help="An LM head for each head, or the model's own for all (smaller).")
]


@dataclass(frozen=True)
class Training:
    """The options of every drafter's training."""

    out: Annotated[Path, typer.Option(help="Folder for the drafter, its checkpoint, log and curves.")]
    model: Model
    data: Annotated[
        str,
        typer.Option(
            help="Text file, folder of .txt files, .jsonl file with tokens, text or messages in a line, or 'self': "
            "what the model itself writes."
        ),
    ] = "self"
    text: Annotated[
        Path | None, typer.Option(help="What 'self' begins with: a file or folder (default: the bundled excerpt).")
    ] = None
    prompts: Annotated[int, typer.Option(min=1, help="Texts that 'self' writes.")] = 512
    hold_out: Annotated[
        list[str] | None, typer.Option(help="File name in the folder, for calibration only; may be repeated.")
    ] = None
    steps: Annotated[int, typer.Option(min=1, help="Steps of optimization.")] = 1000
    batch: Annotated[int, typer.Option(min=1, help="Windows in a step.")] = 8
    length: Annotated[int, typer.Option(help="Tokens in a window.")] = 256
    lr: Annotated[float | None, typer.Option(min=0.0, help="Highest learning rate (default: the method's).")] = None
    seed: Annotated[
        int, typer.Option(min=0, max=LAST_SEED, help="Seed of the order of the data, and of what the model writes.")
    ] = 0
    json_file: Json = None


def medusa(training: Training, heads: HeadCount = 3, full: FullHeads = True) -> None:
    """Train Medusa heads beside the frozen model; the same command goes on where an earlier one stopped."""
    from springtide.training.medusa import MedusaObjective

    kind: Literal["full", "shared"] = "full" if full else "shared"
    _train(training, lambda target, _: MedusaObjective(target, heads, lm_head=kind), heads=heads, full=full)


def medusa2(
    training: Training,
    heads: HeadCount = 3,
    full: FullHeads = True,
    distilled: Annotated[
        bool, typer.Option("--distilled", help="The model wrote the data, and is to write as before ('self': always).")
    ] = False,
    heads_weight: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Weight of the heads' loss in the model's: more makes it easier to guess, and less like itself "
            "(default: 0.2, or 0.01 with --distilled).",
        ),
    ] = None,
) -> None:
    """Train Medusa heads, then heads and model, which gets a LoRA adapter; goes on where an earlier one stopped."""
    from springtide.training.medusa import Medusa2Objective

    kind: Literal["full", "shared"] = "full" if full else "shared"
    kept = distilled or training.data == "self"
    _train(
        training,
        lambda target, progress: Medusa2Objective(
            target, progress, heads, lm_head=kind, distilled=kept, heads_weight=heads_weight
        ),
        heads=heads,
        full=full,
        distilled=kept,
        heads_weight=heads_weight,
    )


def hidden_transfer(
    training: Training,
    steps_ahead: Annotated[
        int | None, typer.Option(min=1, max=8, help="Tokens to guess ahead (default: as many as --layers, or 3).")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Each step's transfer layer, as 6+8+10 (default: spread over the upper half).")
    ] = None,
) -> None:
    """Train maps between hidden states of the frozen model; goes on where an earlier command stopped."""
    from springtide.training.hidden_transfer import HiddenTransferObjective

    named = None if layers is None else layers.count("+") + 1
    if None not in (named, steps_ahead) and named != steps_ahead:
        raise SpringtideError(
            f"--layers is '{layers}', but --steps-ahead is {steps_ahead}; give a layer for each step."
        )
    steps = steps_ahead or named or 3
    _train(
        training,
        lambda target, _: HiddenTransferObjective(target, _transfers(layers, steps, target.spec.num_layers)),
        layers=layers,
        steps_ahead=steps,
    )


def longspec(
    training: Training,
    positions: Annotated[
        Literal["plain", "anchor", "gaps"],
        typer.Option(help="Where windows lie: from 0 on, all but 4 tokens further on, or with several gaps in them."),
    ] = "anchor",
    max_length: Annotated[
        int | None,
        typer.Option(min=1, help="Positions that windows are moved to (default: the model's, 131072 at most)."),
    ] = None,
    steps_ahead: Annotated[
        int | None, typer.Option(min=1, max=8, help="Tokens to guess ahead (default: 4, or those of --start-from).")
    ] = None,
    start_from: Annotated[
        Path | None, typer.Option(help="Folder of a longspec drafter of this model to go on training.")
    ] = None,
) -> None:
    """Train a small block that reads the frozen model's cache; goes on where an earlier command stopped."""
    from springtide.drafting.longspec import LongSpec
    from springtide.training.longspec import STEPS, LongSpecObjective

    start = None if start_from is None else LongSpec.load(start_from)
    steps = steps_ahead or (STEPS if start is None else start.steps)
    if start is not None and steps != start.steps:
        raise SpringtideError(
            f"--steps-ahead is {steps}, but the drafter of --start-from guesses {start.steps}; leave one out."
        )
    if positions == "plain" and max_length is not None:
        raise SpringtideError("--positions plain leaves windows where they are; leave out --max-length.")
    if max_length is not None and max_length < training.length:
        raise SpringtideError(
            f"--max-length is {max_length}, but windows have {training.length} tokens; raise one or lower the other."
        )
    reach = training.length if positions == "plain" else max_length
    _train(
        training,
        lambda target, _: LongSpecObjective(target, positions, reach, steps, start=start),
        positions=positions,
        max_length=max_length,
        steps_ahead=steps,
        start_from=start_from and str(start_from),
    )


def _train(training: Training, build: Callable[[Stack, Progress], Objective], **own: Any) -> None:
    """Train, calibrate and save a drafter; ``build`` makes its objective, with its ``own`` options."""
    import logging

    import torch

    from springtide.evaluation.report import check_target, print_table, write_json
    from springtide.loading import as_device
    from springtide.training.progress import Steps
    from springtide.training.running import make_folder
    from springtide.training.trainer import Trainer, new_accelerator, train
    from springtide.training.windows import training_windows

    check_target(training.json_file)
    if training.data != "self" and training.text is not None:
        raise SpringtideError("--text is what `--data self` begins with; give one of the two only.")
    accelerator = new_accelerator(as_device(training.model.device))
    device = training.model.device or str(accelerator.device)
    engine = replace(training.model, device=device).load()
    make_folder(training.out)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with resumable(training.out):
        with accelerator.main_process_first():
            data = _self_written(engine, training) if training.data == "self" else Path(training.data)
        windows, held = training_windows(data, engine, training.length, training.hold_out or (), training.seed)
        torch.manual_seed(training.seed)  # initial weights are drawn from it
        options = {f"--{name.replace('_', '-')}": value for name, value in own.items()}
        progress = Steps(training.steps)
        objective = build(engine.stack, progress)
        trainer = Trainer(
            objective,
            windows,
            training.out,
            progress,
            batch=training.batch,
            lr=training.lr,
            seed=training.seed,
            options={"--model": engine.stack.fingerprint, **options},
        )
        train(trainer)
        if not accelerator.is_main_process:
            return
        result = {"drafter": objective.name, **trainer.finish(held.tokens)}
    if training.json_file:
        write_json(training.json_file, result)
    print_table(
        [
            {"tokens_ahead": step} | {f"top-{count}": sum(accuracy[:count]) for count in range(1, 6)}
            for step, accuracy in enumerate(result["accuracy"], start=1)
        ]
    )
    print(f"Saved the drafter; use it with --draft {training.out}")


def _self_written(engine: Engine, training: Training) -> Path:
    """The file of what the model writes after excerpts of the text."""
    from springtide.training.distill import SELF, SELF_FACTS, SELF_LENGTH, Prompts, distill
    from springtide.training.windows import read_documents

    documents, _ = read_documents(training.text or EXCERPT)
    path = training.out / "self.jsonl"
    prompts = Prompts(engine, documents, SELF_LENGTH, SELF_FACTS, training.seed)
    distill(prompts, path, training.prompts, replace(SELF, seed=training.seed), batch=16)
    return path


def _transfers(layers: str | None, steps: int, num_layers: int) -> list[int]:
    """A transfer layer for each step: those given, else spread over the upper half of the model."""
    if layers is None:
        return [num_layers // 2 + step * (num_layers - num_layers // 2) // steps for step in range(steps)]
    try:
        found = [int(layer) for layer in layers.split("+")]
    except ValueError:
        raise SpringtideError(f"--layers is '{layers}', but it must be whole numbers joined by +, as 6+8+10.") from None
    if found != sorted(found) or not 0 <= found[0] <= found[-1] < num_layers:
        raise SpringtideError(f"--layers is '{layers}', but it must ascend, from 0 to {num_layers - 1} at most.")
    return found
