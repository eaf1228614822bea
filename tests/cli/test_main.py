"""What holds for all verbs."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import springtide


def test_version(run):
    result = run("--version")
    assert (result.code, result.out.strip()) == (0, springtide.__version__)


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["train", "medusa", "--help"]])
def test_help_is_instant(arguments):
    script = "from springtide.cli import main; main()"
    command = [sys.executable, "-X", "importtime", "-c", script, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    imported = {line.split("|")[-1].strip() for line in result.stderr.splitlines()}
    assert "typer" in imported and not imported & {"torch", "transformers", "numpy", "matplotlib"}


def test_a_terminal_that_cannot_show_every_character(folder, tmp_path):
    result = subprocess.run(
        [
            *(sys.executable, "-c", "from springtide.cli import main; main()"),
            *("generate", "-", "--model", folder, "--max-tokens", "12", "--json", tmp_path / "out.json"),
            *("--temperature", "3", "--seed", "2"),
        ],
        input="é".encode(),
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        timeout=120,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, b"")
    text = json.loads((tmp_path / "out.json").read_text())["text"]
    assert not text.isascii()
    assert result.stdout == text.encode("ascii", "replace") + b"\n"
