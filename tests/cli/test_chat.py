"""`springtide chat` as a user meets it."""

from __future__ import annotations

import itertools

import pytest

import springtide
from folders import save_model
from springtide.engine.request import Request
from springtide.engine.session import Session


@pytest.fixture
def turns(monkeypatch) -> list[Request]:
    """The request of each turn."""
    requests = []
    add = Session.add

    def spy(self, *args, **kwargs):
        requests.append(add(self, *args, **kwargs))
        return requests[-1]

    monkeypatch.setattr(Session, "add", spy)
    return requests


def test_chat_keeps_the_cache_between_turns(run, folder, turns):
    result = run(
        "chat",
        "--model",
        folder,
        "--max-tokens",
        5,
        stdin="Who is it, and why is it so?\n\nAnd why?\n/exit\nnot asked\n",
    )
    assert (result.code, result.err) == (0, "")
    engine = springtide.load(folder)
    messages = [{"role": "user", "content": "Who is it, and why is it so?"}]
    first = engine.chat(messages, max_tokens=5)
    messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "And why?"}]
    second = engine.chat(messages, max_tokens=5)
    assert result.out == f"{first.text}\n{second.text}\n"
    assert turns[0].lent == 0
    assert turns[1].lent >= len(engine.render(messages[:1]))


def test_sampling_options_reach_the_engine(run, folder):
    options = {"temperature": 0.9, "top_p": 0.8, "top_k": 20, "min_p": 0.01, "repetition_penalty": 1.2, "seed": 7}
    arguments = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    question = [{"role": "user", "content": "Who is it?"}]
    text = springtide.load(folder).chat(question, max_tokens=12, **options).text
    base = ["chat", "--model", folder, "--max-tokens", 12, *arguments]
    assert run(*base, stdin="Who is it?").out == text + "\n"
    stopped = run(*base, "--stop", "never there", "--stop", text[4:6], stdin="Who is it?")
    assert (stopped.code, stopped.out) == (0, text[: text.index(text[4:6])] + "\n")


def test_stats_of_each_answer(run, folder):
    result = run("chat", "--model", folder, "--max-tokens", 4, "--stats", stdin="Who is it?\nAnd why?\n")
    assert result.err.count("4 generated") == result.err.count("tokens/s") == result.err.count("\n") == 2
    assert "tokens/s" not in result.out and "drafted" not in result.err
    drafted = run("chat", "--model", folder, "--max-tokens", 4, "--stats", "--draft", "lookup", stdin="Who is it?\n")
    assert "tokens drafted" in drafted.err


def test_reset_starts_anew_with_the_system_message(run, folder, turns, tmp_path):
    (tmp_path / "system.txt").write_text("Be brief.")
    arguments = ["--model", folder, "--max-tokens", 5, "--system", f"@{tmp_path / 'system.txt'}"]
    result = run("chat", *arguments, stdin="Who is it?\n/reset\nWho is it?\n")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who is it?"}]
    text = springtide.load(folder).chat(messages, max_tokens=5).text
    assert (result.code, result.out) == (0, f"{text}\n{text}\n")
    assert [turn.lent for turn in turns[:2]] == [0, 0]


def test_chat_ends_with_its_input(run, folder):
    assert run("chat", "--model", folder, stdin="").code == 0
    assert run("chat", "--model", folder, stdin="/exit").out == ""


def test_an_interrupted_answer_does_not_end_the_chat(run, folder, monkeypatch):
    start, turns = Session.run, []

    def interrupted(self):
        turns.append(0)
        yield from itertools.islice(start(self), 3 if len(turns) == 1 else None)
        if len(turns) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Session, "run", interrupted)
    result = run("chat", "--model", folder, "--max-tokens", 5, stdin="One\nTwo\n")
    assert result.code == 0
    assert " [stopped]\n" in result.out
    assert len(turns) == 2


def test_a_message_too_long_is_refused(run, folder):
    result = run("chat", "--model", folder, "--max-tokens", 5, stdin="word " * 2000 + "\n")
    result.refused("tokens, but the model's context holds 1024")


def test_a_message_too_long_does_not_end_a_chat_at_a_terminal(run, folder, monkeypatch):
    lines = iter(["word " * 2000, "Short"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines, "/exit"))
    result = run("chat", "--model", folder, "--max-tokens", 5)
    assert result.code == 0
    assert "context holds 1024" in result.err
    assert result.out == springtide.load(folder).chat([{"role": "user", "content": "Short"}], max_tokens=5).text + "\n"


def test_chat_input_that_is_not_utf8(run, folder):
    run("chat", "--model", folder, stdin=b"\xff\xfe\n").refused("Standard input is not UTF-8")


def test_chat_with_a_drafter(run, folder, drafter):
    plain = run("chat", "--model", folder, "--max-tokens", 5, stdin="Who is it?\nAnd why?\n")
    drafted = run("chat", "--model", folder, "--max-tokens", 5, "--draft", drafter, stdin="Who is it?\nAnd why?\n")
    assert (drafted.code, drafted.out) == (0, plain.out)


def test_a_model_that_cannot_chat(run, tmp_path):
    folder = save_model(tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    run("generate", "Hi", "--chat", "--model", folder).refused("no chat template")
    run("chat", "--model", folder, stdin="").refused("no chat template")


def test_a_template_that_takes_no_system_message(run, tmp_path):
    folder = save_model(tmp_path / "model")
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('No system role') }}{% endif %}Hi"
    (folder / "chat_template.jinja").write_text(template)
    run("chat", "--model", folder, "--system", "Be brief", stdin="").refused("No system role")
