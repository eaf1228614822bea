"""One trainer for all that is trained here: AdamW and Muon on accelerate, which goes on where it stopped.

Data brings batches, of tokens or of images; an objective brings what is trained, and a loss on a batch; progress says
how long the run is.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from springtide.errors import SpringtideError
from springtide.training.progress import Progress
from springtide.training.running import (
    draw,
    interruption,
    load_checkpoint,
    make_folder,
    progress_bar,
    read_records,
    record,
    rewind,
    save_checkpoint,
)

log = logging.getLogger(__name__)

MOST_NORM = 1.0  # longer gradients are clipped
CHECKPOINT_SECONDS = 180
PANELS = {"loss": "loss", "top1": "top-1 accuracy", "exact": "exact match"}  # of the curves, by how a metric begins


class Data(Protocol):
    """What there is to learn from: windows of tokens ``[B, T]``, or images and their labels.

    ``batch`` gives the ``size`` samples of a step as tensors ``[B, ...]`` on the CPU; ``digest`` tells data apart.
    ``count`` says how much the first of these tensors holds of what is counted, the ``unit``: tokens, or images.
    """

    @property
    def unit(self) -> str: ...
    @property
    def digest(self) -> str: ...
    def count(self, samples: Tensor, /) -> int: ...
    def batch(self, step: int, size: int, seed: int) -> tuple[Tensor, ...]: ...


class Objective(Protocol):
    """What is learnt.

    ``model`` is what reads a batch: a frozen target, or what is trained. ``loss`` takes the tensors of a batch, on the
    model's device, and gives the loss, a scalar, and metrics, which steps may lack: those whose names begin with
    ``loss``, ``top1`` or ``exact`` are drawn as curves. What it draws at random comes from torch's default generator.
    ``parameter_groups`` are as AdamW takes them, without weight decay unless they say so; those with ``"muon": True``,
    of matrices, are Muon's. ``state_dict`` holds all that is trained. ``calibrate`` measures ``accuracy`` on data held
    out, and ``save`` writes the result.
    """

    name: str
    model: nn.Module
    accuracy: Any

    def parameter_groups(self) -> list[dict[str, Any]]: ...
    def loss(self, *batch: Any, **_: Any) -> tuple[Tensor, dict[str, float]]: ...
    def calibrate(self, *held_out: Any, **_: Any) -> Any: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> Any: ...
    def save(self, folder: Path) -> None: ...


def new_accelerator(device: torch.device) -> Any:
    """accelerate's view of this process; raises SpringtideError if the package is missing."""
    try:
        from accelerate import Accelerator
    except ImportError:
        raise SpringtideError("Training needs the package accelerate; run `pip install 'springtide[train]'`.") from None
    return Accelerator(cpu=device.type == "cpu")


def _is_muon(group: Mapping[str, Any]) -> bool:
    return bool(group.get("muon", False))


def _optimizers(groups: Sequence[dict[str, Any]]) -> list[torch.optim.Optimizer]:
    """AdamW, then Muon, each if it has groups."""
    adam, muon = ([group for group in groups if _is_muon(group) == wanted] for wanted in (False, True))
    found: list[torch.optim.Optimizer] = []
    if adam:
        found.append(torch.optim.AdamW(adam, weight_decay=0.0))
    if muon:
        found.append(torch.optim.Muon(muon, weight_decay=0.0, adjust_lr_fn="original"))
    return found


class Trainer:
    """Objective, optimizer and progress, with everything that a checkpoint holds.

    Every process of an ``accelerate launch`` takes its share of a batch, and gradients are averaged.

    Args:
        data: in batches of ``batch`` samples a step.
        out: the folder of log, curves and checkpoint.
        progress: how long the run is.
        lr: the highest learning rate (default: the objective's; its others are in proportion).
        most_norm: longer gradients are clipped.
        seed: of the order of the data, and of what the objective draws.
        options: all else that tells this run from another: a checkpoint that has others is refused.

    Raises SpringtideError if accelerate is missing and for a batch that its processes cannot share.
    """

    def __init__(
        self,
        objective: Objective,
        data: Data,
        out: Path,
        progress: Progress,
        *,
        batch: int,
        lr: float | None = None,
        most_norm: float = MOST_NORM,
        seed: int = 0,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.objective, self.data, self.out, self.progress = objective, data, out, progress
        self.batch, self.most_norm, self.seed = batch, most_norm, seed
        own = {"objective": objective.name, "data set": data.digest, **progress.identity, "--batch": batch}
        self.identity = {**own, "--seed": seed, **(options or {})}
        self.device = next(objective.model.parameters()).device
        self.accelerator = new_accelerator(self.device)
        if batch % self.accelerator.num_processes:
            raise SpringtideError(
                f"A batch of {batch} cannot be shared by {self.accelerator.num_processes} processes; "
                "use a multiple of their number for --batch."
            )
        groups = sorted(objective.parameter_groups(), key=_is_muon)
        highest = max(group["lr"] for group in groups)
        self.peak_lrs = [group["lr"] * (1.0 if lr is None else lr / highest) for group in groups]
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.optimizers = [self.accelerator.prepare(optimizer) for optimizer in _optimizers(groups)]

    def step(self) -> dict[str, float]:
        """One step of optimization; returns the objective's metrics.

        All that it draws depends on seed and number of the step, so that a resumed run equals an uninterrupted one.
        """
        started, accelerator, progress = time.monotonic(), self.accelerator, self.progress
        torch.manual_seed(hash((self.seed, progress.step, accelerator.process_index)) & (2**63 - 1))
        try:
            batch = self.data.batch(progress.step, self.batch, self.seed)
        except SpringtideError:  # a file that cannot be read; once it is repaired, training goes on from here
            self.save()
            raise
        own = [part[accelerator.process_index :: accelerator.num_processes].to(self.device) for part in batch]
        loss, metrics = self.objective.loss(*own)
        accelerator.backward(loss)
        value, norm = loss.item(), self._clip()
        if not (math.isfinite(value) and math.isfinite(norm)):
            raise SpringtideError(self._not_finite(value))
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        for group, peak in zip(groups, self.peak_lrs, strict=True):
            group["lr"] = peak * progress.lr_scale
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        progress.step += 1
        progress.seconds += time.monotonic() - started
        progress.count += self.data.count(batch[0])
        return {"loss": value, **metrics}

    def _clip(self) -> float:
        """Average the gradients over processes and clip them; returns their norm before."""
        if self.accelerator.num_processes > 1:
            for parameter in self.parameters:
                if parameter.grad is not None:
                    parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
        return float(self.accelerator.clip_grad_norm_(self.parameters, self.most_norm))

    def figures(self, recent: Sequence[Mapping[str, float]], since: Mapping[str, float]) -> dict[str, float]:
        """What the log records of the ``recent`` steps, ``since`` which state of progress: means of their metrics."""
        progress = self.progress
        speed = (progress.count - since["count"]) / max(progress.seconds - since["seconds"], 1e-6)
        names = dict.fromkeys(name for step in recent for name in step)
        return {
            "step": progress.step,
            "seconds": round(progress.seconds, 2),
            f"{self.data.unit}_per_second": round(speed),
            **{name: round(fmean(step[name] for step in recent if name in step), 4) for name in names},
        }

    def finish(self, *held_out: Tensor) -> dict[str, Any]:
        """Measure the accuracy on data held out, save the result, and return the fields of ``train --json``."""
        self.objective.calibrate(*held_out)
        self.objective.save(self.out)
        return {
            "parameters": sum(parameter.numel() for parameter in self.parameters),
            self.data.unit: self.progress.count,
            "seconds": round(self.progress.seconds, 2),
            f"held_out_{self.data.unit}": self.data.count(held_out[0]),
            "accuracy": self.objective.accuracy,
        }

    def _not_finite(self, loss: float) -> str:
        what = f"The loss is {loss}" if not math.isfinite(loss) else "The gradient is not finite"
        saved = f"{self.checkpoint} holds the last good state" if self.checkpoint.exists() else "nothing was saved yet"
        wide = next(self.objective.model.parameters()).dtype == torch.float32
        return (
            f"{what} at step {self.progress.step}: training stopped, and {saved}; run the same command with a lower "
            f"--lr, which goes on from there{'' if wide else ', or with --dtype float32'}."
        )

    # -- checkpoint -------------------------------------------------------------------------------------------------

    @property
    def checkpoint(self) -> Path:
        return self.out / "checkpoint.pt"

    def save(self) -> None:
        """Write the checkpoint; whatever goes wrong, the previous one stays."""
        state = {
            "progress": self.progress.state_dict(),
            "objective": self.objective.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        if self.accelerator.is_main_process:
            save_checkpoint(self.checkpoint, self.identity, state)

    def resume(self) -> None:
        """Go on from the checkpoint if there is one; only the learning rate may have been another."""
        state = load_checkpoint(self.checkpoint, self.identity, self.device)
        if state is not None:
            self.objective.load_state_dict(state["objective"])
            for optimizer, moments in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(moments)
            self.progress.load_state_dict(state["progress"])
            log.info("continuing at %s", self.progress)


def train(trainer: Trainer, checkpoint_seconds: float = CHECKPOINT_SECONDS, snapshot: Path | None = None) -> None:
    """Train to the end, from the checkpoint in ``trainer.out`` if there is one.

    Writes ``log.jsonl``, ``curves.png`` and a checkpoint every few minutes there, with what the objective then saves in
    the folder ``snapshot``. Ctrl-C saves before it interrupts.
    Raises SpringtideError for a checkpoint of another run and for a loss that is not finite.
    """
    make_folder(trainer.out)
    trainer.resume()
    progress, records, leads = trainer.progress, trainer.out / "log.jsonl", trainer.accelerator.is_main_process
    if leads:
        rewind(records, progress.step)
    recent: list[dict[str, float]] = []
    saved, since = progress.seconds, progress.state_dict()
    with interruption() as interrupted, progress_bar(progress, shown=leads) as bar:
        while not progress.done:
            points = progress.points
            recent.append(trainer.step())
            bar.update(round(progress.passed - bar.n, 1))
            if progress.points > points or progress.done:
                figures = trainer.figures(recent, since)
                recent, since = [], progress.state_dict()
                if leads:
                    record(records, figures, bar, ("loss", f"{trainer.data.unit}_per_second"))
            if interrupted.is_set():
                trainer.save()
                raise KeyboardInterrupt
            if progress.seconds - saved >= checkpoint_seconds:
                saved = progress.seconds
                trainer.save()
                if leads and snapshot:
                    trainer.objective.save(snapshot)
    trainer.save()
    if leads:
        plot(records, trainer.out / "curves.png")


def plot(records: Path, picture: Path) -> None:
    """The curves of the log, over the steps of optimization."""
    rows = read_records(records)
    names = dict.fromkeys(name for row in rows for name in row)
    panels = {
        label: {name: _points(rows, name) for name in names if name.startswith(prefix)}
        for prefix, label in PANELS.items()
    }
    if rows:
        draw(picture, "steps", {label: curves for label, curves in panels.items() if curves})


def _points(rows: Sequence[Mapping[str, float]], name: str) -> tuple[list[float], list[float]]:
    found = [(row["step"], row[name]) for row in rows if name in row]
    return [step for step, _ in found], [value for _, value in found]
