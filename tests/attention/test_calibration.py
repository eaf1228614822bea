"""What ``springtide.json`` may hold, and what is said of one that holds something else."""

from __future__ import annotations

import json

import pytest

from springtide import SpringtideError
from springtide.attention.calibration import FILE, VERSION, read_calibration

SOUND = {"version": VERSION, "tidal": {"full": [0], "select": [1], "full_heads": [[2, 0]], "map": {"3": [1, 0]}}}


def put(folder, content):
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / FILE).write_text(text, encoding="utf-8")
    return folder


def layout(**changes):
    return {**SOUND, "tidal": {**SOUND["tidal"], **changes}}


def without(name):
    return {**SOUND, "tidal": {key: value for key, value in SOUND["tidal"].items() if key != name}}


def test_a_sound_file(tmp_path):
    assert read_calibration(tmp_path) is None
    assert read_calibration(put(tmp_path, SOUND)) == SOUND
    assert read_calibration(put(tmp_path, {"tidal": {"full": [], "select": [0]}}))["tidal"]["select"] == [0]


BROKEN = {
    "{": "no JSON, line 1",
    '{\n"tidal": nothing}': "no JSON, line 2",
    "[]": "holds no JSON object",
    "7": "holds no JSON object",
    "{}": "has no layers for tidal",
    '{"tidal": 3}': "has no layers for tidal",
    '{"tidal": null}': "has no layers for tidal",
    '{"tidal": {}, "version": "2"}': "version is not a whole number",
    '{"tidal": {}, "version": true}': "version is not a whole number",
}
LAYOUTS = {
    "no full": (without("full"), "full is no list of layers"),
    "no select": (without("select"), "select is no list of layers"),
    "full of words": (layout(full=["a"]), "full is no list of layers"),
    "a number": (layout(select=1), "select is no list of layers"),
    "fractions": (layout(select=[0.5]), "select is no list of layers"),
    "truths": (layout(select=[True]), "select is no list of layers"),
    "nothing selects": (layout(select=[]), "no layer selects"),
    "single heads": (layout(full_heads=[1, 2]), "full_heads are no pairs of a layer and a head"),
    "triples": (layout(full_heads=[[1, 2, 3]]), "full_heads are no pairs of a layer and a head"),
    "no heads": (layout(full_heads=None), "full_heads are no pairs of a layer and a head"),
    "map of words": (layout(map={"1": ["a"]}), "map holds no lists of KV heads by layer"),
    "map of no layers": (layout(map={"first": [0]}), "map holds no lists of KV heads by layer"),
    "map of numbers": (layout(map={"1": 0}), "map holds no lists of KV heads by layer"),
    "map of nothing": (layout(map=None), "map holds no lists of KV heads by layer"),
    "map as a list": (layout(map=[[0, 1]]), "map holds no lists of KV heads by layer"),
}


@pytest.mark.parametrize("text", BROKEN)
def test_a_file_that_is_no_calibration(tmp_path, text):
    check(put(tmp_path, text), BROKEN[text])


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_that_is_none(tmp_path, name):
    content, said = LAYOUTS[name]
    check(put(tmp_path, content), said)


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / FILE).write_bytes(b"\xff\xfe{")
    check(tmp_path, "not UTF-8 text")


def check(folder, said):
    with pytest.raises(SpringtideError) as caught:
        read_calibration(folder)
    message = str(caught.value)
    assert message.startswith(f"'{folder / FILE}' is broken (") and f"{said})" in message
    assert message.endswith("run `springtide calibrate` again or delete the file.")
    assert not any(
        word in message for word in ("Error", "NoneType", "object is not", "subscript", "Expecting", "codec")
    )


def test_a_folder_of_that_name_is_not_passed_over(tmp_path):
    (tmp_path / FILE).mkdir()
    with pytest.raises(SpringtideError, match=r"springtide\.json' is a folder, .*; move it away\.$"):
        read_calibration(tmp_path)


def test_a_file_that_cannot_be_read(tmp_path, monkeypatch):
    def refuse(*_args, **_options):
        raise PermissionError(13, "Permission denied")

    put(tmp_path, SOUND)
    monkeypatch.setattr("pathlib.Path.read_text", refuse)
    with pytest.raises(SpringtideError, match=r"springtide\.json' cannot be read \(Permission denied\); "):
        read_calibration(tmp_path)


@pytest.mark.parametrize("rest", [{}, {"tidal": []}, SOUND])
def test_a_newer_version_whatever_it_holds(tmp_path, rest):
    with pytest.raises(SpringtideError, match="newer version of Springtide; update Springtide, or"):
        read_calibration(put(tmp_path, {**rest, "version": VERSION + 1}))
