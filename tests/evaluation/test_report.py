"""Results are written whole or not at all, and shown as they are."""

from __future__ import annotations

import errno
import json
import os

import pytest

from springtide import SpringtideError
from springtide.attention import Policy, Quest, Tidal
from springtide.evaluation import report
from springtide.evaluation.calibrate import Point
from springtide.options import KVHead


def test_json_is_written(tmp_path):
    report.write_json(tmp_path / "a.json", {"text": "é", "value": 1.5, "none": None})
    assert json.loads((tmp_path / "a.json").read_text()) == {"text": "é", "value": 1.5, "none": None}
    assert os.listdir(tmp_path) == ["a.json"]


def fail(*_args, **_options):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("step", ["pathlib.Path.write_text", "os.replace"])
def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch, step):
    path = tmp_path / "a.json"
    report.write_json(path, [1])
    monkeypatch.setattr(step, fail)
    with pytest.raises(SpringtideError, match=r"a\.json' cannot be written \(No space left on device\)"):
        report.write_json(path, [2])
    assert json.loads(path.read_text()) == [1]
    assert os.listdir(tmp_path) == ["a.json"]


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    def interrupt(*_args):
        raise KeyboardInterrupt

    path = tmp_path / "a.json"
    report.write_json(path, [1])
    monkeypatch.setattr("os.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        report.write_json(path, [2])
    assert json.loads(path.read_text()) == [1]
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_failing_plot_leaves_the_old_picture(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    report.plot_lines(path, {"a": ([1, 2], [3, 4])}, x="x", y="y")
    old = path.read_bytes()
    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(SpringtideError, match="cannot be written"):
        report.plot_lines(path, {"b": ([1, 2], [5, 9])}, x="x", y="y")
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["a.png"]


def test_targets_are_checked(tmp_path):
    report.check_target(None, tmp_path / "a.json")
    (tmp_path / "file").touch()
    report.check_target(tmp_path / "file")
    for bad in (tmp_path / "no" / "a.json", tmp_path, tmp_path / "file" / "a.json", tmp_path / "pipe"):
        if bad.name == "pipe":
            os.mkfifo(bad)
        with pytest.raises(SpringtideError, match="cannot be written"):
            report.check_target(tmp_path / "a.json", bad)


def test_a_folder_that_takes_no_file_is_found_before_any_work(tmp_path, monkeypatch):
    """As one of a file system that is full or read-only, whatever its permissions say."""

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(report, "TemporaryFile", full)
    with pytest.raises(SpringtideError, match=r"cannot be written \(No space left on device\); choose another place"):
        report.check_target(tmp_path / "a.json")


def test_checking_leaves_nothing(tmp_path):
    report.check_target(tmp_path / "a.json", tmp_path / "b.json")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("log_x", [False, True])
def test_a_picture_of_lines_and_of_values_without_an_x(tmp_path, log_x):
    path = tmp_path / "a.png"
    report.plot_lines(path, {"dense": ([None], [0.9]), "tidal": ([64, 128], [0.5, 0.8])}, x="x", y="y", log_x=log_x)
    report.plot_lines(path, {"dense": ([None], [0.9])}, x="x", y="y", log_x=log_x)
    report.plot_lines(path, {"tidal": ([64], [0.9])}, x="x", y="y", log_x=log_x)
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("saved", "panels"), [(0.0, 2), (0.5, 3)])
def test_a_curve(tmp_path, monkeypatch, saved, panels):
    """Where no layout saves time there is nothing to draw over milliseconds."""
    heads, drawn = (KVHead(2, 1),), []
    points = [Point(n, (0,), (1,), heads, size, 0.1 / n, 0.2, 100, 3 - saved / n) for n in (1, 2) for size in (32, 64)]
    save = report._save
    monkeypatch.setattr(report, "_save", lambda figure, path: (drawn.append(len(figure.axes)), save(figure, path)))
    report.plot_curve(tmp_path / "a.png", points)
    assert drawn == [panels] and (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_tables(capsys):
    report.print_table([{"policy": "dense", "budget": None, "exact_match": 0.123456}])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["policy", "budget", "exact", "match"]
    assert lines[1].split() == ["dense", "-", "0.1235"]
    report.print_table([])
    assert capsys.readouterr().out == ""


def test_labels_tell_policies_apart():
    layers = {"full": (0,), "select": 1, "reselect": (3, 5)}
    assert report.labels([Policy(), Tidal(budget=1, **layers), Tidal(budget=2, **layers)]) == [
        "dense",
        "tidal",
        "tidal",
    ]
    other = Tidal(budget=1, full=(0,), select=1, reselect=())
    assert report.labels([Tidal(**layers), other]) == ["tidal:reselect=3+5", "tidal:reselect=-"]
    assert report.labels([Tidal(correct=4), Tidal()]) == ["tidal:correct=4", "tidal:correct=none"]
    assert report.labels([Quest(page=8), Quest(page=16), Policy()]) == ["quest:page=8", "quest:page=16", "dense"]
