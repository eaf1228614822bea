"""Documents and windows: nothing is lost or mixed up, and what is broken is named."""

from __future__ import annotations

import json
from copy import copy
from pathlib import Path

import pytest
import torch

import springtide
from folders import BOOK, VOCAB, tokenizer
from springtide.engine.engine import Engine
from springtide.errors import SpringtideError
from springtide.training.windows import MOST_HELD_OUT, Windows, read_documents, training_windows
from tiny import tiny

MESSAGES = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Nobody."}]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return springtide.load(tiny(vocab_size=VOCAB, max_position_embeddings=1024), tokenizer())


def lines(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def rows(windows: Windows) -> set[tuple[int, ...]]:
    return {tuple(row) for row in windows.tokens.tolist()}


def numbered(count: int, length: int = 4) -> Windows:
    return Windows(torch.arange(count * length).view(count, length))


# -- documents -----------------------------------------------------------------------------------------------------


def test_a_text_is_encoded_as_a_prompt_is(engine, tmp_path):
    (tmp_path / "book.txt").write_text(BOOK, encoding="utf-8")
    windows, held = training_windows(tmp_path / "book.txt", engine, 64)
    expected = torch.tensor(engine.encode(BOOK))
    expected = expected[: len(expected) // 64 * 64].view(-1, 64)
    assert rows(windows) | rows(held) == rows(Windows(expected))
    assert len(windows) + len(held) == len(expected)
    assert len(held) == round(0.05 * len(expected))


def test_held_out_files_are_for_calibration_alone(engine, tmp_path):
    for name in ("a.txt", "b.txt", "c.txt"):
        (tmp_path / name).write_text(name[0] * 400, encoding="utf-8")
    (tmp_path / "notes.md").write_text("zzz")
    documents, held = read_documents(tmp_path, ["b.txt"])
    assert [document.content[0] for document in documents] == ["a", "c"]
    assert [document.content[0] for document in held] == ["b"]
    (tmp_path / "b.txt").write_text(BOOK, encoding="utf-8")
    _, held = training_windows(tmp_path, engine, 16, ["b.txt"])
    assert len(held) == MOST_HELD_OUT
    whole = engine.encode(BOOK)
    assert rows(held) <= {tuple(whole[start : start + 16]) for start in range(0, len(whole), 16)}


def test_the_lines_of_a_file_follow_one_another(engine, tmp_path):
    path = lines(
        tmp_path / "data.jsonl",
        {"tokens": [5, 6, 7] * 10, "prompt": 4},
        {"text": "The ship left the harbour."},
        {"messages": MESSAGES},
        {"text": "  "},
        {"tokens": []},
    )
    expected = [5, 6, 7] * 10 + engine.encode("The ship left the harbour.")
    expected += tokenizer().apply_chat_template(MESSAGES, return_dict=False)
    windows, held = training_windows(path, engine, 16)
    expected = expected[: len(expected) // 16 * 16]
    assert rows(windows) | rows(held) == rows(Windows(torch.tensor(expected).view(-1, 16)))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"tokens": [1, 2', r"data.jsonl', line 2, is no JSON"),
        ('{"words": 3}', r"data.jsonl', line 2, is no document: it must hold \"tokens\""),
        ('["tokens"]', r"line 2, is no document"),
        ('{"tokens": [1, -2]}', r"line 2, is no document"),
        ('{"tokens": [1, true]}', r"line 2, is no document"),
        ('{"text": 3}', r"line 2, is no document"),
        ('{"messages": [{"role": "user"}]}', r"line 2, is no document"),
        ('{"tokens": [400]}', r"line 2, holds token 400, but the model knows 400 tokens"),
        ('{"tokens": [99999999999999999999]}', r"line 2, holds token 9+, but the model knows"),
    ],
)
def test_a_broken_line_is_named(engine, tmp_path, line, message):
    (tmp_path / "data.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(SpringtideError, match=message):
        training_windows(tmp_path / "data.jsonl", engine, 16)


def test_messages_that_the_template_refuses(tmp_path):
    own = copy(tokenizer())
    own.chat_template = "{{ raise_exception('No system role') }}"
    engine = springtide.load(tiny(vocab_size=VOCAB), own)
    path = lines(tmp_path / "data.jsonl", {"messages": MESSAGES})
    with pytest.raises(SpringtideError, match=r"line 1, does not fit the chat template: No system role"):
        training_windows(path, engine, 16)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "cannot be read"),
        ("empty.txt", b" \n ", r"empty.txt' holds no text"),
        ("empty.jsonl", b"\n", r"empty.jsonl' holds no text"),
        ("latin.txt", "café".encode("latin-1"), "is not UTF-8 text"),
        ("short.txt", b"Hm", r"gives 2 tokens, but 2 windows of 16 are needed at least; give more text"),
    ],
)
def test_data_without_enough_text(engine, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SpringtideError, match=message):
        training_windows(tmp_path / name, engine, 16)


def test_a_folder_without_enough_text(engine, tmp_path):
    with pytest.raises(SpringtideError, match="holds no text"):
        training_windows(tmp_path, engine, 16)
    (tmp_path / "a.txt").write_text("word " * 100)
    with pytest.raises(SpringtideError, match=r"--hold-out names 'b.txt', but there is no such"):
        training_windows(tmp_path, engine, 16, ["b.txt"])
    with pytest.raises(SpringtideError, match="holds no text"):
        training_windows(tmp_path, engine, 16, ["a.txt"])
    with pytest.raises(SpringtideError, match="--hold-out names files of a folder"):
        training_windows(tmp_path / "a.txt", engine, 16, ["a.txt"])
    with pytest.raises(SpringtideError, match="Windows of 4 tokens are too short"):
        training_windows(tmp_path, engine, 4)


# -- windows -------------------------------------------------------------------------------------------------------


def test_every_window_comes_once_before_any_comes_again():
    windows = numbered(10)
    drawn = torch.cat([windows.batch(step, 4, seed=3)[0] for step in range(5)])[:, 0].tolist()
    first, second = drawn[:10], drawn[10:]
    assert sorted(first) == sorted(second) == windows.tokens[:, 0].tolist()
    assert first != second
    assert torch.equal(*windows.batch(3, 4, seed=3), *windows.batch(3, 4, seed=3))
    assert not torch.equal(*windows.batch(0, 8, seed=3), *windows.batch(0, 8, seed=4))
    assert windows.batch(0, 25, seed=3)[0].shape == (25, 4)


def test_a_split_keeps_every_window():
    windows = numbered(10)
    kept, held = windows.split(3, seed=0)
    assert (len(kept), len(held)) == (7, 3)
    assert rows(kept) | rows(held) == rows(windows)


def test_digests_tell_data_apart():
    assert numbered(6, 4).digest == numbered(6, 4).digest
    assert len({numbered(6, 4).digest, numbered(4, 6).digest, numbered(5, 4).digest}) == 3
