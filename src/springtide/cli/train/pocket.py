"""``springtide train pocket``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from springtide.cli.inputs import LAST_SEED
from springtide.cli.show import resumable
from springtide.errors import SpringtideError


def pocket(
    corpus: Annotated[Path, typer.Option(help="Folder of .txt files.")],
    out: Annotated[Path, typer.Option(help="Folder for the model, its checkpoint, log and curves.")] = Path("pocket"),
    minutes: Annotated[float, typer.Option(help="Training time.")] = 95,
    hold_out: Annotated[
        list[str] | None, typer.Option(help="File name to keep out of training; may be repeated.")
    ] = None,
    lr: Annotated[
        float | None, typer.Option(min=0.0, help="Highest learning rate, of matrices (default: the recipe's).")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=LAST_SEED, help="Seed of initial weights and data.")] = 0,
) -> None:
    """Train the pocket model from books; the same command goes on where an earlier one stopped."""
    import logging

    from springtide.training.pocket import HOLD_OUT, train_pocket

    for name in hold_out or ():
        if not (corpus / name).is_file():
            raise SpringtideError(f"--hold-out names '{name}', but there is no such .txt file in '{corpus}'.")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with resumable(out):
        train_pocket(corpus, out, minutes=minutes, hold_out=hold_out or HOLD_OUT, lr=lr, seed=seed)
    print(f"Saved the model; use it with --model {out}")
