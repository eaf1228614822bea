"""``springtide calibrate``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from springtide.cli.inputs import Chat, Json, Model, Text, chats, read_text
from springtide.cli.show import result_of, resumable
from springtide.errors import SpringtideError


def calibrate(
    *,
    model: Model,
    dense_layers: Annotated[
        int | None, typer.Option(help="Layers, or as many KV heads, that stay dense (default: a third).")
    ] = None,
    target_kl: Annotated[
        float | None,
        typer.Option(help="Instead: as few as keep the answers' divergence from dense below this, nats a token."),
    ] = None,
    budget: Annotated[str, typer.Option(help="Tokens that a sparse layer reads per KV head, or a share as 3%.")] = "3%",
    length: Annotated[int, typer.Option(help="Context length to calibrate at, tokens.")] = 2048,
    prompts: Annotated[
        int, typer.Option(min=1, help="Contexts with questions, and plain texts, in each of three sets.")
    ] = 3,
    trials: Annotated[int, typer.Option(min=1, help="Layouts to measure for the number of layers taken.")] = 20,
    head_map: Annotated[bool, typer.Option("--map", help="Learn the map that tidal:heads=map needs too.")] = False,
    chat: Chat = None,
    text: Text = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for springtide.json and springtide.png, the curve (default: the model's own)."),
    ] = None,
    json_file: Json = None,
) -> None:
    """Choose what TidalDecode keeps dense and which layers select; the same command goes on where one was stopped.

    The curve of dense layers and budgets against divergence, bytes and time goes to springtide.png, and to --json.
    """
    from springtide.attention import parse_budget
    from springtide.attention.calibration import FILE
    from springtide.attention.tidal import Tidal
    from springtide.evaluation import calibrate as calibration
    from springtide.evaluation.report import check_target, plot_curve, print_table, write_json
    from springtide.loading import calibration_folder
    from springtide.training.running import make_folder

    check_target(json_file)
    book, tidal = read_text(text), Tidal(budget=parse_budget(budget))
    if model.name == "pocket" and out is None:
        raise SpringtideError("The bundled model is calibrated already; give --model DIR, or --out DIR to write to.")
    if out is not None:
        make_folder(out)
        check_target(out / FILE, json_file)
    engine = model.load(calibrated=False)
    wish = calibration.Wish(tidal, length, dense_layers, target_kl, prompts, trials, chats(engine, chat), head_map)
    folder = out or calibration_folder(engine.stack.model)
    make_folder(folder)
    check_target(folder / FILE, json_file)
    partial = folder / calibration.PARTIAL
    with resumable(partial):
        steps = calibration.calibrate(engine, book, wish, partial)
        found = result_of(steps, calibration.steps(engine, wish), "calibrating")
    plot_curve(folder / "springtide.png", found.curve)
    path = calibration.write(found.as_json(), folder)
    if json_file:
        write_json(json_file, [asdict(point) for point in found.curve])
    partial.unlink()
    print_table(
        [
            {
                "dense_layers": x.dense_layers,
                "full": _plus(x.full),
                "select": _plus(x.select),
                "heads": _plus(x.full_heads),
                "KL questions": x.kl_questions,
                "KL text": x.kl_text,
                "MB/token": x.kv_bytes / 1e6,
                "ms": x.predicted_ms,
            }
            for x in found.curve
            if x.budget == found.budget
        ]
    )
    print(found.said())
    print(f"Wrote the layers to {path}.")


def _plus(parts: Sequence[object]) -> str:
    return "+".join(map(str, parts)) or "-"
