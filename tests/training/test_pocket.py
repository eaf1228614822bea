"""The pocket model's samples, curriculum, checkpoints and failures, on a model of one layer."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from springtide import facts
from springtide.errors import SpringtideError
from springtide.training import pocket
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
from springtide.training.pocket import Curriculum, Progress, Recipe, Stage, Trainer

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


def ticks() -> Callable[[], float]:
    """A clock in which every step takes one second."""
    counter: Iterator[int] = itertools.count()
    return lambda: float(next(counter))


def trainer(corpus: Corpus, out: Path, *, seconds: float = 8, seed: int = 1) -> Trainer:
    return Trainer(corpus, out, minutes=seconds / 60, seed=seed, recipe=TINY, clock=ticks())


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
        assert (batch.positions == np.arange(256)).all()

    def test_gaps_keep_order_and_stay_within_the_spread(self, maker: SampleMaker) -> None:
        positions = maker.batch(32, 256, Mix(0, 0), spread=4096).positions
        assert (np.diff(positions) >= 1).all()
        assert positions.max() < 4096
        assert positions.max() > 1024


class TestCurriculum:
    def test_moves_on_when_recall_is_exact_or_time_is_up(self) -> None:
        curriculum = Curriculum(TINY, seconds=100)
        assert not curriculum.advance(Progress(elapsed=29, copied=1.0, exact={128: 1.0}))
        assert not curriculum.advance(Progress(elapsed=31, copied=1.0, exact={128: 0.5}))
        assert curriculum.advance(Progress(elapsed=31, copied=1.0, exact={128: 1.0}))
        assert curriculum.advance(Progress(elapsed=51))
        assert not curriculum.advance(Progress(stage=1, elapsed=99, copied=1.0, exact={256: 1.0}))


class TestNetwork:
    def test_equals_the_hugging_face_model(self, corpus: Corpus, tmp_path: Path) -> None:
        subject = trainer(corpus, tmp_path)
        subject.network.compute = torch.float32
        batch = subject.maker.batch(2, 300, Mix(0.2, 0.5), spread=2000)
        with torch.no_grad():
            _, losses, _ = subject.network(batch)
            # With a mask, transformers does not take the gaps for the borders of packed sequences.
            logits = subject.model(
                torch.from_numpy(batch.tokens[:, :-1]),
                position_ids=torch.from_numpy(batch.positions),
                attention_mask=torch.ones(2, 300),
                use_cache=False,
            ).logits
        expected = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), torch.from_numpy(batch.tokens[:, 1:]), reduction="none"
        )
        torch.testing.assert_close(losses, expected, atol=1e-4, rtol=1e-4)


class TestTraining:
    def test_exports_a_model_that_loads(self, corpus: Corpus, tmp_path: Path) -> None:
        pocket.run(trainer(corpus, tmp_path), checkpoint_seconds=3, log_seconds=1)
        for folder in (tmp_path, tmp_path / "snapshot"):
            model = AutoModelForCausalLM.from_pretrained(folder)
            assert model.dtype == torch.bfloat16
            assert model.generation_config.eos_token_id == EOS
            assert len(AutoTokenizer.from_pretrained(folder)) == 640
        records = [json.loads(line) for line in (tmp_path / "train_log.jsonl").read_text().splitlines()]
        assert records[-1]["loss"] < records[0]["loss"]
        assert {record["length"] for record in records} >= {128, 256}
        assert (tmp_path / "training.png").exists()

    def test_ctrl_c_saves_and_the_resumed_run_equals_an_uninterrupted_one(
        self, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole, parts = tmp_path / "whole", tmp_path / "parts"
        whole.mkdir()
        parts.mkdir()
        pocket.run(trainer(corpus, whole), checkpoint_seconds=100)

        interrupted = trainer(corpus, parts)
        step = interrupted.step

        def step_and_interrupt() -> dict[str, float]:
            record = step()
            if record["step"] == 3:
                os.kill(os.getpid(), signal.SIGINT)
            return record

        monkeypatch.setattr(interrupted, "step", step_and_interrupt)
        # A shell that starts the tests in the background has them ignore Ctrl-C.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with pytest.raises(KeyboardInterrupt):
                pocket.run(interrupted)
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        finally:
            signal.signal(signal.SIGINT, before)
        resumed = trainer(corpus, parts)
        pocket.run(resumed, checkpoint_seconds=100)
        assert resumed.progress.step == 8
        assert (whole / "model.safetensors").read_bytes() == (parts / "model.safetensors").read_bytes()

    def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(self, corpus: Corpus, tmp_path: Path) -> None:
        subject = trainer(corpus, tmp_path)
        subject.step()
        subject.save()
        before = subject.checkpoint.read_bytes()
        with torch.no_grad():
            subject.model.model.norm.weight.fill_(torch.nan)
        with pytest.raises(SpringtideError, match="The loss is nan at step 1"):
            pocket.run(subject_without_resume(subject))
        assert subject.checkpoint.read_bytes() == before

    def test_a_full_disk_keeps_the_last_checkpoint(
        self, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        subject = trainer(corpus, tmp_path)
        subject.save()
        before = subject.checkpoint.read_bytes()
        subject.step()

        def full(_: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(SpringtideError, match=r"checkpoint\.pt' cannot be written \(No space left on device\)"):
            subject.save()
        assert subject.checkpoint.read_bytes() == before
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]

    def test_a_foreign_or_broken_checkpoint_is_refused(self, corpus: Corpus, tmp_path: Path) -> None:
        trainer(corpus, tmp_path, seed=1).save()
        with pytest.raises(SpringtideError, match="belongs to another seed"):
            trainer(corpus, tmp_path, seed=2).resume()
        (tmp_path / "checkpoint.pt").write_bytes(b"half")
        with pytest.raises(SpringtideError, match="cannot be read"):
            trainer(corpus, tmp_path).resume()


def subject_without_resume(subject: Trainer) -> Trainer:
    subject.resume = lambda: False  # type: ignore[method-assign]
    return subject
