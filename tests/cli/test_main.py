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


def quick(*arguments: str, **environment: str) -> str:
    """What the command prints; it must not import what is heavy."""
    script = "import sys; sys.argv[0] = 'springtide'; from springtide.cli import main; main()"
    command = [sys.executable, "-X", "importtime", "-c", script, *arguments]
    environment = {**os.environ, **environment}
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=environment)
    imported = {line.split("|")[-1].strip() for line in result.stderr.splitlines()}
    assert "typer" in imported and not imported & {"torch", "transformers", "numpy", "matplotlib"}
    return result.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["train", "medusa", "--help"]])
def test_help_is_instant(arguments):
    assert "--help" in quick(*arguments)


def test_a_verb_has_its_own_default_for_an_option_that_it_shares(run):
    defaults = {"decode": "dense,tidal", "prefill": "dense"}
    for verb, default in defaults.items():
        assert f"[default: {default}]" in " ".join(run("bench", verb, "--help").out.split())


def test_shells_complete_verbs_and_options():
    told = quick("--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")  # not by its parents
    assert "_SPRINGTIDE_COMPLETE=complete_bash" in told
    for typed, completed in (("springtide ge", "generate"), ("springtide eval needle --tri", "--trials")):
        place = str(typed.count(" "))
        out = quick(_SPRINGTIDE_COMPLETE="complete_bash", COMP_WORDS=typed, COMP_CWORD=place)
        assert out.split() == [completed]


def process(*arguments, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "springtide", *map(str, arguments)]
    return subprocess.run(command, stderr=subprocess.PIPE, timeout=120, check=False, **options)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["--help"], ["policies"], ["generate", "Hi", "--max-tokens", 2]])
def test_a_full_disk(folder, arguments, unbuffered):
    arguments = [*arguments, "--model", folder] if "generate" in arguments else arguments
    with open("/dev/full", "w") as full:
        result = process(*arguments, stdout=full, env={**os.environ, "PYTHONUNBUFFERED": unbuffered})
    message = b"Standard output cannot be written (No space left on device); send it elsewhere, or make room."
    assert (result.returncode, result.stderr) == (2, b"springtide: " + message + b"\n")


def test_a_closed_standard_output():
    result = process("policies", preexec_fn=lambda: os.close(1))
    assert result.returncode == 2
    assert result.stderr == b"springtide: Standard output is closed; send it to a file, or to /dev/null.\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate"], b"; give the prompt as an argument, or with --prompt-file"),
        (["generate", "-"], b"; give the prompt as an argument, or with --prompt-file"),
        (["chat"], b", from which chat reads what you say; open it, or use springtide generate"),
    ],
)
def test_a_closed_standard_input(arguments, message):
    result = process(*arguments, stdout=subprocess.PIPE, preexec_fn=lambda: os.close(0))
    assert (result.returncode, result.stdout) == (2, b"")
    assert result.stderr == b"springtide: Standard input is closed" + message + b".\n"


def test_a_prompt_needs_no_standard_input(folder):
    arguments = ("generate", "Hi", "--model", folder, "--max-tokens", 2)
    result = process(*arguments, stdout=subprocess.PIPE, preexec_fn=lambda: os.close(0))
    assert (result.returncode, result.stderr) == (0, b"") and result.stdout


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["--help"], ["policies"]])
def test_a_pipe_whose_reader_left(arguments, unbuffered):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe:
        result = process(*arguments, stdout=pipe, env={**os.environ, "PYTHONUNBUFFERED": unbuffered})
    assert (result.returncode, result.stderr) == (1, b"")


def test_a_terminal_that_cannot_show_every_character(folder, tmp_path):
    result = process(
        *("generate", "-", "--model", folder, "--max-tokens", 12, "--json", tmp_path / "out.json"),
        *("--temperature", 3, "--seed", 2),
        input="é".encode(),
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert (result.returncode, result.stderr) == (0, b"")
    text = json.loads((tmp_path / "out.json").read_text())["text"]
    assert not text.isascii()
    assert result.stdout == text.encode("ascii", "replace") + b"\n"
