"""Trains Medusa heads (Cai et al., arXiv 2401.10774, section 2.2): beside a frozen target, or together with it."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from springtide.drafting.medusa import Heads, Medusa
from springtide.engine.drafters import ADAPTER
from springtide.errors import SpringtideError
from springtide.files import filling
from springtide.model.stack import Stack
from springtide.training.progress import Progress

DECAY = 0.8  # weight of a head's loss, relative to the head before
GUESSES = 10  # best guesses of a head that are counted
BATCH = 8  # windows that are measured at a time
HEADS_FIRST = 0.25  # share of Medusa-2's steps in which the target does not change yet
HEADS_WEIGHT = 0.2  # of the heads' loss in Medusa-2's, the paper's lambda_0
DISTILLED_WEIGHT = 0.01  # the same for text that the target wrote
RANK, ALPHA = 32, 16  # of Medusa-2's adapter
BACKBONE_LR = 0.25  # the adapter's learning rate, as a share of the heads'


class MedusaObjective:
    """Medusa-1: K heads that learn the tokens of a text, from the hidden states of a frozen target.

    Args:
        target: the model, which stays as it is.
        heads: their number K.
        layers: residual blocks of a head.
        lm_head: ``"full"`` for an LM head for each, the target's at first, or ``"shared"`` for the target's own.
        lr: the highest learning rate.

    Attributes:
        accuracy: share of rows where each guess of each head was the target's choice, once :meth:`calibrate` measured.
    """

    name = "medusa"

    def __init__(
        self,
        target: Stack,
        heads: int = 4,
        layers: int = 1,
        lm_head: Literal["full", "shared"] = "full",
        lr: float = 1e-3,
    ) -> None:
        self.target = target
        self.model: PreTrainedModel = target.model.requires_grad_(False)
        own = self.model.lm_head.weight if lm_head == "full" else None
        self.heads = Heads.fresh(heads, layers, target.spec.hidden_size, own).to(target.device)
        self.lr = lr
        self.accuracy: list[list[float]] | None = None

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.heads.parameters()), "lr": self.lr}]

    def state_dict(self) -> dict[str, Any]:
        return {"heads": self.heads.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.heads.load_state_dict(state["heads"])

    @property
    def drafter(self) -> Medusa:
        """The drafter as trained so far."""
        return Medusa(self.heads, self.target.spec.vocab_size, self.target.fingerprint, accuracy=self.accuracy)

    def save(self, folder: Path) -> None:
        self.drafter.save(folder)

    def loss(self, tokens: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Loss of ``tokens [B, T]`` and, by head, cross-entropy (nats) and accuracy of the best 1 and 5 guesses.

        ``sum_k 0.8^k CE_k``, for ``k`` from 1 (equation 1).
        """
        with torch.no_grad():
            hidden = self.read(tokens)
        return self.heads_loss(hidden, tokens)

    def heads_loss(self, hidden: Tensor, tokens: Tensor) -> tuple[Tensor, dict[str, float]]:
        """See :meth:`loss`; of what the LM head reads, ``hidden [B, T, hidden]``."""
        shortest = self.heads.count + 2
        if tokens.shape[1] < shortest:
            raise SpringtideError(f"Windows for {self.heads.count} heads must hold {shortest} tokens or more.")
        total = hidden.new_zeros((), dtype=torch.float32)
        metrics: dict[str, float] = {}
        for step, logits in enumerate(self.guess(hidden[:, :-2]), start=1):
            guessed, wanted = logits[:, : tokens.shape[1] - step - 1].flatten(0, 1), tokens[:, step + 1 :].flatten()
            loss = F.cross_entropy(guessed, wanted)
            total = total + DECAY**step * loss
            top = (guessed.detach().topk(5).indices == wanted[:, None]).double().mean(0).cumsum(0).tolist()
            metrics |= {f"loss_{step}": loss.item(), f"top1_{step}": top[0], f"top5_{step}": top[4]}
        return total, metrics

    def read(self, tokens: Tensor) -> Tensor:
        """What the LM head reads, ``[B, T, hidden]``, of ``tokens [B, T]``."""
        hidden: Tensor = self.model.model(tokens, use_cache=False).last_hidden_state
        return hidden

    def decode(self, hidden: Tensor) -> Tensor:
        """The target's logits ``[..., V]``, with gradients, of what the LM head reads, ``[..., hidden]``."""
        return self.target.scaled(self.model.lm_head(hidden.to(self.model.dtype)))

    def guess(self, hidden: Tensor) -> Tensor:
        """The heads' logits ``[K, B, T, V]`` for what the LM head reads, ``[B, T, hidden]``."""
        logits = self.heads(hidden.flatten(0, 1).float(), lambda x: self.model.lm_head(x.to(self.model.dtype)))
        return self.target.scaled(logits).view(-1, *hidden.shape[:2], logits.shape[-1])

    @torch.no_grad()
    def calibrate(self, tokens: Tensor) -> None:
        """Measure ``accuracy`` on windows ``[N, T]``, against the target's most probable token after the same text."""
        found = torch.zeros(self.heads.count, GUESSES, dtype=torch.float64)
        for part in torch.split(tokens.to(self.target.device), BATCH):
            hidden = self.read(part)
            choices = self.decode(hidden).argmax(-1)
            for step, logits in enumerate(self.guess(hidden[:, :-1]), start=1):
                guesses = logits[:, : part.shape[1] - step].topk(GUESSES).indices
                hits = (guesses == choices[:, step:, None]).double().mean((0, 1))
                found[step - 1] += len(part) / len(tokens) * hits.cpu()
        self.accuracy = found.tolist()


class Medusa2Objective(MedusaObjective):
    """Medusa-2: the heads first, as in Medusa-1, then heads and target, whose linear layers get a LoRA adapter.

    Args:
        target: the model, whose layers are replaced by ones that add the adapter.
        progress: of the run, the first quarter of which is for the heads.
        distilled: the text was written by the target, which then learns its own former distribution instead of it.
        heads_weight: of the heads' loss in the target's, ``lambda_0``: more makes the target easier to guess, and less
            like itself (default: the paper's 0.2, or 0.01 for distilled text).

    For the others see :class:`MedusaObjective`. Raises SpringtideError if the package peft is missing.
    """

    name = "medusa2"

    def __init__(
        self,
        target: Stack,
        progress: Progress,
        heads: int = 4,
        layers: int = 1,
        lm_head: Literal["full", "shared"] = "full",
        lr: float = 1e-3,
        distilled: bool = False,
        heads_weight: float | None = None,
    ) -> None:
        super().__init__(target, heads, layers, lm_head, lr)
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError:
            raise SpringtideError(
                "Medusa-2 needs the package peft; run `pip install 'springtide[train]'`, or train Medusa-1."
            ) from None
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers in an old way
            self.adapted = get_peft_model(self.model, config)
        self.progress = progress
        self.distilled = distilled
        default = DISTILLED_WEIGHT if distilled else HEADS_WEIGHT
        self.heads_weight = default if heads_weight is None else heads_weight

    def parameter_groups(self) -> list[dict[str, Any]]:
        adapter = [parameter for parameter in self.adapted.parameters() if parameter.requires_grad]
        return [*super().parameter_groups(), {"params": adapter, "lr": BACKBONE_LR * self.lr}]

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "adapter": self._adapter()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        from peft import set_peft_model_state_dict

        super().load_state_dict(state)
        set_peft_model_state_dict(self.adapted, dict(state["adapter"]))

    def _adapter(self) -> dict[str, Tensor]:
        from peft import get_peft_model_state_dict

        tensors: dict[str, Tensor] = get_peft_model_state_dict(self.adapted, save_embedding_layers=False)
        return tensors

    def save(self, folder: Path) -> None:
        """Write the heads to ``folder`` and the adapter, in peft's format, to ``adapter`` in it."""
        super().save(folder)
        tensors = {name: tensor.bfloat16().cpu().contiguous() for name, tensor in self._adapter().items()}
        config = self.adapted.peft_config["default"].to_dict() | {"inference_mode": True, "base_model_name_or_path": ""}
        with filling(folder / ADAPTER) as temporary:
            save_file(tensors, temporary / "adapter_model.safetensors")
            (temporary / "adapter_config.json").write_text(json.dumps(config, indent=2, default=sorted))

    def loss(self, tokens: Tensor) -> tuple[Tensor, dict[str, float]]:
        """The heads' loss at first, then ``L_LM + lambda_0 * sum_k 0.8^k CE_k``.

        For distilled text ``L_LM`` is ``KL(original || adapted)``, the original being the target without its adapter,
        and ``lambda_0`` is reached by a quarter of a sine.
        ``lambda_0`` weighs what the heads ask of the target. They themselves learn at full weight: AdamW's steps would
        be the same in the long run, but at a weight that falls they stand still.
        """
        share = (self.progress.share - HEADS_FIRST) / (1 - HEADS_FIRST)
        if share < 0:
            return super().loss(tokens)
        hidden = self.read(tokens)
        logits = self.decode(hidden)
        if self.distilled:
            with torch.no_grad(), self.adapted.disable_adapter():
                original = self.decode(self.read(tokens)).log_softmax(-1)
            own = F.kl_div(logits.log_softmax(-1), original, log_target=True, reduction="none").sum(-1).mean()
            weight = self.heads_weight * math.sin(math.pi / 2 * share)
        else:
            own = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
            weight = self.heads_weight
        weighted = weight * hidden
        heads, metrics = self.heads_loss(weighted + (hidden - weighted).detach(), tokens)
        return own + heads, {"loss_lm": own.item(), **metrics}
