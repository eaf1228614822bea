"""``springtide convert``."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from springtide.cli.inputs import Model
from springtide.errors import SpringtideError


def medusa(
    source: Annotated[Path, typer.Option("--from", help="Folder with the heads, in any of the layouts.")],
    target: Annotated[Path, typer.Option("--to", help="Folder for the result.")],
    layout: Annotated[Literal["original", "vllm", "springtide"], typer.Option("--format", help="Layout to write.")],
    model: Annotated[
        str | None,
        typer.Option(help="The heads' model folder: checked, named in the result, and its LM head stored if need be."),
    ] = None,
) -> None:
    """Read Medusa heads in the original project's, vLLM's or Springtide's layout and write them in another."""

    from springtide.drafting.folder import CONFIG
    from springtide.drafting.medusa import Medusa
    from springtide.engine.drafters import ADAPTER

    if (target / CONFIG).exists():
        raise SpringtideError(f"'{target}' holds a {CONFIG} already; choose another folder for --to.")
    drafter = Medusa.load(source)
    if model is not None:
        drafter = replace(drafter.resolve(Model(model, device="cpu").load().stack), base_model=model)
    drafter.save(target, layout)
    if (source / ADAPTER).is_dir():
        warnings.warn(f"these heads are for the model with '{source / ADAPTER}' merged into it", stacklevel=1)
