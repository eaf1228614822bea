"""Trains a captioner of the synthetic scenes: DependencyViT, projector and a small language model, end to end.

All that can be asked about an image is learnt in one pass. The image's tokens are rows that every exchange follows, and
an exchange sees the image and itself, not the other exchanges: a tree, as in decoding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from springtide.engine.engine import Engine
from springtide.vision.captioner import Captioner, Projector
from springtide.vision.dependency_vit import DependencyViTModel
from springtide.vision.folder import load_vit
from springtide.vision.images import DependencyViTImageProcessor
from springtide.vision.scenes import Question, SceneBatch, Scenes, questions, scenes
from springtide.vision.training.dependency_vit import LR, new_config, new_objective, parameter_groups
from springtide.vision.tree import Grid

UNKNOWN, END = "<unknown>", "<end>"
LEAST_KEPT = 0.36  # share of the image tokens
BATCH = 64  # scenes that are measured at a time


def new_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each word of the exchanges; what ends an answer is its end of sequence."""
    batch = scenes(torch.arange(256), seed=0)
    split = pre_tokenizers.Whitespace()
    words = sorted(
        {
            word
            for i in range(len(batch.body))
            for question in questions(batch, i)
            for text in (question.text, question.answer)
            for word, _ in split.pre_tokenize_str(text)
        }
    )
    vocabulary = {word: number for number, word in enumerate([UNKNOWN, END, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), split
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=UNKNOWN, eos_token=END)


def new_language_model(tokenizer: PreTrainedTokenizerFast, layers: int = 4) -> Qwen3ForCausalLM:
    """A small language model with random weights."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Qwen3ForCausalLM(config)


@dataclass(frozen=True)
class Exchanges:
    """Scenes without end, each with the tokens of all its exchanges, which are as long in every scene.

    ``lengths`` are those of each exchange: of its question, and of its answer with the end of sequence.
    """

    tokenizer: PreTrainedTokenizerFast
    scenes: Scenes

    unit = "images"

    @property
    def digest(self) -> str:
        return f"exchanges-{self.scenes.digest}"

    @cached_property
    def questions(self) -> list[Question]:
        """What is asked about every scene, with the answers about one of them."""
        return questions(scenes(torch.arange(1), seed=0), 0)

    @cached_property
    def lengths(self) -> list[tuple[int, int]]:
        return [tuple(map(len, self._encode(question))) for question in self.questions]  # type: ignore[misc]

    def batch(self, step: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
        """Images ``[size, 3, H, W]`` and tokens ``[size, T]`` of a step, new in every step."""
        found = self.scenes.batch_scenes(step, size, seed)
        return found.images, self.tokens(found)

    def count(self, images: Tensor) -> int:
        return len(images)

    def held_out(self, limit: int = 256) -> tuple[Tensor, Tensor]:
        """Images and tokens of ``limit`` scenes that no :meth:`batch` holds."""
        found = self.scenes.held_out_scenes(limit)
        return found.images, self.tokens(found)

    def tokens(self, batch: SceneBatch) -> Tensor:
        """Of all exchanges, ``[B, T]``."""
        rows = [
            [token for question in questions(batch, i) for part in self._encode(question) for token in part]
            for i in range(len(batch.body))
        ]
        return torch.tensor(rows)

    def _encode(self, question: Question) -> tuple[list[int], list[int]]:
        asked, answer = (self.tokenizer.encode(text) for text in (question.text, question.answer))
        return asked, [*answer, self.tokenizer.eos_token_id]


def starting_vit(folder: Path | None) -> DependencyViTModel:
    """The vision model in a folder, or one of pocket size with random weights; see :func:`load_vit`."""
    if folder is not None:
        return load_vit(DependencyViTModel, folder)
    vit: DependencyViTModel = new_objective("labels", new_config("pocket")).model.base_model
    return vit


class CaptionerObjective:
    """Cross-entropy of answers, with a share of the image tokens that is drawn for each step.

    Args:
        vit: the vision model, which learns too.
        data: whose tokenizer and exchanges the language model learns.
        layers: of the language model.
        lr: the highest learning rate.
    """

    name = "captioner"

    def __init__(self, vit: DependencyViTModel, data: Exchanges, layers: int = 4, lr: float = LR) -> None:
        self.vit, self.data, self.lr = vit.train(), data, lr
        self.accuracy: dict[str, dict[str, float]] | None = None
        self.model = new_language_model(data.tokenizer, layers).to(vit.device).train()
        self.projector = Projector(vit.config.hidden_size, self.model.config.hidden_size).to(vit.device)
        self.modules = nn.ModuleDict({"vit": self.vit, "model": self.model, "projector": self.projector})

    def parameter_groups(self) -> list[dict[str, Any]]:
        return parameter_groups(self.modules, self.lr)

    def state_dict(self) -> dict[str, Any]:
        return dict(self.modules.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.modules.load_state_dict(state)

    @property
    def captioner(self) -> Captioner:
        """The captioner as trained so far, in evaluation mode."""
        processor = DependencyViTImageProcessor.square(self.vit.config.image_size)
        engine = Engine(self.model, self.data.tokenizer)
        return Captioner(engine, self.vit.eval(), self.projector.eval(), processor)

    def save(self, folder: Path) -> None:
        self.captioner.save(folder)

    def loss(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Of images ``[B, 3, H, W]`` and the tokens ``[B, T]`` of their exchanges: a scalar, nats an answer's token."""
        keep = max(LEAST_KEPT, torch.rand(()).item() ** 2)  # mostly the fewest, with which it is hardest
        loss, right = self._answer(images, tokens, keep)
        return loss, {"top1": right.float().mean().item()}

    @torch.no_grad()
    def calibrate(self, images: Tensor, tokens: Tensor) -> None:
        """Measure ``accuracy``: of each question, the share of right answers, with all tokens and the fewest."""
        self.vit.eval()
        self.accuracy = {}
        asked, sizes = self.data.questions, [answer for _, answer in self.data.lengths]
        for keep in (1.0, LEAST_KEPT):
            parts = zip(torch.split(images, BATCH), torch.split(tokens, BATCH), strict=True)
            right = torch.cat([self._answer(*part, keep)[1] for part in parts])
            answers = [own.all(1).float().mean().item() for own in torch.split(right, sizes, 1)]
            self.accuracy[f"{keep:.2f}"] = {
                question.text: round(share, 4) for question, share in zip(asked, answers, strict=True)
            }

    def _answer(self, images: Tensor, tokens: Tensor, keep: float) -> tuple[Tensor, Tensor]:
        """The loss, and which tokens of the answers are the most probable ones, ``[B, answers]``."""
        found = self.vit(images, keep=keep)
        rows = torch.cat([self.projector(found.last_hidden_state), self.model.model.embed_tokens(tokens)], 1)
        start = Grid.of(images, self.vit.config.patch_size).tokens
        own = torch.cat([torch.arange(start, start + sum(exchange)) for exchange in self.data.lengths])
        positions = torch.cat([found.indices, own.to(tokens.device).expand(len(tokens), -1)], 1)
        mask = tree_mask(found.indices.shape[1], [sum(exchange) for exchange in self.data.lengths]).to(rows)
        hidden = self.model.model(inputs_embeds=rows, position_ids=positions, attention_mask=mask, use_cache=False)
        answers = self._answers.to(tokens.device)
        asked = hidden.last_hidden_state[:, found.indices.shape[1] + answers - 1]
        logits, wanted = self.model.lm_head(asked), tokens[:, answers]
        loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten())
        return loss, logits.argmax(-1) == wanted

    @cached_property
    def _answers(self) -> Tensor:
        """Which of the tokens of the exchanges are answers', ends counted."""
        starts = accumulate((sum(exchange) for exchange in self.data.lengths), initial=0)
        parts = [
            torch.arange(start + question, start + question + answer)
            for start, (question, answer) in zip(starts, self.data.lengths, strict=False)
        ]
        return torch.cat(parts)


def tree_mask(trunk: int, branches: Sequence[int]) -> Tensor:
    """0 where a row sees another, else -inf, ``[1, 1, R, R]``: a chain of ``trunk`` rows, and chains that follow it."""
    rows = trunk + sum(branches)
    branch = torch.repeat_interleave(torch.arange(-1, len(branches)), torch.tensor([trunk, *branches]))
    seen = (branch[:, None] == branch) | (branch == -1)
    return torch.zeros(rows, rows).masked_fill(~seen.tril(), float("-inf"))[None, None]
