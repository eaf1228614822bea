"""Self-distillation: the lines are what the model writes, in order, and a repeated run adds what is missing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import springtide
from folders import BOOK, VOCAB, tokenizer
from springtide.engine.engine import Engine
from springtide.engine.loop import Loop
from springtide.errors import SpringtideError
from springtide.rows.sampling import Sampling
from springtide.training.distill import Prompts, Written, distill
from springtide.training.windows import Document
from tiny import tiny

TEXT = Document("'book'", BOOK)
GREEDY = Sampling(max_tokens=12)
WARM = Sampling(max_tokens=12, temperature=1.0)


@pytest.fixture(scope="module")
def engine() -> Engine:
    # One of its common tokens ends a sequence, so that lines have different lengths.
    model = tiny(vocab_size=VOCAB, max_position_embeddings=256)
    engine = springtide.load(model, tokenizer())
    engine.eos = frozenset(range(0, VOCAB, 16))
    return engine


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# -- prompts -------------------------------------------------------------------------------------------------------


def test_excerpts_have_varied_lengths_and_places(engine):
    prompts = Prompts(engine, [TEXT], length=32)
    found = [prompts[number] for number in range(60)]
    assert {len(prompt) for prompt in found} <= set(range(8, 33))
    assert len({len(prompt) for prompt in found}) > 10
    assert len({tuple(prompt) for prompt in found}) == 60
    for prompt in found:
        text = engine.tokenizer.decode(prompt)
        start = BOOK.index(text.rstrip("\ufffd"))
        assert start == 0 or BOOK[start - 1].isspace()
    again, other = Prompts(engine, [TEXT], length=32), Prompts(engine, [TEXT], length=32, seed=1)
    assert again[7] == found[7] != other[7]


def test_excerpts_of_tokens_and_of_short_documents(engine):
    prompts = Prompts(engine, [Document("a", tuple(range(3, 103)))], length=16)
    for prompt in (prompts[number] for number in range(20)):
        assert prompt == list(range(prompt[0], prompt[0] + len(prompt)))
        assert 4 <= len(prompt) <= 16
    assert Prompts(engine, [Document("a", "Hm \n")], length=16)[0] == engine.encode("Hm")


def test_documents_are_drawn_by_their_size(engine):
    prompts = Prompts(engine, [Document("a", (5,) * 900), Document("b", (6,) * 100)], length=4)
    large = sum(prompts[number][0] == 5 for number in range(300))
    assert 240 < large < 297


def test_facts_are_hidden_and_one_is_asked_about(engine):
    prompts = Prompts(engine, [TEXT], length=64, facts=1.0)
    counts = set()
    for number in range(30):
        text = engine.tokenizer.decode(prompts[number])
        stated = re.findall(r" The magic number for (\w+) is \d{5}\.", text)
        (asked,) = re.findall(r"\n\nQuestion: what is the magic number for (\w+)\? Answer:$", text)
        assert stated.count(asked) == 1
        counts.add(len(stated))
    assert counts == {1, 2, 3, 4}
    mixed = Prompts(engine, [TEXT], length=64, facts=0.5)
    asking = sum("Answer:" in engine.tokenizer.decode(mixed[number]) for number in range(100))
    assert 30 < asking < 70


def test_conversations_end_with_the_users_last_words(engine):
    messages = [
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "Nobody."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "Because."},
    ]
    assert Prompts(engine, [Document("a", messages)], length=16)[0] == engine.render(messages[:3])
    silent = Prompts(engine, [Document("'chat', line 3,", messages[1:2])], length=16)
    with pytest.raises(SpringtideError, match=r"'chat', line 3, has no message whose role is user"):
        silent[0]


def test_options_out_of_range(engine):
    with pytest.raises(SpringtideError, match="--facts is a share between 0 and 1, not 2"):
        Prompts(engine, [TEXT], length=16, facts=2)
    with pytest.raises(SpringtideError, match="context holds 256 tokens; use a --length below that"):
        Prompts(engine, [TEXT], length=256)


# -- lines ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 5])
def test_the_lines_are_the_models_own_continuations(engine, tmp_path, batch):
    prompts = Prompts(engine, [TEXT], length=16)
    found = distill(prompts, tmp_path / "out.jsonl", 9, GREEDY, batch)
    lines = read(tmp_path / "out.jsonl")
    expected = engine.generate([prompts[number] for number in range(9)], max_tokens=12)
    assert [line["tokens"][line["prompt"] :] for line in lines] == [output.token_ids for output in expected]
    assert [line["tokens"][: line["prompt"]] for line in lines] == [prompts[number] for number in range(9)]
    assert len({len(output.token_ids) for output in expected}) > 1
    own = sum(len(output.token_ids) for output in expected)
    assert found == Written(9, own + sum(len(prompts[number]) for number in range(9)), own)


def test_sampled_lines_have_noise_of_their_own(engine, tmp_path):
    prompts = Prompts(engine, [Document("a", (9,) * 4)], length=4)
    distill(prompts, tmp_path / "out.jsonl", 6, WARM, 6)
    assert len({tuple(line["tokens"][line["prompt"] :]) for line in read(tmp_path / "out.jsonl")}) > 3


@pytest.mark.parametrize("sampling", [GREEDY, WARM])
def test_an_interrupted_run_goes_on(engine, tmp_path, monkeypatch, sampling):
    prompts = Prompts(engine, [TEXT], length=16, facts=0.3)
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    distill(prompts, whole, 12, sampling, 4)
    step, passes = Loop.step, []

    def interrupted(self, running):
        passes.append(None)
        if len(passes) == 20:
            raise KeyboardInterrupt
        return step(self, running)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            distill(prompts, parts, 12, sampling, 4)
    done = parts.read_text()
    assert done and whole.read_text().startswith(done)
    parts.write_text(done + whole.read_text()[len(done) : len(done) + 9])  # and a line was cut short
    distill(prompts, parts, 12, sampling, 4)
    assert parts.read_text() == whole.read_text()
    monkeypatch.setattr(Loop, "step", lambda *_: pytest.fail("worked"))
    distill(prompts, parts, 12, sampling, 4)


@pytest.mark.parametrize(
    "content", [BOOK[:400].encode(), b"one line", b'{"text": "a"}\n', b'{"tokens": [3], "prompt": 1}\n', b"\xff\xfe\n"]
)
def test_another_file_is_left_alone(engine, tmp_path, content):
    path = tmp_path / "out.jsonl"
    path.write_bytes(content)
    with pytest.raises(SpringtideError, match="holds something else than what this model writes for these prompts"):
        distill(Prompts(engine, [TEXT], length=16), path, 3, GREEDY, 2)
    assert path.read_bytes() == content


def test_lines_of_other_prompts_are_left_alone(engine, tmp_path):
    path = tmp_path / "out.jsonl"
    distill(Prompts(engine, [TEXT], length=16), path, 3, GREEDY, 2)
    with pytest.raises(SpringtideError, match="choose another --out"):
        distill(Prompts(engine, [TEXT], length=16, seed=1), path, 4, GREEDY, 2)


def test_a_file_that_cannot_be_written(engine, tmp_path):
    with pytest.raises(SpringtideError, match="cannot be written"):
        distill(Prompts(engine, [TEXT], length=16), tmp_path / "no" / "out.jsonl", 3, GREEDY, 2)
