"""``springtide see``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from springtide.cli.inputs import Device, Json, PolicyName, quiet_transformers
from springtide.errors import SpringtideError

MOST_ANSWERED = 64  # tokens, about an image


def see(
    image: Annotated[Path, typer.Argument(help="Image file.")],
    question: Annotated[
        str | None, typer.Option(help="What to ask about it (default: 'describe the picture').")
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            help="Folder of a captioner, or of a DependencyViT, which answers nothing; 'pocket' is the bundled "
            "captioner, which knows the synthetic scenes only."
        ),
    ] = "pocket",
    keep: Annotated[
        float | None, typer.Option(help="Share of the image's tokens to keep (default: the model's own).")
    ] = None,
    parts: Annotated[int, typer.Option(min=1, help="Parts to cut the foreground into.")] = 3,
    out: Annotated[Path | None, typer.Option(help="Draw tree, saliency, parts and kept tokens to this PNG.")] = None,
    policy: PolicyName = "dense",
    draft: Annotated[str | None, typer.Option(help="Drafter: lookup, or a drafter's folder.")] = None,
    json_file: Json = None,
    device: Device = None,
) -> None:
    """Answer a question about an image, and draw what the vision model made of it."""
    from springtide.evaluation.report import check_target, write_json
    from springtide.loading import as_device
    from springtide.vision.captioner import PROJECTOR, Captioner
    from springtide.vision.dependency_vit import DependencyViTForImageClassification
    from springtide.vision.folder import load_any
    from springtide.vision.images import DependencyViTImageProcessor, read_image
    from springtide.vision.page import draw_page
    from springtide.vision.tree import Grid, look, partitions, saliencies, trees

    check_target(json_file, out)
    if image.resolve() in (path.resolve() for path in (json_file, out) if path):
        raise SpringtideError(f"'{image}' is the image itself; choose another file for what is found.")
    picture = read_image(image)
    quiet_transformers()
    folder = Path(model).expanduser()
    alone = model != "pocket" and (folder / "config.json").exists() and not (folder / PROJECTOR).exists()
    if alone and (question or draft):
        raise SpringtideError(
            f"'{folder}' holds no captioner, so it answers nothing; leave out --question and --draft."
        )
    captioner = None if alone else Captioner.load(model, policy=policy, device=device, draft=draft)
    vit = captioner.vit if captioner else load_any(folder).to(as_device(device)).eval()
    processor = captioner.processor if captioner else DependencyViTImageProcessor.square(vit.config.image_size)
    pixels = processor(picture, return_tensors="pt")["pixel_values"].to(vit.device)
    grid, seen = Grid.of(pixels, vit.config.patch_size), look(vit, pixels, keep, masks=out is not None)
    found: dict[str, Any] = {}
    if captioner:
        question = question or "describe the picture"
        answered = captioner.answer(captioner.project(seen, grid), question, max_tokens=MOST_ANSWERED)
        found = {"question": question, **answered.as_json()}
    elif isinstance(vit, DependencyViTForImageClassification):
        score, label = vit.classifier(seen.pooler_output)[0].softmax(0).max(0)
        found = {"text": vit.config.id2label[label.item()], "score": round(score.item(), 4)}
    if answer := found.get("text"):
        print(answer)
    kept = seen.indices.shape[1]
    if out:
        salient = saliencies(seen, grid)
        [tree], [cut] = trees(seen, grid.tokens), partitions(seen, salient, parts)
        facts = {"image": image.name, "asked": question, "answer": answer, "kept": f"{kept} of {grid.tokens} tokens"}
        draw_page(out, picture, seen, tree, salient[0], cut, {name: fact for name, fact in facts.items() if fact})
    if json_file:
        write_json(json_file, {**found, "image_tokens": kept})
