"""Answers questions about images: tokens that DependencyViT keeps are the first rows of a language model's prompt.

An image of N tokens takes positions 0 to N - 1, however many of them are left, and the question goes on from N. So
pruning image tokens shortens the prompt and its cache, and moves nothing. The language half is decoded by the engine,
under any policy and with any drafter.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from springtide.engine.engine import Engine, Output
from springtide.engine.request import Request
from springtide.errors import SpringtideError
from springtide.files import filling
from springtide.loading import load
from springtide.rows.sampling import Sampling
from springtide.rows.segment import NO_TOKEN, PromptEmbeds
from springtide.vision.dependency_vit import DependencyViTModel
from springtide.vision.folder import load_vit
from springtide.vision.images import DependencyViTImageProcessor
from springtide.vision.tree import Grid

VISION = "vision"  # in a captioner's folder: that of its DependencyViT
PROJECTOR = "projector.safetensors"


class Projector(nn.Module):
    """From features of image tokens ``[..., vision]`` to what a language model's layer 0 reads, ``[..., hidden]``."""

    def __init__(self, vision: int, hidden: int) -> None:
        super().__init__()
        self.inner = nn.Linear(vision, hidden)
        self.outer = nn.Linear(hidden, hidden)

    def forward(self, features: Tensor) -> Tensor:
        projected: Tensor = self.outer(nn.functional.gelu(self.inner(features)))
        return projected


@dataclass(frozen=True, eq=False)
class Captioner:
    """A vision model, a projector, and an engine with the language model."""

    engine: Engine
    vit: DependencyViTModel
    projector: Projector
    processor: DependencyViTImageProcessor

    @classmethod
    def load(cls, folder: str | Path, **options: Any) -> Self:
        """The captioner in ``folder``; ``"pocket"`` is the bundled one, for scenes of the synthetic kind.

        Options are those of :func:`springtide.load`. Raises SpringtideError for what is missing, broken, or does not
        fit together.
        """
        folder = Path(__file__).parents[1] / "models" / "captioner" if str(folder) == "pocket" else Path(folder)
        if not (folder / PROJECTOR).is_file() or not (folder / VISION).is_dir():
            raise SpringtideError(
                f"'{folder}' is no captioner's folder: it lacks {PROJECTOR} or {VISION}/; "
                "train one with `springtide train captioner`."
            )
        vit = load_vit(DependencyViTModel, folder / VISION)
        engine = load(folder, **options)
        projector = Projector(vit.config.hidden_size, engine.stack.spec.hidden_size)
        try:
            projector.load_state_dict(load_file(folder / PROJECTOR))
        except (SafetensorError, OSError, RuntimeError):
            raise SpringtideError(
                f"'{folder / PROJECTOR}' is broken, or of another size than the models beside it; get it again."
            ) from None
        device = engine.stack.device
        processor = DependencyViTImageProcessor.from_pretrained(folder / VISION)
        return cls(engine, vit.to(device), projector.eval().to(device), processor)

    def save(self, folder: Path) -> None:
        """Write the captioner to ``folder``, in bf16; raises SpringtideError when it cannot be written."""
        with filling(folder) as temporary:
            deepcopy(self.engine.stack.model).bfloat16().save_pretrained(temporary)
            self.engine.tokenizer.save_pretrained(temporary)
            deepcopy(self.vit).bfloat16().save_pretrained(temporary / VISION)
            self.processor.save_pretrained(temporary / VISION)
            save_file(deepcopy(self.projector).bfloat16().state_dict(), temporary / PROJECTOR)

    def pixels(self, image: Any) -> Tensor:
        """An image (PIL, or an array ``[height, width, 3]``) as the vision model reads it, ``[1, 3, H, W]``."""
        values: Tensor = self.processor(image, return_tensors="pt")["pixel_values"]
        return values.to(self.engine.stack.device)

    @torch.inference_mode()
    def embeds(self, pixel_values: Tensor, keep: float | None = None) -> PromptEmbeds:
        """An image ``[1, 3, height, width]`` as the first rows of a prompt.

        ``keep`` is the share of its tokens that is left (default: the vision model's own).
        """
        return self.project(self.vit(pixel_values, keep=keep), Grid.of(pixel_values, self.vit.config.patch_size))

    @torch.inference_mode()
    def project(self, seen: Any, grid: Grid) -> PromptEmbeds:
        """The vision model's output for one image, cut as ``grid``, as the first rows of a prompt."""
        return PromptEmbeds(self.projector(seen.last_hidden_state[0]), tuple(seen.indices[0].tolist()), grid.tokens)

    def start(self, embeds: PromptEmbeds, question: str, sampling: Sampling, engine: Engine | None = None) -> Request:
        """A sequence that will answer ``question`` about an image, in ``engine`` if it has another policy or drafter.

        Raises SpringtideError for an empty question, and for words that the language model lacks.
        """
        if not question.strip():
            raise SpringtideError("There is no question; ask one, such as 'describe the picture'.")
        engine = engine or self.engine
        tokenizer, tokens = engine.tokenizer, engine.encode(question)
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in tokens:
            words = sorted(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens))
            raise SpringtideError(f"The captioner knows these words only: {' '.join(words)}.")
        return engine.start([NO_TOKEN] * len(embeds) + tokens, sampling, embeds=embeds)

    def ask(self, image: Any, question: str, keep: float | None = None, **options: Any) -> Output:
        """The answer to a question about an image (PIL, or an array ``[height, width, 3]``).

        Options are the fields of :class:`springtide.Sampling`. The tokens of the image count as the prompt's.
        """
        return self.answer(self.embeds(self.pixels(image), keep), question, **options)

    def answer(self, embeds: PromptEmbeds, question: str, **options: Any) -> Output:
        """As :meth:`ask`, about an image that was looked at before."""
        sequence = self.start(embeds, question, Sampling.of(**options))
        for _ in self.engine.run([sequence]):
            pass
        return self.engine.output(sequence)
