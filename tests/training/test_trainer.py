"""The trainer: it learns, goes on as if it had not stopped, and refuses what it cannot go on from."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from springtide.errors import SpringtideError
from springtide.training import running
from springtide.training.progress import Minutes, Steps
from springtide.training.trainer import MOST_NORM, Trainer, train
from springtide.training.windows import Windows
from tiny import tiny


class Toy:
    """Learns which token follows which, from half of the target's embedding, drawn at random."""

    name = "toy"

    def __init__(self, lr: float = 0.05) -> None:
        self.model = tiny().requires_grad_(False)
        self.head = nn.Linear(32, 97, bias=False)
        nn.init.zeros_(self.head.weight)
        self.lr = lr
        self.accuracy: list[list[float]] | None = None
        self.calls = 0
        self.spoil: Callable[[Tensor], Tensor] = lambda loss: loss

    def parameter_groups(self):
        return [{"params": [self.head.weight], "lr": self.lr}]

    def loss(self, tokens):
        assert tokens.dtype == torch.int64
        self.calls += 1
        logits = self.head(F.dropout(self.model.model.embed_tokens(tokens[:, :-1])))
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        right = (logits.argmax(-1) == tokens[:, 1:]).double().mean().item()
        return self.spoil(loss), {"loss_1": loss.item(), "top1_1": right}

    def calibrate(self, tokens):
        self.accuracy = [[self.loss(tokens)[1]["top1_1"]]]

    def state_dict(self):
        return {"head": self.head.state_dict(), "calls": self.calls}

    def load_state_dict(self, state):
        self.head.load_state_dict(state["head"])
        self.calls = state["calls"]

    def save(self, folder):
        (folder / "drafter.txt").write_text(str(self.accuracy))


# Every token is followed by another one, always the same.
COUNTING = Windows((torch.arange(40)[:, None] * 7 + torch.arange(16) * 5) % 97)


def trainer(out: Path, objective: Toy | None = None, steps: int = 12, **options) -> Trainer:
    data, progress = options.pop("data", COUNTING), options.pop("progress", Steps(steps))
    return Trainer(objective or Toy(), data, out, progress, **{"batch": 4, **options})


def test_it_learns_and_shows_it(tmp_path):
    objective = Toy()
    before = {name: tensor.clone() for name, tensor in objective.model.state_dict().items()}
    subject = trainer(tmp_path / "new" / "folder", objective, steps=40)
    train(subject)
    out = subject.out
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 41))
    assert records[-1]["loss"] < 0.8 * records[0]["loss"]
    assert list(records[0]) == ["step", "seconds", "tokens_per_second", "loss", "loss_1", "top1_1"]
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    result = subject.finish(COUNTING.tokens)
    assert result["accuracy"] == objective.accuracy
    assert (result["parameters"], result["tokens"], result["held_out_tokens"]) == (32 * 97, 40 * 4 * 16, 40 * 16)
    assert (out / "drafter.txt").read_text() == str(objective.accuracy)
    assert all(torch.equal(tensor, before[name]) for name, tensor in objective.model.state_dict().items())


class Pairs:
    """Numbers and their squares."""

    unit, digest = "numbers", "squares"

    def count(self, numbers):
        return len(numbers)

    def batch(self, step, size, seed):
        numbers = torch.arange(step, step + size).float() / 10
        return numbers, numbers**2


def test_a_batch_of_several_tensors(tmp_path):
    objective = Toy()

    def loss(numbers, squares):
        return (numbers[:, None] * objective.head.weight[:1] - squares[:, None]).square().mean(), {"top1": 0.5}

    objective.loss, objective.calibrate = loss, lambda *held_out: None
    subject = trainer(tmp_path, objective, data=Pairs())
    train(subject)
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert list(records[0]) == ["step", "seconds", "numbers_per_second", "loss", "top1"]
    result = subject.finish(torch.zeros(5), torch.zeros(5))
    assert (result["numbers"], result["held_out_numbers"]) == (12 * 4, 5)


def test_a_metric_that_most_steps_lack(tmp_path):
    objective = Toy()
    loss = objective.loss
    rare = {2: {"exact_128": 0.5}, 3: {"exact_128": 1.0}}
    objective.loss = lambda tokens: (loss(tokens)[0], rare.get(objective.calls, {}))
    subject = trainer(tmp_path, objective, steps=400)
    recent = [subject.step() for _ in range(4)]
    assert subject.figures(recent, {"seconds": 0, "count": 0})["exact_128"] == 0.75
    train(trainer(tmp_path, objective, steps=5))
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len(records) == 5 and not any("exact_128" in record for record in records)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_rate_warms_up_and_falls_to_nothing(tmp_path):
    subject = trainer(tmp_path, steps=60)
    scales = []
    while not subject.progress.done:
        scales.append(subject.progress.lr_scale)
        subject.step()
        assert subject.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05 * scales[-1])
    assert scales[:3] == pytest.approx([1 / 3, 2 / 3, 1], abs=0.01)
    assert scales[3:] == sorted(scales[3:], reverse=True)
    assert 0 < scales[-1] < 0.01


def test_a_rate_that_is_given_is_the_highest(tmp_path):
    objective = Toy()
    other = nn.Parameter(torch.zeros(1))
    objective.parameter_groups = lambda: [
        {"params": [objective.head.weight], "lr": 0.02},
        {"params": [other], "lr": 0.005},
    ]
    assert trainer(tmp_path, objective).peak_lrs == [0.02, 0.005]
    assert trainer(tmp_path, objective, lr=1.0).peak_lrs == [1.0, 0.25]


def test_matrices_may_learn_with_muon(tmp_path):
    objective = Toy()
    other = nn.Parameter(torch.zeros(1))
    objective.parameter_groups = lambda: [
        {"params": [objective.head.weight], "lr": 0.01, "muon": True},
        {"params": [other], "lr": 0.1},
    ]
    subject = trainer(tmp_path, objective, steps=60)
    assert [type(optimizer.optimizer) for optimizer in subject.optimizers] == [torch.optim.AdamW, torch.optim.Muon]
    assert subject.peak_lrs == [0.1, 0.01]
    subject.step()
    # Muon's first step is orthogonal: all singular values are about the rate, here a third of the highest, which for
    # a matrix of 97 rows and 32 columns is multiplied by the root of their ratio.
    size = torch.linalg.svdvals(objective.head.weight.detach()) / (0.01 / 3 * (97 / 32) ** 0.5)
    assert size.median() == pytest.approx(1, abs=0.35)


def test_long_gradients_are_clipped(tmp_path):
    objective = Toy()
    subject = trainer(tmp_path, objective)
    for factor, most, expected in ((1e4, MOST_NORM, MOST_NORM), (1e-4, MOST_NORM, None), (1e4, math.inf, None)):
        subject.most_norm = most
        loss, _ = objective.loss(COUNTING.tokens)
        (factor * loss).backward()
        norm = subject._clip()
        assert objective.head.weight.grad.norm() == pytest.approx(expected or norm, rel=1e-3)
        subject.optimizers[0].zero_grad()


# -- going on ------------------------------------------------------------------------------------------------------


def interrupt(subject: Trainer, at: int) -> None:
    """Press Ctrl-C during a step."""
    step = subject.step

    def step_and_interrupt():
        if subject.progress.step == at - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step()

    subject.step = step_and_interrupt
    # A shell that starts the tests in the background has them ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            train(subject)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    whole, first, second = Toy(), Toy(), Toy()
    train(trainer(tmp_path / "whole", whole))
    interrupt(trainer(tmp_path / "parts", first), at=5)
    assert first.calls == 5
    subject = trainer(tmp_path / "parts", second)
    train(subject)
    assert second.calls == whole.calls == 12
    assert torch.equal(whole.head.weight, second.head.weight)
    logs = [
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    ]
    assert [[record["step"], record["loss"]] for record in logs[0]] == [
        [record["step"], record["loss"]] for record in logs[1]
    ]


def test_a_finished_run_is_not_repeated(tmp_path):
    train(trainer(tmp_path))
    (tmp_path / "log.jsonl").unlink()
    objective = Toy()
    train(trainer(tmp_path, objective))
    assert objective.calls == 12
    assert objective.head.weight.abs().sum() > 0


def test_checkpoints_come_in_time(tmp_path, monkeypatch):
    subject = trainer(tmp_path)
    saved = []
    monkeypatch.setattr(subject, "save", lambda: saved.append(subject.progress.step))
    step = subject.step

    def slow():
        record = step()
        subject.progress.seconds = 60.0 * subject.progress.step
        return record

    monkeypatch.setattr(subject, "step", slow)
    train(subject, checkpoint_seconds=180)
    assert saved == [3, 6, 9, 12, 12]


def test_snapshots_come_with_checkpoints(tmp_path, monkeypatch):
    subject = trainer(tmp_path)
    saved = []
    monkeypatch.setattr(subject.objective, "save", lambda folder: saved.append((folder, subject.checkpoint.exists())))
    train(subject, checkpoint_seconds=1e9, snapshot=tmp_path / "snapshot")
    assert saved == []
    subject = trainer(tmp_path / "again", subject.objective)
    train(subject, checkpoint_seconds=0, snapshot=tmp_path / "snapshot")
    assert saved == [(tmp_path / "snapshot", True)] * 12


def test_a_run_of_minutes_goes_on_and_may_be_made_longer(tmp_path, monkeypatch, caplog):
    clock = itertools.count()
    monkeypatch.setattr("springtide.training.trainer.time", SimpleNamespace(monotonic=lambda: 6.0 * next(clock)))
    caplog.set_level(logging.INFO)

    def run(minutes):
        subject = trainer(tmp_path, progress=Minutes(minutes, warmup=1, final=0.0))
        train(subject)
        return subject.progress.state_dict()

    assert run(0.5) == {"step": 5, "seconds": 30, "count": 5 * 4 * 16}
    assert run(0.5)["step"] == 5
    assert run(1.0) == {"step": 10, "seconds": 60, "count": 10 * 4 * 16}
    assert "continuing at step 5, minute 0.5 of 1" in caplog.text
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(record["step"], record["tokens_per_second"]) for record in records] == [(n, 11) for n in range(1, 11)]


def test_what_was_logged_after_the_checkpoint_is_forgotten(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 2}\n{"step": 4}\n{"step": 6}\n{"st')
    running.rewind(path, 4)
    assert path.read_text() == '{"step": 2}\n{"step": 4}\n'
    path.write_text('{"step": 2}\n{"st')
    running.rewind(path, 4)
    assert path.read_text() == '{"step": 2}\n'
    running.rewind(path, 0)
    assert path.read_text() == ""


def test_another_rate_may_go_on_but_nothing_else(tmp_path):
    subject = trainer(tmp_path, options={"--heads": 3})
    subject.step()
    subject.save()
    for changed, message in (
        ({"steps": 13}, "belongs to another --steps: choose another --out"),
        ({"batch": 2, "seed": 1}, "belongs to another --batch and --seed"),
        ({"data": Windows(COUNTING.tokens[:30])}, "belongs to another data set"),
        ({"options": {"--heads": 4}}, "belongs to another --heads"),
    ):
        with pytest.raises(SpringtideError, match=message):
            trainer(tmp_path, **{"options": {"--heads": 3}, **changed}).resume()
    other = trainer(tmp_path, Toy(lr=0.01), options={"--heads": 3})
    other.resume()
    expected = 0.01 * other.progress.lr_scale
    other.step()
    assert other.optimizers[0].param_groups[0]["lr"] == pytest.approx(expected)
    assert other.progress.step == 2
    subject.checkpoint.write_bytes(b"half")
    with pytest.raises(SpringtideError, match=r"checkpoint.pt cannot be read: delete it to start anew"):
        trainer(tmp_path).resume()


# -- what goes wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda loss: loss * math.nan, "The loss is nan at step 3"),
        (lambda loss: loss * math.inf, "The loss is inf at step 3"),
        # The root of 0 has an infinite slope.
        (lambda loss: loss + (loss - loss).abs().sqrt(), "The gradient is not finite at step 3"),
    ],
)
def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(tmp_path, spoil, message):
    objective = Toy()
    subject = trainer(tmp_path, objective)
    for _ in range(3):
        subject.step()
    subject.save()
    before, weight = subject.checkpoint.read_bytes(), objective.head.weight.clone()
    objective.spoil = spoil
    with pytest.raises(SpringtideError, match=message + r": training stopped, and .*checkpoint.pt holds .* lower --lr"):
        train(subject)
    assert subject.checkpoint.read_bytes() == before
    assert torch.equal(objective.head.weight, weight)


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    subject = trainer(tmp_path)
    subject.save()
    before = subject.checkpoint.read_bytes()
    subject.step()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SpringtideError, match=r"checkpoint\.pt' cannot be written \(No space left on device\)"):
        subject.save()
    assert subject.checkpoint.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_loss_that_is_not_finite_from_the_start(tmp_path):
    objective = Toy()
    objective.spoil = lambda loss: loss * math.nan
    with pytest.raises(SpringtideError, match=r"at step 0: training stopped, and nothing was saved yet"):
        train(trainer(tmp_path, objective))
    assert [path.name for path in tmp_path.iterdir()] == []


def test_without_accelerate(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(SpringtideError, match=r"needs the package accelerate; run `pip install 'springtide\[train\]'`"):
        trainer(tmp_path)


# -- several processes ---------------------------------------------------------------------------------------------


def test_processes_share_a_batch_and_average_gradients(tmp_path, monkeypatch):
    monkeypatch.setattr(F, "dropout", lambda x: x)
    alone = Toy()
    subject = trainer(tmp_path, alone)
    monkeypatch.setattr(subject.optimizers[0], "zero_grad", lambda: None)
    subject.step()
    gradients, seen = [], []
    for index in range(2):
        objective = Toy()
        part = trainer(tmp_path, objective)
        part.accelerator = SimpleNamespace(
            num_processes=2,
            process_index=index,
            backward=part.accelerator.backward,
            clip_grad_norm_=part.accelerator.clip_grad_norm_,
            reduce=lambda gradient, how: gradients.append((gradient.clone(), how)) or gradient,
        )
        loss = objective.loss
        monkeypatch.setattr(objective, "loss", lambda tokens, loss=loss: seen.append(tokens) or loss(tokens))
        part.step()
    assert sorted(torch.cat(seen).tolist()) == sorted(COUNTING.batch(0, 4, seed=0)[0].tolist())
    assert [how for _, how in gradients] == ["mean", "mean"]
    torch.testing.assert_close((gradients[0][0] + gradients[1][0]) / 2, alone.head.weight.grad)


def test_a_batch_that_processes_cannot_share(tmp_path, monkeypatch):
    two = SimpleNamespace(num_processes=2)
    monkeypatch.setattr("springtide.training.trainer.new_accelerator", lambda _: two)
    with pytest.raises(SpringtideError, match="A batch of 3 cannot be shared by 2 processes"):
        trainer(tmp_path, batch=3)
