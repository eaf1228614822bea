"""``springtide train dependency-vit`` and ``captioner``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from springtide.cli.inputs import LAST_SEED, Device, Images, Json, quiet_transformers
from springtide.cli.show import resumable
from springtide.errors import SpringtideError


def dependency_vit(
    data: Images,
    out: Annotated[Path, typer.Option(help="Folder for the model, its checkpoint, log and curves.")],
    model: Annotated[
        str | None, typer.Option(help="pocket (the default), tiny or small, or a name that create_model takes.")
    ] = None,
    start: Annotated[
        Path | None, typer.Option("--from", help="Model folder to go on from, such as one of --objective masked.")
    ] = None,
    objective: Annotated[
        Literal["labels", "masked"],
        typer.Option(help="Learn from labels, or to paint patches that are hidden, which needs none."),
    ] = "labels",
    image_size: Annotated[
        int | None, typer.Option(min=1, max=4096, help="Pixels of a side (default: the model's).")
    ] = None,
    patch_size: Annotated[
        int | None, typer.Option(min=1, help="Pixels of a token's side (default: the model's).")
    ] = None,
    attention: Annotated[
        Literal["reversed", "forward"] | None,
        typer.Option(help="Who chooses: children, or parents as in a plain ViT, a control (default: reversed)."),
    ] = None,
    no_head_selector: Annotated[
        bool, typer.Option("--no-head-selector", help="Control: tokens send by all heads alike.")
    ] = False,
    no_controller: Annotated[bool, typer.Option("--no-controller", help="Control: tokens never send less.")] = False,
    keep: Annotated[
        float,
        typer.Option(help="Share of the tokens that is left at the end; trained so, a model does well with more."),
    ] = 1.0,
    prune_by: Annotated[
        Literal["controller", "received", "norm", "random"] | None,
        typer.Option(help="What tokens are kept for (default: the first of these that the model has)."),
    ] = None,
    steps: Annotated[int, typer.Option(min=0, help="Steps of optimization; 0 makes an untrained control.")] = 2000,
    batch: Annotated[int, typer.Option(min=1, help="Images in a step.")] = 64,
    lr: Annotated[float, typer.Option(min=0.0, help="Highest learning rate, of matrices; others have a fifth.")] = 5e-3,
    seed: Annotated[
        int, typer.Option(min=0, max=LAST_SEED, help="Seed of initial weights, of the data and of what is drawn.")
    ] = 0,
    json_file: Json = None,
    device: Device = None,
) -> None:
    """Train a DependencyViT, or a control of it; the same command goes on where an earlier one stopped."""
    import logging

    import torch

    from springtide.evaluation.report import check_target, write_json
    from springtide.loading import as_device
    from springtide.training.progress import Steps
    from springtide.training.running import make_folder
    from springtide.training.trainer import Trainer, new_accelerator, train
    from springtide.vision.folder import load_config
    from springtide.vision.training import dependency_vit as vision

    check_target(json_file)
    if objective == "masked" and (keep != 1 or prune_by is not None):
        raise SpringtideError("--objective masked keeps all tokens; leave out --keep and --prune-by.")
    shape = {"image_size": image_size, "patch_size": patch_size, "attention": attention}
    shape |= {"head_selector": False} if no_head_selector else {}
    shape |= {"controller": False} if no_controller else {}
    own = {name: value for name, value in shape.items() if value is not None}
    if start is not None and (own or model is not None):
        raise SpringtideError(
            "The model in --from has its sizes and parts already; leave out the options that set them."
        )
    quiet_transformers()
    place = as_device(device)
    accelerator = new_accelerator(place)
    config = vision.new_config(model or "pocket", **own) if start is None else load_config(start)
    images = vision.find_data(data, config.image_size)
    held_out = images.held_out(vision.HELD_OUT)  # read now, lest a damaged file be met after hours of training
    origin = start and str(start)
    record = {
        "objective": objective,
        "from": origin,
        "data": data,
        "steps": steps,
        "batch": batch,
        "lr": lr,
        "seed": seed,
    }
    config = vision.adapted(config, images.classes, keep, prune_by, record)
    make_folder(out)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.manual_seed(seed)  # initial weights are drawn from it
    learner = vision.new_objective(objective, config, start)
    learner.model.to(accelerator.device if device is None else place)
    with resumable(out):
        options = {"--from": origin, **vision.identity(config)}
        trainer = Trainer(
            learner, vision.Ahead(images), out, Steps(steps), batch=batch, lr=lr, seed=seed, options=options
        )
        train(trainer)
        if not accelerator.is_main_process:
            return
        result = {"objective": objective, **trainer.finish(*held_out)}
    if json_file:
        write_json(json_file, result)
    found = "" if result["accuracy"] is None else f", which names {result['accuracy']:.1%} of images held out rightly"
    print(f"Saved the model in {out}{found}.")


def captioner(
    out: Annotated[Path, typer.Option(help="Folder for the captioner, its checkpoint, log and curves.")],
    start: Annotated[
        Path | None, typer.Option("--from", help="DependencyViT's folder to begin with (default: random weights).")
    ] = None,
    layers: Annotated[int, typer.Option(min=1, help="Layers of the language model.")] = 4,
    steps: Annotated[int, typer.Option(min=1, help="Steps of optimization.")] = 2800,
    batch: Annotated[int, typer.Option(min=1, help="Scenes in a step.")] = 64,
    lr: Annotated[float, typer.Option(min=0.0, help="Highest learning rate, of matrices; others have a fifth.")] = 5e-3,
    seed: Annotated[int, typer.Option(min=0, max=LAST_SEED, help="Seed of initial weights and of the scenes.")] = 0,
    json_file: Json = None,
    device: Device = None,
) -> None:
    """Train a captioner of synthetic scenes end to end; the same command goes on where an earlier one stopped."""
    import logging

    import torch

    from springtide.evaluation.report import check_target, write_json
    from springtide.loading import as_device
    from springtide.training.progress import Steps
    from springtide.training.running import make_folder
    from springtide.training.trainer import Trainer, new_accelerator, train
    from springtide.vision.scenes import Scenes
    from springtide.vision.training.captioner import CaptionerObjective, Exchanges, new_tokenizer, starting_vit

    check_target(json_file)
    quiet_transformers()
    place = as_device(device)
    accelerator = new_accelerator(place)
    torch.manual_seed(seed)  # initial weights are drawn from it
    vit = starting_vit(start).to(accelerator.device if device is None else place)
    data = Exchanges(new_tokenizer(), Scenes(vit.config.image_size))
    objective = CaptionerObjective(vit, data, layers)
    make_folder(out)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = {"--from": start and str(start), "--layers": layers}
    with resumable(out):
        trainer = Trainer(objective, data, out, Steps(steps), batch=batch, lr=lr, seed=seed, options=options)
        train(trainer)
        if not accelerator.is_main_process:
            return
        result = trainer.finish(*data.held_out())
    if json_file:
        write_json(json_file, result)
    print(f"Saved the captioner; ask it with springtide see IMAGE --model {out}")
