"""One trainer for all drafters: AdamW on accelerate, which goes on where it stopped.

An objective brings the frozen target, what is trained, and a loss on windows of tokens.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from springtide.errors import SpringtideError
from springtide.training.running import (
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
from springtide.training.windows import Windows

log = logging.getLogger(__name__)

WARMUP = 0.05  # share of the steps
MOST_NORM = 1.0  # longer gradients are clipped
POINTS = 100  # of the curves
CHECKPOINT_SECONDS = 180


class Objective(Protocol):
    """What a drafter learns by.

    ``model`` is the frozen target. ``loss`` gives the loss of windows ``[B, T]`` (int64, on the target's device), a
    scalar, and metrics: ``top1_k`` is the share of tokens that step ``k``'s best guess got right. What it draws at
    random it draws from torch's default generator. ``state_dict`` holds all that is trained. ``calibrate`` measures
    ``accuracy`` on windows (the share of tokens that each guess of each step gets right), and ``save`` writes the
    drafter.
    """

    name: str
    model: nn.Module
    accuracy: list[list[float]] | None

    def parameter_groups(self) -> list[dict[str, Any]]: ...
    def loss(self, tokens: Tensor) -> tuple[Tensor, dict[str, float]]: ...
    def calibrate(self, tokens: Tensor) -> Any: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> Any: ...
    def save(self, folder: Path) -> None: ...


def new_accelerator(device: torch.device) -> Any:
    """accelerate's view of this process; raises SpringtideError if the package is missing."""
    try:
        from accelerate import Accelerator
    except ImportError:
        raise SpringtideError(
            "Training drafters needs the package accelerate; run `pip install 'springtide[train]'`."
        ) from None
    return Accelerator(cpu=device.type == "cpu")


class Trainer:
    """Objective, optimizer and progress, with everything that a checkpoint holds.

    Every process of an ``accelerate launch`` takes its share of a batch, and gradients are averaged.

    Args:
        windows: of tokens, in batches of ``batch`` for each of the ``steps`` steps.
        out: the folder of log, curves and checkpoint.
        lr: the highest learning rate (default: the objective's; its others are in proportion).
        seed: of the order of the windows, and of what the objective draws.
        options: all else that tells this run from another: a checkpoint that has others is refused.

    Raises SpringtideError if accelerate is missing and for a batch that its processes cannot share.
    """

    def __init__(
        self,
        objective: Objective,
        windows: Windows,
        out: Path,
        *,
        steps: int,
        batch: int,
        lr: float | None = None,
        seed: int = 0,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.objective, self.windows, self.out = objective, windows, out
        self.steps, self.batch, self.seed = steps, batch, seed
        own = {"objective": objective.name, "--data": windows.digest, "--steps": steps, "--batch": batch}
        self.identity = {**own, "--seed": seed, **(options or {})}
        self.device = next(objective.model.parameters()).device
        self.accelerator = new_accelerator(self.device)
        if batch % self.accelerator.num_processes:
            raise SpringtideError(
                f"A batch of {batch} windows cannot be shared by {self.accelerator.num_processes} processes; "
                "use a multiple of their number for --batch."
            )
        groups = objective.parameter_groups()
        highest = max(group["lr"] for group in groups)
        self.peak_lrs = [group["lr"] * (1.0 if lr is None else lr / highest) for group in groups]
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.optimizer = self.accelerator.prepare(torch.optim.AdamW(groups, weight_decay=0.0))
        self.done_steps = 0
        self.elapsed = 0.0

    @property
    def done(self) -> bool:
        return self.done_steps >= self.steps

    def step(self) -> dict[str, float]:
        """One step of optimization; returns the objective's metrics.

        All that it draws depends on seed and number of the step, so that a resumed run equals an uninterrupted one.
        """
        started, accelerator = time.monotonic(), self.accelerator
        torch.manual_seed(hash((self.seed, self.done_steps, accelerator.process_index)) & (2**63 - 1))
        windows = self.windows.batch(self.done_steps, self.batch, self.seed)
        own = windows[accelerator.process_index :: accelerator.num_processes]
        loss, metrics = self.objective.loss(own.to(self.device))
        accelerator.backward(loss)
        value, norm = loss.item(), self._clip()
        if not (math.isfinite(value) and math.isfinite(norm)):
            raise SpringtideError(self._not_finite(value))
        for group, peak in zip(self.optimizer.param_groups, self.peak_lrs, strict=True):
            group["lr"] = peak * self.lr_scale
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.done_steps += 1
        self.elapsed += time.monotonic() - started
        return {"loss": value, **metrics}

    @property
    def lr_scale(self) -> float:
        """The next step's learning rate, as a share of the highest."""
        return lr_scale(self.done_steps, max(1, round(WARMUP * self.steps)), self.done_steps / self.steps, final=0.0)

    def _clip(self) -> float:
        """Average the gradients over processes and clip them; returns their norm before."""
        if self.accelerator.num_processes > 1:
            for parameter in self.parameters:
                if parameter.grad is not None:
                    parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
        return float(self.accelerator.clip_grad_norm_(self.parameters, MOST_NORM))

    def figures(self, recent: Sequence[Mapping[str, float]], seconds: float) -> dict[str, float]:
        """What the log records of the ``recent`` steps, which took ``seconds``: means of their metrics."""
        windows = self.batch * len(recent)
        return {
            "step": self.done_steps,
            "seconds": round(self.elapsed, 2),
            "tokens_per_second": round(windows * self.windows.tokens.shape[1] / max(seconds, 1e-6)),
            **{name: round(sum(step[name] for step in recent) / len(recent), 4) for name in recent[0]},
        }

    def finish(self, held_out: Windows) -> dict[str, Any]:
        """Calibrate the drafter on windows, save it, and return the documented fields of ``train --json``."""
        self.objective.calibrate(held_out.tokens)
        self.objective.save(self.out)
        return {
            "drafter": self.objective.name,
            "parameters": sum(parameter.numel() for parameter in self.parameters),
            "tokens": self.steps * self.batch * self.windows.tokens.shape[1],
            "seconds": round(self.elapsed, 2),
            "held_out_tokens": held_out.tokens.numel(),
            "accuracy": self.objective.accuracy,
        }

    def _not_finite(self, loss: float) -> str:
        what = f"The loss is {loss}" if not math.isfinite(loss) else "The gradient is not finite"
        saved = f"{self.checkpoint} holds the last good state" if self.checkpoint.exists() else "nothing was saved yet"
        return (
            f"{what} at step {self.done_steps}: training stopped, and {saved}; run the same command with a lower --lr, "
            "which goes on from there, or with --dtype float32."
        )

    # -- checkpoint -------------------------------------------------------------------------------------------------

    @property
    def checkpoint(self) -> Path:
        return self.out / "checkpoint.pt"

    def save(self) -> None:
        """Write the checkpoint; whatever goes wrong, the previous one stays."""
        state = {
            "step": self.done_steps,
            "elapsed": self.elapsed,
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        if self.accelerator.is_main_process:
            save_checkpoint(self.checkpoint, self.identity, state)

    def resume(self) -> None:
        """Go on from the checkpoint if there is one; only the learning rate may have been another."""
        state = load_checkpoint(self.checkpoint, self.identity, self.device)
        if state is not None:
            self.objective.load_state_dict(state["objective"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.done_steps, self.elapsed = state["step"], state["elapsed"]
            log.info("continuing at step %d of %d", self.done_steps, self.steps)


def train(trainer: Trainer, checkpoint_seconds: float = CHECKPOINT_SECONDS) -> None:
    """Train to the last step, from the checkpoint in ``trainer.out`` if there is one.

    Writes ``log.jsonl``, ``curves.png`` and a checkpoint every few minutes there. Ctrl-C saves before it interrupts.
    Raises SpringtideError for a checkpoint of another run and for a loss that is not finite.
    """
    make_folder(trainer.out)
    trainer.resume()
    records, leads = trainer.out / "log.jsonl", trainer.accelerator.is_main_process
    if leads:
        rewind(records, trainer.done_steps)
    every = max(1, trainer.steps // POINTS)
    recent: list[dict[str, float]] = []
    saved = logged = trainer.elapsed
    with interruption() as interrupted, progress_bar(trainer.steps, trainer.done_steps, "step", shown=leads) as bar:
        while not trainer.done:
            recent.append(trainer.step())
            bar.update()
            if trainer.done_steps % every == 0 or trainer.done:
                figures = trainer.figures(recent, trainer.elapsed - logged)
                recent, logged = [], trainer.elapsed
                if leads:
                    record(records, figures, bar, ("loss", "tokens_per_second"))
            if interrupted.is_set():
                trainer.save()
                raise KeyboardInterrupt
            if trainer.elapsed - saved >= checkpoint_seconds:
                saved = trainer.elapsed
                trainer.save()
    trainer.save()
    if leads:
        plot(records, trainer.out / "curves.png")


def plot(records: Path, picture: Path) -> None:
    """The losses, and each step's top-1 accuracy, over the steps of optimization."""
    rows = read_records(records)
    if not rows:
        return
    panels = {}
    for label, prefix in (("loss", "loss"), ("top-1 accuracy", "top1_")):
        names = [name for name in rows[-1] if name.startswith(prefix)]
        if names:
            panels[label] = {name: _points([row for row in rows if name in row], name) for name in names}
    draw(picture, "steps", panels)


def _points(rows: Sequence[Mapping[str, float]], name: str) -> tuple[list[float], list[float]]:
    return [row["step"] for row in rows], [row[name] for row in rows]
