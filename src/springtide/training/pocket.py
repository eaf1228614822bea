"""Trains the pocket model: a 2.5M-parameter Qwen3 that reads books and recalls facts over thousands of tokens.

The recipe: copying first, at length 128, until copying and recall work; then mostly recall and text, at lengths that
double whenever recall is exact again. Half of the shorter batches have gaps in their positions (PoSE, Zhu et al.
2023), so that distances far beyond the sample's length are trained early. Matrices learn with Muon, the rest with
AdamW, in bf16 with fp32 master weights.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from springtide.errors import SpringtideError
from springtide.files import filling
from springtide.training.data import BOS, DIGITS, EOS, Batch, Corpus, Mix, SampleMaker, read_corpus, train_tokenizer
from springtide.training.progress import Minutes, Progress
from springtide.training.running import AGAIN, make_folder
from springtide.training.trainer import Trainer, new_accelerator, train

log = logging.getLogger(__name__)

HOLD_OUT = ("the-adventures-of-sherlock-holmes.txt", "news-from-nowhere-or-an-epoch-of-rest-be.txt")
EXACT = 0.97


@dataclass(frozen=True)
class Stage:
    """Training at one length: its mix, and the least and most share of the whole time that it may take."""

    length: int
    mix: Mix
    least: float
    most: float


_LATER = Mix(copying=0.10, facts=0.55)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result besides corpus, seed and minutes."""

    layers: int = 12
    hidden: int = 128
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    ffn: int = 352
    vocab_size: int = 2048
    tokens_per_step: int = 10240
    muon_lr: float = 0.02
    muon_weight_decay: float = 0.05
    adam_lr: float = 3e-3
    warmup_steps: int = 50
    final_lr: float = 0.02
    spread: int = 24576
    stages: tuple[Stage, ...] = (
        Stage(128, Mix(copying=0.5, facts=0.3), 0.04, 0.16),
        Stage(256, _LATER, 0.02, 0.06),
        Stage(512, _LATER, 0.03, 0.06),
        Stage(1024, _LATER, 0.04, 0.08),
        Stage(2048, _LATER, 0.08, 0.14),
        Stage(4096, _LATER, 0.13, 0.22),
        Stage(8192, _LATER, 1.0, 1.0),
    )
    bonus_length: int = 16384
    compile: bool = True

    def model_config(self) -> Qwen3Config:
        return Qwen3Config(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden,
            intermediate_size=self.ffn,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=32768,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            tie_word_embeddings=True,
            bos_token_id=BOS,
            eos_token_id=EOS,
        )


# -- forward pass ----------------------------------------------------------------------------------------

EAGER_UP_TO = 256
BlockWeights = tuple[Tensor, ...]


def _block_weights(layer: torch.nn.Module) -> BlockWeights:
    """A Qwen3 layer's weights in the order in which `_block` takes them."""
    attention: Any = layer.self_attn
    mlp: Any = layer.mlp
    modules: list[Any] = [
        layer.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj, attention.q_norm,
        attention.k_norm, attention.o_proj, layer.post_attention_layernorm, mlp.gate_proj, mlp.up_proj, mlp.down_proj,
    ]  # fmt: skip
    return tuple(module.weight for module in modules)


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMS norm in fp32, returned in x's type."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * weight).to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _block(weights: BlockWeights, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """One Qwen3 layer; `x [B, T, hidden]` in the compute type, weights in fp32."""
    norm1, q_weight, k_weight, v_weight, q_norm, k_norm, o_weight, norm2, *ffn = weights
    gate_weight, up_weight, down_weight = ffn
    batch, length, _ = x.shape
    head_dim = q_norm.shape[0]
    qkv = F.linear(_norm(x, norm1), torch.cat((q_weight, k_weight, v_weight)).to(x.dtype))
    heads = qkv.view(batch, length, -1, head_dim).transpose(1, 2)
    q, k, v = torch.split(heads, [w.shape[0] // head_dim for w in (q_weight, k_weight, v_weight)], dim=1)
    q, k = _rotate(_norm(q, q_norm), cos, sin), _rotate(_norm(k, k_norm), cos, sin)
    mixed = _attention(q, k, v).transpose(1, 2).reshape(batch, length, -1)
    x = x + F.linear(mixed, o_weight.to(x.dtype))
    gate, up = F.linear(_norm(x, norm2), torch.cat((gate_weight, up_weight)).to(x.dtype)).chunk(2, dim=-1)
    return x + F.linear(F.silu(gate) * up, down_weight.to(x.dtype))


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention; on CPU, SDPA's backward pass is slower than plain products on short samples."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    length = q.shape[2]
    if q.is_cuda or length > EAGER_UP_TO:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    rows = torch.arange(length, device=q.device)
    scores = scores.masked_fill(rows[:, None] < rows, -torch.inf)
    return torch.matmul(scores.softmax(-1).to(v.dtype), v)


def _head(
    x: Tensor, norm: Tensor, embedding: Tensor, targets: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted loss, each target's cross entropy and whether it is the most probable token."""
    logits = F.linear(_norm(x, norm), embedding.to(x.dtype)).float()
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    return (losses * weights).sum(), losses.detach(), logits.argmax(-1) == targets


class Network:
    """The model's forward pass for training, on the parameters of a Hugging Face model."""

    def __init__(self, model: Qwen3ForCausalLM, compiled: bool) -> None:
        self.model = model
        self.compute = torch.bfloat16
        config = model.config
        exponents = torch.arange(0, config.head_dim, 2, device=model.device).float() / config.head_dim
        self.frequencies = config.rope_parameters["rope_theta"] ** -exponents
        self.block: Callable[..., Tensor] = _block
        self.head: Callable[..., tuple[Tensor, Tensor, Tensor]] = _head
        if compiled:
            # One graph for all layers and one a length.
            torch._dynamo.config.recompile_limit = 64
            self.block = torch.compile(_block, dynamic=False)
            self.head = torch.compile(_head, dynamic=False)

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        tokens, positions, weights, *_ = batch
        angles = positions[:, None, :, None].float() * self.frequencies
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos().to(self.compute), angles.sin().to(self.compute)
        decoder: Any = self.model.model
        embedding = decoder.embed_tokens.weight
        x = F.embedding(tokens[:, :-1], embedding).to(self.compute)
        for layer in decoder.layers:
            x = self.block(_block_weights(layer), x, cos, sin)
        return self.head(x, decoder.norm.weight, embedding, tokens[:, 1:].contiguous(), weights)


# -- curriculum ------------------------------------------------------------------------------------------


def _running(old: float, new: float, count: int, memory: int) -> float:
    """Exponential average over about the last `memory` observations, after `count` more with mean `new`."""
    keep = (1 - 1 / memory) ** count
    return keep * old + (1 - keep) * new


class Curriculum:
    """The data: chooses length, mix and positions of each batch, and moves on when recall is exact.

    Attributes:
        stage, since: what is learnt now, and how much of the run was over when that began.
        copied: running accuracy of copies.
        exact: running exact match of answers by length, where positions have no gaps.
    """

    unit = "tokens"

    def __init__(self, recipe: Recipe, corpus: Corpus, tokenizer: PreTrainedTokenizerFast, progress: Progress) -> None:
        self.recipe, self.progress, self.digest = recipe, progress, corpus.digest
        self.maker = SampleMaker(corpus, tokenizer, np.random.default_rng())
        self.stage, self.since, self.copied = 0, 0.0, 0.0
        self.exact: dict[int, float] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"stage": self.stage, "since": self.since, "copied": self.copied, "exact": self.exact}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.stage, self.since, self.copied, self.exact = (state[k] for k in ("stage", "since", "copied", "exact"))

    def count(self, tokens: Tensor) -> int:
        return tokens[:, 1:].numel()

    def batch(self, step: int, size: int, seed: int) -> Batch:
        """Samples of about `size` tokens in all."""
        self.advance()
        self.maker.rng = np.random.default_rng((seed, step))
        length = self._length(self.maker.rng)
        gaps = 256 <= length < self.recipe.stages[-1].length and self.maker.rng.random() < 0.5
        # The longest samples come two at a time, so that few steps are without facts.
        tokens = size if length < 8192 else 16384
        mix = self.recipe.stages[self.stage].mix
        return self.maker.batch(max(1, round(tokens / length)), length, mix, spread=self.recipe.spread if gaps else 0)

    def advance(self) -> None:
        """Move to the next stage if its time has come."""
        stage = self.recipe.stages[self.stage]
        share = (self.progress.passed - self.since) / self.progress.length
        learnt = self.exact.get(stage.length, 0.0) > EXACT and self.copied > 0.9
        last = self.stage + 1 == len(self.recipe.stages)
        if not last and share >= stage.least and (learnt or share >= stage.most):
            self.stage += 1
            self.since = self.progress.passed
            log.info("length %d", self.recipe.stages[self.stage].length)

    def _length(self, rng: np.random.Generator) -> int:
        """Mostly the stage's length; else a shorter one, or a longer one once the last stage is mastered."""
        stages = self.recipe.stages
        longest = stages[self.stage].length
        shorter = [stage.length for stage in stages[1 : self.stage] if stage.length >= longest // 8]
        draw = rng.random()
        if self.stage + 1 == len(stages) and self.exact.get(longest, 0.0) > EXACT and draw < 0.1:
            return self.recipe.bonus_length
        if shorter and draw > 0.6:
            return int(rng.choice(shorter))
        return longest

    def observe(self, batch: Batch, losses: Tensor, correct: Tensor) -> dict[str, float]:
        """Take note of the targets' losses, and of which were right, `[B, T]`; returns metrics."""
        metrics: dict[str, float] = {"length": batch.length}
        if batch.text.any():
            metrics["loss_text"] = losses[batch.text].mean().item()
        if batch.copies.any():
            metrics["top1_copies"] = share = correct[batch.copies].float().mean().item()
            self.copied = _running(self.copied, share, int(batch.copies.sum()), 20000)
        if batch.answers.any():
            rows, starts = batch.answers.nonzero(as_tuple=True)
            digits = correct[rows[:, None], starts[:, None] + torch.arange(DIGITS, device=rows.device)]
            share = digits.all(1).float().mean().item()
            if batch.gaps:
                metrics[f"gaps_exact_{batch.length}"] = share
            else:
                metrics[f"exact_{batch.length}"] = share
                self.exact[batch.length] = _running(self.exact.get(batch.length, 0.0), share, len(rows), 150)
        return metrics


# -- objective -------------------------------------------------------------------------------------------


class PocketObjective:
    """All that a sample holds: text, copies, and answers to questions, each weighing the same."""

    name = "pocket"
    accuracy = None

    def __init__(
        self, recipe: Recipe, device: torch.device, tokenizer: PreTrainedTokenizerFast, curriculum: Curriculum
    ) -> None:
        self.recipe, self.tokenizer, self.curriculum = recipe, tokenizer, curriculum
        self.model = Qwen3ForCausalLM(recipe.model_config()).to(device)
        self.network = Network(self.model, recipe.compile)

    def parameter_groups(self) -> list[dict[str, Any]]:
        embedding, recipe = self.model.model.embed_tokens.weight, self.recipe
        matrices = [p for p in self.model.parameters() if p.ndim == 2 and p is not embedding]
        others = [p for p in self.model.parameters() if p.ndim != 2 or p is embedding]
        return [
            {"params": matrices, "lr": recipe.muon_lr, "weight_decay": recipe.muon_weight_decay, "muon": True},
            {"params": others, "lr": recipe.adam_lr, "betas": (0.9, 0.95), "fused": True},
        ]

    def loss(self, *batch: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Of the tensors of a :class:`Batch`, with what the curriculum goes by; one step of training a call."""
        parts = Batch(*batch)
        loss, losses, correct = self.network(parts)
        return loss, self.curriculum.observe(parts, losses, correct)

    def calibrate(self, *held_out: Tensor) -> None:
        """There is no accuracy to measure: `springtide eval needle` does."""

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "curriculum": self.curriculum.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.curriculum.load_state_dict(state["curriculum"])

    def save(self, folder: Path) -> None:
        """Write the bf16 model and its tokenizer into `folder`, complete before they appear there."""
        config = self.recipe.model_config()
        config.architectures, config.dtype = ["Qwen3ForCausalLM"], "bfloat16"
        # The output head is the embedding.
        weights = {
            name: tensor.to("cpu", torch.bfloat16)
            for name, tensor in self.model.state_dict().items()
            if name != "lm_head.weight"
        }
        with filling(folder, AGAIN) as temporary:
            config.save_pretrained(temporary)
            GenerationConfig(bos_token_id=BOS, eos_token_id=EOS).save_pretrained(temporary)
            self.tokenizer.save_pretrained(temporary)
            content = safetensors.torch.save(weights, metadata={"format": "pt"})
            (temporary / "model.safetensors").write_bytes(content)


# -- training --------------------------------------------------------------------------------------------


def new_trainer(
    corpus: Corpus, out: Path, recipe: Recipe, *, minutes: float, seed: int, lr: float | None = None
) -> Trainer:
    """The trainer of a pocket model; raises SpringtideError if accelerate is missing, and in one process of several."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if new_accelerator(device).num_processes > 1:  # each would go by its own time
        raise SpringtideError("One process trains the pocket model; run the command without torchrun or accelerate.")
    progress = Minutes(minutes, recipe.warmup_steps, recipe.final_lr)
    tokenizer = train_tokenizer(corpus, recipe.vocab_size)
    curriculum = Curriculum(recipe, corpus, tokenizer, progress)
    torch.manual_seed(seed)  # initial weights are drawn from it
    objective = PocketObjective(recipe, device, tokenizer, curriculum)
    return Trainer(
        objective,
        curriculum,
        out,
        progress,
        batch=recipe.tokens_per_step,
        lr=lr,
        most_norm=math.inf,
        seed=seed,
        # As JSON, so that it compares equal after a round trip through the checkpoint.
        options={"recipe": json.loads(json.dumps(asdict(recipe)))},
    )


def train_pocket(
    corpus: Path,
    out: Path,
    *,
    minutes: float = 95,
    hold_out: Sequence[str] = HOLD_OUT,
    lr: float | None = None,
    seed: int = 0,
) -> None:
    """Train the pocket model on the .txt files of `corpus` for `minutes` and write it to `out`.

    The files named in `hold_out` are never read. If `out` holds a checkpoint of the same corpus and seed, training
    continues from it, with another `lr` or more `minutes` if wanted; `out/snapshot` is a usable model at every
    checkpoint. Ctrl-C saves a checkpoint before it interrupts.
    """
    if not 0 < minutes < math.inf:
        raise SpringtideError(f"--minutes is {minutes:g}, but it must be above 0, and finite.")
    books = read_corpus(corpus, hold_out)
    make_folder(out)
    trainer = new_trainer(books, out, Recipe(), minutes=minutes, seed=seed, lr=lr)
    train(trainer, snapshot=out / "snapshot")
    trainer.objective.save(out)
