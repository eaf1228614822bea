"""Files and folders are whole or not there, whoever else writes at the same place."""

from __future__ import annotations

import os
import stat
import threading

import pytest
import torch

from springtide import SpringtideError
from springtide.files import filling, replacing


def contents(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_file_is_replaced_when_all_of_it_is_written(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old" and temporary.suffix == ".json"
    assert contents(tmp_path) == {"a.json": "new"}


def test_a_folder_takes_the_place_of_nothing(tmp_path):
    with replacing(tmp_path / "model") as temporary:
        temporary.mkdir()
        (temporary / "a").write_text("a")
    assert contents(tmp_path) == {"model/a": "a"}


def test_files_of_a_folder_are_replaced_and_others_stay(tmp_path):
    folder = tmp_path / "deep" / "model"
    for text in ("old", "new"):
        with filling(folder) as temporary:
            (temporary / "config.json").write_text(text)
            (temporary / "inner").mkdir()
            (temporary / "inner" / "weights").write_text(text)
        (folder / "mine").write_text(text)
    assert contents(tmp_path) == {
        "deep/model/config.json": "new",
        "deep/model/inner/weights": "new",
        "deep/model/mine": "new",
    }


@pytest.mark.parametrize("write", [replacing, filling])
@pytest.mark.parametrize("others", ["a.writing", ".a.writing"])
def test_what_another_process_writes_is_left_alone(tmp_path, write, others):
    """Its temporary file or folder may have any name that this one would choose."""
    theirs = tmp_path / others
    theirs.mkdir() if write is filling else theirs.touch()
    before = os.stat(theirs).st_ino
    with write(tmp_path / "a") as temporary:
        (temporary / "x" if write is filling else temporary).write_text("mine")
    assert os.stat(theirs).st_ino == before


@pytest.mark.parametrize("write", [replacing, filling])
def test_two_may_write_the_same_at_once(tmp_path, write):
    path, name = tmp_path / "a", "x" if write is filling else ""
    with write(path) as first:
        (first / name).write_text("first")
        with write(path) as second:
            assert second != first
            (second / name).write_text("second")
        assert (path / name).read_text() == "second"
    assert (path / name).read_text() == "first"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("write", [replacing, filling])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("no")])
def test_nothing_is_left_of_what_failed(tmp_path, write, error):
    def fail():
        with write(tmp_path / "a", "use another disk") as temporary:
            (temporary / "x" if write is filling else temporary).write_text("half")
            raise error

    with pytest.raises(SpringtideError if isinstance(error, OSError) else type(error)) as caught:
        fail()
    assert not os.listdir(tmp_path)
    if isinstance(error, OSError):
        assert str(caught.value) == f"'{tmp_path / 'a'}' cannot be written (No space left on device); use another disk."


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")
def test_a_full_disk_under_torch(tmp_path):
    with pytest.raises(SpringtideError, match="a' cannot be written"), replacing(tmp_path / "a"):
        torch.save(torch.zeros(10), "/dev/full")


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(RuntimeError, match="no such operation"), replacing(tmp_path / "a"):
        raise RuntimeError("no such operation")


def test_a_place_that_is_not_there(tmp_path):
    with pytest.raises(SpringtideError, match="cannot be written"), replacing(tmp_path / "no" / "a"):
        pass


def test_others_may_read_what_is_written(tmp_path):
    with replacing(tmp_path / "a") as temporary:
        temporary.write_text("a")
    with filling(tmp_path / "b") as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "x").touch(mode=0o600)  # as safetensors does
    for path, mode in (("a", 0o644), ("b", 0o755), ("b/inner", 0o755), ("b/inner/x", 0o644)):
        assert stat.S_IMODE(os.stat(tmp_path / path).st_mode) & mode == mode


def test_threads_that_write_one_file(tmp_path):
    path, failures = tmp_path / "a", []

    def write(text):
        try:
            for _ in range(50):
                with replacing(path) as temporary:
                    temporary.write_text(text)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(letter * 1000,)) for letter in "abc"]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert not path.exists() or len(set(path.read_text())) == 1
    assert not failures and os.listdir(tmp_path) == ["a"]
