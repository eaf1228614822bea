"""``springtide sweep``."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from springtide.cli.inputs import Model, Results, read_numbers
from springtide.cli.show import result_of
from springtide.errors import SpringtideError


def hidden_transfer(
    *,
    data: Annotated[Path, typer.Option(help="What to train on: as for train; best what the model wrote (distill).")],
    held: Annotated[Path | None, typer.Option(help="What to measure on (default: some of the data, held out).")] = None,
    model: Model,
    layers: Annotated[str | None, typer.Option(help="Comma list of layers (default: eight at most, evenly).")] = None,
    steps_ahead: Annotated[int, typer.Option(min=1, max=8, help="Tokens to guess ahead.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Steps of optimization.")] = 150,
    batch: Annotated[int, typer.Option(min=1, help="Windows in a step.")] = 4,
    length: Annotated[int, typer.Option(help="Tokens in a window.")] = 256,
    results: Results,
) -> None:
    """Train Hidden Transfer briefly at each of some layers and measure how often its guesses are right."""
    from springtide.evaluation.report import plot_lines, print_table
    from springtide.training.hidden_transfer import sweep
    from springtide.training.windows import training_windows

    results.check()
    engine = model.load()
    spec = engine.stack.spec
    last = spec.num_layers - 1
    places = sorted(read_numbers(layers, "--layers") if layers else range(last, 0, -math.ceil(last / 8)))
    if not places or places[-1] > last:
        raise SpringtideError(f"--layers must name layers from 1 to {last}, which is the model's last.")
    windows, rest = training_windows(data, engine, length)
    if held is not None:
        rest, _ = training_windows(held, engine, length)
    training = sweep(engine.stack, places, windows, rest.tokens, steps=steps, batch=batch, ahead=steps_ahead)
    found = result_of(training, steps + len(places), "steps")
    results.write([asdict(row) for row in found])
    print_table([{"layer": x.layer, "step": x.step, **{f"top-{n}": x.top(n) for n in (1, 2, 3, 4, 5)}} for x in found])
    if results.plot:
        lines = [
            (f"step {step}, top-{n}", [row for row in found if row.step == step], n)
            for n in (1, 5)
            for step in range(1, steps_ahead + 1)
        ]
        series = {name: ([row.layer for row in rows], [row.top(n) for row in rows]) for name, rows, n in lines}
        plot_lines(results.plot, series, x="layer of all transfers", y="accuracy")
