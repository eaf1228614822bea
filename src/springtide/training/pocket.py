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
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from springtide.errors import SpringtideError
from springtide.files import filling
from springtide.training.data import BOS, DIGITS, EOS, Batch, Corpus, Mix, SampleMaker, read_corpus, train_tokenizer
from springtide.training.running import (
    AGAIN,
    draw,
    interruption,
    load_checkpoint,
    lr_scale,
    make_folder,
    progress_bar,
    read_records,
    record,
    rewind,
    save_checkpoint,
)

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
        device = self.frequencies.device
        tokens = torch.from_numpy(batch.tokens).to(device)
        positions = torch.from_numpy(batch.positions).to(device)
        weights = torch.from_numpy(batch.weights).to(device)
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


@dataclass
class Progress:
    """Where training stands; all of it is saved and resumed."""

    step: int = 0
    tokens: int = 0
    elapsed: float = 0.0
    stage: int = 0
    stage_started: float = 0.0
    copied: float = 0.0
    text_loss: float = math.nan
    # Running exact match of answers by length, for plain positions and for positions with gaps.
    exact: dict[int, float] = field(default_factory=dict)
    exact_gaps: dict[int, float] = field(default_factory=dict)


def _running(old: float, new: float, count: int, memory: int) -> float:
    """Exponential average over about the last `memory` observations, after `count` more with mean `new`."""
    keep = (1 - 1 / memory) ** count
    return keep * old + (1 - keep) * new


class Curriculum:
    """Chooses length, mix and positions of each batch, and moves on when recall is exact."""

    def __init__(self, recipe: Recipe, seconds: float) -> None:
        self.recipe = recipe
        self.seconds = seconds

    def advance(self, progress: Progress) -> bool:
        """Move `progress` to the next stage if its time has come."""
        stage = self.recipe.stages[progress.stage]
        share = (progress.elapsed - progress.stage_started) / self.seconds
        learnt = progress.exact.get(stage.length, 0.0) > EXACT and progress.copied > 0.9
        last = progress.stage + 1 == len(self.recipe.stages)
        if last or share < stage.least or (share < stage.most and not learnt):
            return False
        progress.stage += 1
        progress.stage_started = progress.elapsed
        return True

    def draw(self, progress: Progress, maker: SampleMaker) -> Batch:
        stage = self.recipe.stages[progress.stage]
        length = self._length(progress, maker.rng)
        gaps = 256 <= length < self.recipe.stages[-1].length and maker.rng.random() < 0.5
        # The longest samples come two at a time, so that few steps are without facts.
        tokens = self.recipe.tokens_per_step if length < 8192 else 16384
        size = max(1, round(tokens / length))
        return maker.batch(size, length, stage.mix, spread=self.recipe.spread if gaps else 0)

    def _length(self, progress: Progress, rng: np.random.Generator) -> int:
        """Mostly the stage's length; else a shorter one, or a longer one once the last stage is mastered."""
        stages = self.recipe.stages
        longest = stages[progress.stage].length
        shorter = [stage.length for stage in stages[1 : progress.stage] if stage.length >= longest // 8]
        draw = rng.random()
        if progress.stage + 1 == len(stages) and progress.exact.get(longest, 0.0) > EXACT and draw < 0.1:
            return self.recipe.bonus_length
        if shorter and draw > 0.6:
            return int(rng.choice(shorter))
        return longest


# -- trainer ---------------------------------------------------------------------------------------------


class Trainer:
    """Model, optimizers, data and progress, with everything that a checkpoint holds."""

    def __init__(
        self,
        corpus: Corpus,
        out: Path,
        *,
        minutes: float,
        seed: int,
        recipe: Recipe,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.out, self.recipe, self.seconds, self.clock = out, recipe, minutes * 60, clock
        # As JSON, so that it compares equal after a round trip through the checkpoint.
        recipe_fields = json.loads(json.dumps(asdict(recipe)))
        self.identity = {"corpus": corpus.digest, "seed": seed, "recipe": recipe_fields}
        self.tokenizer = train_tokenizer(corpus, recipe.vocab_size)
        self.maker = SampleMaker(corpus, self.tokenizer, np.random.default_rng(seed))
        torch.manual_seed(seed)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = Qwen3ForCausalLM(recipe.model_config()).to(device)
        self.network = Network(self.model, recipe.compile)
        self.optimizers, self.peak_lrs = self._optimizers()
        self.curriculum = Curriculum(recipe, self.seconds)
        self.progress = Progress()

    def _optimizers(self) -> tuple[list[torch.optim.Optimizer], list[float]]:
        embedding = self.model.model.embed_tokens.weight
        matrices = [p for p in self.model.parameters() if p.ndim == 2 and p is not embedding]
        others = [p for p in self.model.parameters() if p.ndim != 2 or p is embedding]
        recipe = self.recipe
        muon = torch.optim.Muon(
            matrices,
            lr=recipe.muon_lr,
            weight_decay=recipe.muon_weight_decay,
            momentum=0.95,
            adjust_lr_fn="original",
        )
        adam = torch.optim.AdamW(others, lr=recipe.adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        return [muon, adam], [recipe.muon_lr, recipe.adam_lr]

    @property
    def done(self) -> bool:
        return self.progress.elapsed >= self.seconds

    def step(self) -> dict[str, float]:
        """One step of optimization; returns what the log records."""
        started = self.clock()
        progress = self.progress
        batch = self.curriculum.draw(progress, self.maker)
        loss, losses, correct = self.network(batch)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise SpringtideError(
                f"The loss is {value} at step {progress.step}: training stopped, and {self.checkpoint} holds "
                "the last good state; run the same command to try again from there, or take another seed."
            )
        loss.backward()  # type: ignore[no-untyped-call]
        scale = self._lr_scale()
        for optimizer, peak in zip(self.optimizers, self.peak_lrs, strict=True):
            optimizer.param_groups[0]["lr"] = peak * scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self._observe(batch, losses.cpu().numpy(), correct.cpu().numpy())
        seconds = self.clock() - started
        progress.step += 1
        progress.tokens += batch.positions.size
        progress.elapsed += seconds
        return {
            "step": progress.step,
            "seconds": round(progress.elapsed, 2),
            "tokens": progress.tokens,
            "length": batch.length,
            "gaps": batch.gaps,
            "loss": round(value, 4),
            "text_loss": round(progress.text_loss, 4),
            "copied": round(progress.copied, 4),
            "exact": round(self._exact(batch).get(batch.length, 0.0), 4),
            "lr": round(scale, 4),
            "tokens_per_second": round(batch.positions.size / max(seconds, 1e-6)),
        }

    def _lr_scale(self) -> float:
        """Cosine over the share of time spent, after a short warm-up."""
        progress, recipe = self.progress, self.recipe
        return lr_scale(progress.step, recipe.warmup_steps, progress.elapsed / self.seconds, recipe.final_lr)

    def _exact(self, batch: Batch) -> dict[int, float]:
        return self.progress.exact_gaps if batch.gaps else self.progress.exact

    def _observe(self, batch: Batch, losses: np.ndarray, correct: np.ndarray) -> None:
        """Update the running exact match, copying accuracy and text loss."""
        progress = self.progress
        if len(batch.answers):
            rows, starts = batch.answers.T
            digits = correct[rows[:, None], starts[:, None] + np.arange(DIGITS)]
            exact, length = self._exact(batch), batch.length
            exact[length] = _running(exact.get(length, 0.0), float(digits.all(1).mean()), len(digits), 150)
        if batch.copies.any():
            mean, count = float(correct[batch.copies].mean()), int(batch.copies.sum())
            progress.copied = _running(progress.copied, mean, count, 20000)
        if batch.text.any():
            mean = float(losses[batch.text].mean())
            old = mean if math.isnan(progress.text_loss) else progress.text_loss
            progress.text_loss = _running(old, mean, int(batch.text.sum()), 200000)

    # -- checkpoint ---------------------------------------------------------------------------------------

    @property
    def checkpoint(self) -> Path:
        return self.out / "checkpoint.pt"

    def save(self) -> None:
        """Write the checkpoint; whatever goes wrong, the previous one stays."""
        state = {
            "progress": asdict(self.progress),
            "rng": self.maker.rng.bit_generator.state,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        save_checkpoint(self.checkpoint, self.identity, state)

    def resume(self) -> bool:
        """Load the checkpoint if there is one; it must come from the same corpus, seed and recipe."""
        state = load_checkpoint(self.checkpoint, self.identity, self.model.device)
        if state is None:
            return False
        self.model.load_state_dict(state["model"])
        for optimizer, moments in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(moments)
        self.maker.rng.bit_generator.state = state["rng"]
        self.progress = Progress(**state["progress"])
        return True

    def export(self, folder: Path) -> None:
        """Write the bf16 model and its tokenizer into `folder`, complete before they appear there."""
        with filling(folder, AGAIN) as temporary:
            self._write_model(temporary)

    def _write_model(self, folder: Path) -> None:
        config = self.recipe.model_config()
        config.architectures, config.dtype = ["Qwen3ForCausalLM"], "bfloat16"
        config.save_pretrained(folder)
        GenerationConfig(bos_token_id=BOS, eos_token_id=EOS).save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        # The output head is the embedding.
        weights = {
            name: tensor.to("cpu", torch.bfloat16)
            for name, tensor in self.model.state_dict().items()
            if name != "lm_head.weight"
        }
        (folder / "model.safetensors").write_bytes(safetensors.torch.save(weights, metadata={"format": "pt"}))


# -- the loop --------------------------------------------------------------------------------------------


def train_pocket(
    corpus: Path,
    out: Path,
    *,
    minutes: float = 95,
    hold_out: Sequence[str] = HOLD_OUT,
    seed: int = 0,
) -> None:
    """Train the pocket model on the .txt files of `corpus` for `minutes` and write it to `out`.

    The files named in `hold_out` are never read. If `out` holds a checkpoint of the same corpus and seed,
    training continues from it; `out/snapshot` is a usable model at every checkpoint. Ctrl-C saves a checkpoint
    before it interrupts.
    """
    books = read_corpus(corpus, hold_out)
    make_folder(out)
    run(Trainer(books, out, minutes=minutes, seed=seed, recipe=Recipe()))


def run(trainer: Trainer, checkpoint_seconds: float = 180, log_seconds: float = 30) -> None:
    """Train until the time is up, then export the model and plot its curves."""
    if trainer.resume():
        log.info("continuing at step %d, minute %.1f", trainer.progress.step, trainer.progress.elapsed / 60)
    records = trainer.out / "train_log.jsonl"
    rewind(records, trainer.progress.step)
    saved = logged = trainer.progress.elapsed
    done, total = round(trainer.progress.elapsed / 60, 3), round(trainer.seconds / 60, 3)
    form = "{l_bar}{bar}| {n:.1f}/{total:.0f} min {postfix}"
    with interruption() as interrupted, progress_bar(total, done, "min", form) as bar:
        while not trainer.done:
            values = trainer.step()
            elapsed = trainer.progress.elapsed
            bar.update(round(elapsed / 60 - bar.n, 3))
            if elapsed - logged >= log_seconds:
                logged = elapsed
                record(records, values, bar, ("length", "text_loss", "exact"))
            if trainer.curriculum.advance(trainer.progress):
                log.info("length %d", trainer.recipe.stages[trainer.progress.stage].length)
            if interrupted.is_set():
                trainer.save()
                raise KeyboardInterrupt
            if elapsed - saved >= checkpoint_seconds:
                saved = elapsed
                trainer.save()
                trainer.export(trainer.out / "snapshot")
    trainer.save()
    trainer.export(trainer.out)
    plot(records, trainer.out / "training.png")


def plot(records: Path, picture: Path) -> None:
    """Text loss, and exact match by length, over minutes."""
    rows = read_records(records)
    minutes = [row["seconds"] / 60 for row in rows]
    exact = {"copying": (minutes, [row["copied"] for row in rows])}
    for length in sorted({row["length"] for row in rows}):
        plain = [row for row in rows if row["length"] == length and not row["gaps"]]
        exact[str(length)] = ([row["seconds"] / 60 for row in plain], [row["exact"] for row in plain])
    text = {"text": (minutes, [row["text_loss"] for row in rows])}
    draw(picture, "minutes", {"text loss (nats a token)": text, "exact match": exact})
