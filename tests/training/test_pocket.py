"""The pocket model's samples, curriculum, checkpoints and failures, on a model of one layer."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from springtide import facts
from springtide.errors import SpringtideError
from springtide.training.data import (
    ANSWER,
    BOOK_WEIGHT,
    DIGIT_WEIGHT,
    DIGITS,
    EOS,
    Corpus,
    Mix,
    SampleMaker,
    read_corpus,
    train_tokenizer,
)
from springtide.training.pocket import Curriculum, Recipe, Stage, new_trainer
from springtide.training.progress import Minutes
from springtide.training.trainer import Trainer, train

SENTENCES = (
    "The ship left the harbour at dawn. Nobody saw it go! Was it the fog, or the hour? "
    "An old man counted 1984 waves and wrote them down.\n\n"
    '"You never know," he said, "which of them comes back."\n'
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "first.txt").write_text(SENTENCES * 60, encoding="utf-8")
    (folder / "second.txt").write_text("A café stood by the sea. " * 300, encoding="utf-8")
    (folder / "held.txt").write_text("xylophone " * 300, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def corpus(folder: Path) -> Corpus:
    return read_corpus(folder, hold_out=["held.txt"])


@pytest.fixture(scope="module")
def maker(corpus: Corpus) -> SampleMaker:
    return SampleMaker(corpus, train_tokenizer(corpus, 640), np.random.default_rng(3))


@pytest.fixture(scope="module")
def tokenizer(corpus: Corpus):
    return train_tokenizer(corpus, 640)


TINY = Recipe(
    layers=1,
    hidden=32,
    heads=2,
    kv_heads=1,
    head_dim=16,
    ffn=48,
    vocab_size=640,
    tokens_per_step=512,
    spread=1024,
    stages=(Stage(128, Mix(0.4, 0.4), 0.3, 0.5), Stage(256, Mix(0.1, 0.5), 1.0, 1.0)),
    bonus_length=384,
    compile=False,
)


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock in which every step takes one second."""
    clock = itertools.count()
    monkeypatch.setattr("springtide.training.trainer.time", SimpleNamespace(monotonic=lambda: float(next(clock))))


def trainer(corpus: Corpus, out: Path, *, seconds: float = 8, **options) -> Trainer:
    return new_trainer(corpus, out, TINY, minutes=seconds / 60, **{"seed": 1, **options})


class TestCorpus:
    def test_held_out_books_are_never_read(self, folder: Path) -> None:
        (folder / "held.txt").write_bytes(b"\xff\xfe not text")
        assert set(read_corpus(folder, ["held.txt"]).books) == {"first.txt", "second.txt"}
        with pytest.raises(SpringtideError, match=r"held\.txt is not UTF-8"):
            read_corpus(folder)

    def test_missing_and_empty_folders(self, tmp_path: Path) -> None:
        with pytest.raises(SpringtideError, match="no corpus folder"):
            read_corpus(tmp_path / "nowhere")
        with pytest.raises(SpringtideError, match=r"no \.txt file"):
            read_corpus(tmp_path)


class TestTokenizer:
    @pytest.mark.parametrize("text", [SENTENCES, "\n\n  café 😀 12345", facts.question("lamp")])
    def test_round_trip(self, tokenizer, text: str) -> None:
        assert tokenizer.decode(tokenizer.encode(text)) == text

    def test_special_tokens_and_digits(self, tokenizer) -> None:
        assert tokenizer.convert_tokens_to_ids(["<s>", "</s>"]) == [0, 1]
        pieces = tokenizer.tokenize(facts.fact("lamp", "90210"))
        assert pieces[-6:] == ["9", "0", "2", "1", "0", "."]

    def test_chat_template_asks_as_trained(self, tokenizer) -> None:
        messages = [
            {"role": "system", "content": "A book."},
            {"role": "user", "content": "what is the magic number for lamp?"},
            {"role": "assistant", "content": "the magic number for lamp is 12345."},
        ]
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert rendered == "A book." + facts.question("lamp") + facts.answer("lamp", "12345") + "</s>"


class TestSamples:
    @pytest.mark.parametrize("length", [128, 129, 257, 700, 4100])
    def test_every_answer_repeats_its_fact(self, maker: SampleMaker, tokenizer, length: int) -> None:
        for _ in range(20):
            sample = maker.facts(length)
            assert len(sample.tokens) == len(sample.weights) == len(sample.objectives) == length
            assert sample.tokens[-1] == EOS
            text = tokenizer.decode(sample.tokens)
            stated = re.findall(r" The magic number for (\w+) is (\d{5})\.", text)
            answered = re.findall(r"Answer: the magic number for (\w+) is (\d{5})\.", text)
            assert len({word for word, _ in stated}) == len(stated)
            assert answered
            assert set(answered) <= set(stated)
            digits = [tokenizer.decode(sample.tokens[start : start + DIGITS]) for start in sample.digit_starts]
            assert digits == [number for _, number in answered]

    def test_weights_of_a_fact_and_its_answer(self, maker: SampleMaker, tokenizer) -> None:
        sample = maker.facts(200)
        for start in sample.digit_starts:
            assert (sample.weights[start : start + DIGITS] == DIGIT_WEIGHT).all()
            assert (sample.objectives[start : start + DIGITS] == ANSWER).all()
        statement = re.search(r" The magic number for \w+ is ", tokenizer.decode(sample.tokens))
        assert statement
        first = len(tokenizer.encode(tokenizer.decode(sample.tokens)[: statement.end()]))
        assert (sample.weights[first : first + DIGITS] == 0).all()
        assert sample.weights.max() == DIGIT_WEIGHT
        assert BOOK_WEIGHT in sample.weights

    def test_only_repeats_are_supervised_in_copying(self, maker: SampleMaker) -> None:
        sample = maker.copying(400)
        supervised = np.flatnonzero(sample.weights)
        assert len(supervised) > 20
        pairs = [tuple(pair) for pair in np.stack([sample.tokens[:-1], sample.tokens[1:]], 1)]
        assert all(pairs[index - 1] in pairs[: index - 1] for index in supervised)

    def test_batch_weights_average_each_objective(self, maker: SampleMaker) -> None:
        batch = maker.batch(16, 256, Mix(copying=0.3, facts=0.4))
        assert batch.weights.sum() == pytest.approx(3, abs=1e-3)
        assert (batch.positions == torch.arange(256)).all()

    def test_gaps_keep_order_and_stay_within_the_spread(self, maker: SampleMaker) -> None:
        positions = maker.batch(32, 256, Mix(0, 0), spread=4096).positions
        assert (positions.diff() >= 1).all()
        assert positions.max() < 4096
        assert positions.max() > 1024


class TestCurriculum:
    @pytest.mark.parametrize(
        ("minutes", "state", "after"),
        [
            (29, {"copied": 1.0, "exact": {128: 1.0}}, 0),
            (31, {"copied": 1.0, "exact": {128: 0.5}}, 0),
            (31, {"copied": 0.5, "exact": {128: 1.0}}, 0),
            (31, {"copied": 1.0, "exact": {128: 1.0}}, 1),
            (51, {}, 1),
            (99, {"stage": 1, "copied": 1.0, "exact": {256: 1.0}}, 1),
        ],
    )
    def test_moves_on_when_recall_is_exact_or_time_is_up(
        self, corpus: Corpus, tokenizer, minutes: float, state: dict, after: int
    ) -> None:
        progress = Minutes(100, warmup=1, final=0.0)
        curriculum = Curriculum(TINY, corpus, tokenizer, progress)
        curriculum.load_state_dict({**curriculum.state_dict(), **state})
        progress.seconds = 60 * minutes
        curriculum.advance()
        assert curriculum.stage == after
        assert curriculum.since == (minutes if after > state.get("stage", 0) else 0)


class TestNetwork:
    def test_equals_the_hugging_face_model(self, corpus: Corpus, maker: SampleMaker, tmp_path: Path) -> None:
        objective = trainer(corpus, tmp_path).objective
        objective.network.compute = torch.float32
        batch = maker.batch(2, 300, Mix(0.2, 0.5), spread=2000)
        with torch.no_grad():
            _, losses, _ = objective.network(batch)
            # With a mask, transformers does not take the gaps for the borders of packed sequences.
            logits = objective.model(
                batch.tokens[:, :-1],
                position_ids=batch.positions,
                attention_mask=torch.ones(2, 300),
                use_cache=False,
            ).logits
        expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch.tokens[:, 1:], reduction="none")
        torch.testing.assert_close(losses, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("ticks")
class TestTraining:
    def test_exports_a_model_that_loads(self, corpus: Corpus, tmp_path: Path) -> None:
        subject = trainer(corpus, tmp_path)
        train(subject, checkpoint_seconds=3, snapshot=tmp_path / "snapshot")
        subject.objective.save(tmp_path)
        for folder in (tmp_path, tmp_path / "snapshot"):
            model = AutoModelForCausalLM.from_pretrained(folder)
            assert model.dtype == torch.bfloat16
            assert model.generation_config.eos_token_id == EOS
            assert len(AutoTokenizer.from_pretrained(folder)) == 640
        records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
        assert records[-1]["loss"] < records[0]["loss"]
        assert {record["length"] for record in records} >= {128, 256}
        assert {name for record in records for name in record} >= {"loss_text", "top1_copies", "exact_128", "exact_256"}
        assert all(record["tokens_per_second"] == 512 for record in records)
        assert (tmp_path / "curves.png").exists()

    def test_ctrl_c_saves_and_the_resumed_run_equals_an_uninterrupted_one(
        self, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = trainer(corpus, tmp_path / "whole")
        train(whole)

        interrupted = trainer(corpus, tmp_path / "parts")
        step = interrupted.step

        def step_and_interrupt() -> dict[str, float]:
            if interrupted.progress.step == 5:
                os.kill(os.getpid(), signal.SIGINT)
            return step()

        monkeypatch.setattr(interrupted, "step", step_and_interrupt)
        # A shell that starts the tests in the background has them ignore Ctrl-C.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with pytest.raises(KeyboardInterrupt):
                train(interrupted)
        finally:
            signal.signal(signal.SIGINT, before)
        resumed = trainer(corpus, tmp_path / "parts")
        train(resumed)
        assert (
            resumed.progress.state_dict() == whole.progress.state_dict() == {"step": 8, "seconds": 8, "count": 8 * 512}
        )
        state, expected = (part.objective.state_dict() for part in (resumed, whole))
        assert state["curriculum"] == expected["curriculum"]
        assert state["curriculum"]["stage"] == 1
        assert all(torch.equal(tensor, expected["model"][name]) for name, tensor in state["model"].items())

    def test_a_finished_run_may_be_made_longer(self, corpus: Corpus, tmp_path: Path) -> None:
        train(trainer(corpus, tmp_path, seconds=2))
        longer = trainer(corpus, tmp_path, seconds=5, lr=0.01)
        train(longer)
        assert longer.progress.step == 5
        assert longer.peak_lrs == pytest.approx([0.0015, 0.01])

    def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(self, corpus: Corpus, tmp_path: Path) -> None:
        subject = trainer(corpus, tmp_path)
        subject.step()
        with torch.no_grad():
            subject.objective.model.model.norm.weight.fill_(torch.nan)
        subject.save()
        before = subject.checkpoint.read_bytes()
        with pytest.raises(
            SpringtideError, match=r"The loss is nan at step 1: .* holds the last good state.*lower --lr"
        ):
            train(subject)
        assert subject.checkpoint.read_bytes() == before

    def test_a_full_disk_keeps_the_last_model(
        self, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        subject = trainer(corpus, tmp_path)
        subject.objective.save(tmp_path)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        subject.step()

        def full(_: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(SpringtideError, match=r"\(No space left on device\); make room there and run the same"):
            subject.objective.save(tmp_path)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    def test_a_foreign_checkpoint_is_refused(self, corpus: Corpus, folder: Path, tmp_path: Path) -> None:
        trainer(corpus, tmp_path).save()
        with pytest.raises(SpringtideError, match="belongs to another --seed: "):
            trainer(corpus, tmp_path, seed=2).resume()
        with pytest.raises(SpringtideError, match="belongs to another data set: "):
            trainer(read_corpus(folder, ["held.txt", "second.txt"]), tmp_path).resume()
        with pytest.raises(SpringtideError, match="belongs to another recipe: "):
            new_trainer(corpus, tmp_path, replace(TINY, spread=2048), minutes=1, seed=1).resume()

    def test_several_processes_are_refused(
        self, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        two = SimpleNamespace(num_processes=2)
        monkeypatch.setattr("springtide.training.pocket.new_accelerator", lambda _: two)
        with pytest.raises(SpringtideError, match="One process trains the pocket model; run the command without"):
            trainer(corpus, tmp_path)
