"""`springtide eval` as a user meets it."""

from __future__ import annotations

import json
import shutil

import pytest

from folders import BOOK, save_drafter, tokenizer
from springtide.cli import show
from springtide.engine.engine import Engine
from springtide.evaluation import needle


def test_needle(run, calibrated, book, tmp_path):
    result = run(
        *("eval", "needle", "--model", calibrated, "--text", book, "--length", "300,320", "--trials", 1),
        *("--policy", "dense,tidal:recent=4,streaming", "--budget", "32,64"),
        *("--json", tmp_path / "out.json", "--plot", tmp_path / "out.png"),
    )
    assert (result.code, result.err) == (0, "")
    rows = json.loads((tmp_path / "out.json").read_text())
    names = ["policy", "budget", "length", "depth", "questions", "exact_match", "task", "exact_match_se", "of_dense"]
    names += ["of_dense_se", "agreement", "agreement_se", "kl", "kl_se", "complete"]
    assert all(list(row) == names for row in rows)
    measured = [("dense", None), ("tidal", 32), ("tidal", 64), ("streaming", 32), ("streaming", 64)]
    assert {(row["policy"], row["budget"]) for row in rows} == set(measured)
    assert [row["depth"] for row in rows] == [0.1, 0.3, 0.5, 0.7, 0.9, None] * len(measured) * 2
    assert all(row["questions"] == (5 if row["depth"] is None else 1) for row in rows)
    assert all(row["kl"] == 0 for row in rows if row["policy"] == "dense")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert [line.split()[:2] for line in result.out.splitlines()[-10:-5]] == [["single", name] for name, _ in measured]


def test_needle_tasks_and_chats(run, calibrated, book, tmp_path, monkeypatch):
    """Without --chat or --no-chat: in the template if there is one that takes a context."""
    made = []
    ask = needle.ask

    def spy(engine, trial, policies):
        made.append(engine.tokenizer.decode(trial.context).startswith("<user>Read the following text."))
        return ask(engine, trial, policies)

    monkeypatch.setattr(needle, "ask", spy)
    folder = shutil.copytree(calibrated, tmp_path / "chats")
    arguments = ["--text", book, "--length", 600, "--trials", 1, "--policy", "streaming", "--budget", 64]
    for options in (["--task", "multivalue,quote"], ["--chat"]):
        made.append(options[0])
        result = run("eval", "needle", "--model", folder, *arguments, *options, "--plot", tmp_path / "out.png")
        assert (result.code, result.err) == (0, "")
        assert all(f" {name} " in f" {result.out} " for name in ("multivalue", "quote")) is ("--task" in options)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    for options in ([], ["--no-chat"]):
        made.append(str(options))
        assert run("eval", "needle", "--model", folder, *arguments, *options).code == 0
    assert made == ["--task", False, False, "--chat", False, "[]", True, "['--no-chat']", False]
    (folder / "chat_template.jinja").unlink()
    assert run("eval", "needle", "--model", folder, *arguments).code == 0
    run("eval", "needle", "--model", folder, *arguments, "--chat").refused(
        "no chat template; ask without one (--no-chat)"
    )


def test_ppl(run, calibrated, book, tmp_path):
    result = run(
        *("eval", "ppl", "--model", calibrated, "--text", book, "--length", 200, "--windows", 2),
        *("--policy", "dense,tidal", "--budget", "16,32", "--json", tmp_path / "out.json"),
        *("--plot", tmp_path / "out.png"),
    )
    assert (result.code, result.err) == (0, "")
    rows = json.loads((tmp_path / "out.json").read_text())
    names = ["policy", "budget", "tokens", "perplexity", "ratio_to_dense", "kl_to_dense", "kl_curve", "complete"]
    assert all(list(row) == names for row in rows)
    assert [(row["policy"], row["budget"]) for row in rows] == [("dense", None), ("tidal", 16), ("tidal", 32)]
    assert rows[0]["ratio_to_dense"] == 1.0
    assert {row["tokens"] for row in rows} == {200}
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_recall(run, calibrated, book, tmp_path):
    result = run(
        *("eval", "recall", "--model", calibrated, "--text", book, "--length", 320, "--trials", 1),
        *("--budget", 32, "--json", tmp_path / "out.json", "--plot", tmp_path / "out.png"),
    )
    assert (result.code, result.err) == (0, "")
    rows = json.loads((tmp_path / "out.json").read_text())
    names = ["policy", "budget", "layer", "mass", "top_k", "worst_head_mass", "mass_by_head", "complete"]
    assert all(list(row) == names for row in rows)
    assert "worst head mass" in " ".join(result.out.split()) and "by head" not in result.out
    assert {row["policy"] for row in rows} == {"tidal", "quest", "streaming", "oracle"}
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


INTERRUPTED = {
    "needle": ["--length", 320, "--trials", 3, "--policy", "dense,tidal", "--budget", 32],
    "ppl": ["--length", 200, "--windows", 3, "--policy", "dense,tidal", "--budget", 32],
    "recall": ["--length", 320, "--trials", 3, "--budget", 32],
    "drafts": ["--length", 300, "--prompts", 3, "--max-tokens", 6],
}


@pytest.mark.parametrize("verb", INTERRUPTED)
def test_an_interrupt_keeps_what_was_measured(run, calibrated, book, tmp_path, monkeypatch, verb):
    files = ["--json", tmp_path / "out.json", "--plot", tmp_path / "out.png"]
    command = ["eval", verb, "--model", calibrated, "--text", book, *INTERRUPTED[verb], *files]
    done = {"ppl": 100}.get(verb, 1)  # a window, a trial or a prompt
    monkeypatch.setattr(show, "_bar", lambda total, what: Interrupted(99 if what == "texts" else done))
    result = run(*command)
    stopped = json.loads((tmp_path / "out.json").read_text())
    assert (result.code, result.err.count("\n")) == (130, 2)
    assert result.err.startswith(f"\nStopped; these are the results of {done} of {3 * done} ")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert {row.pop("complete") for row in stopped} == {False}
    monkeypatch.undo()
    if verb == "drafts":
        assert [row["prompts"] for row in stopped] == [1] and "1/1" in result.out
        return
    option = "--windows" if verb == "ppl" else "--trials"
    whole = run(*command, option, 1)
    assert (whole.code, whole.out, whole.err) == (0, result.out, "")
    rows = json.loads((tmp_path / "out.json").read_text())
    assert {row.pop("complete") for row in rows} == {True}
    assert rows == stopped


class Interrupted:
    """A progress bar during which somebody presses Ctrl-C, when so many steps are done."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __enter__(self) -> Interrupted:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self) -> None:
        self.steps -= 1
        if not self.steps:
            raise KeyboardInterrupt


@pytest.mark.parametrize("verb", INTERRUPTED)
def test_an_interrupt_before_anything_was_measured(run, calibrated, book, tmp_path, monkeypatch, verb):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "read", interrupted)
    command = ["eval", verb, "--model", calibrated, "--text", book, *INTERRUPTED[verb]]
    result = run(*command, "--json", tmp_path / "out.json")
    assert (result.code, result.out) == (130, "")
    assert not (tmp_path / "out.json").exists()


def test_the_bundled_text_is_the_default(run, folder):
    assert run("eval", "ppl", "--model", folder, "--length", 64, "--windows", 1, "--policy", "dense").code == 0


def test_every_length_is_checked_before_any_work(run, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Engine, "run", lambda *_: pytest.fail("worked"))
    target = tmp_path / "out.json"
    result = run("eval", "needle", "--model", folder, "--policy", "dense", "--length", "300,4096", "--json", target)
    result.refused("A length of 4096 takes 4097 tokens", "context holds 1024; use a shorter length")
    assert not target.exists()


@pytest.mark.parametrize(
    ("verb", "message"),
    [
        ("needle", "The text has 2 tokens, but a context of 400 needs"),
        ("ppl", "The text has 2 tokens, but a window needs 400"),
        ("recall", "The text has 2 tokens, but a context of 400 needs"),
    ],
)
def test_a_text_too_short(run, calibrated, tmp_path, verb, message):
    (tmp_path / "short.txt").write_text("Hm")
    arguments = ["--model", calibrated, "--text", tmp_path / "short.txt", "--length", 400, "--budget", 32]
    assert len(tokenizer().encode("Hm")) == 2
    run("eval", verb, *arguments).refused(message)


def test_nothing_to_recall(run, folder):
    run("eval", "recall", "--model", folder, "--length", 400, "--policy", "dense").refused("reads the whole context")


def test_eval_drafts(run, folder, drafter, book, tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text(BOOK[:9000])
    (texts / "b.txt").write_text(BOOK[9000:])
    base = ["eval", "drafts", "--model", folder, "--length", "300,320", "--max-tokens", 6]
    result = run(
        *(*base, "--text", texts, "--draft", f"lookup:ngram=3,depth=2,{drafter}", "--prompts", 3, "--recall", 2),
        *("--temperature", "0,0.8", "--policy", "dense,streaming", "--budget", 64),
        *("--json", tmp_path / "out.json", "--plot", tmp_path / "out.png"),
    )
    assert (result.code, result.err) == (0, "")
    rows = json.loads((tmp_path / "out.json").read_text())
    assert all(list(row) == DRAFTS for row in rows)
    cells = [
        (row["text"], row["length"], row["prompts"], row["temperature"], row["policy"], row["draft"]) for row in rows
    ]
    assert cells == [
        (text, length, count, temperature, policy, draft)
        for text, length, count in (("book", 300, 2), ("book", 320, 1), ("recall", 300, 2))
        for temperature in (0.0, 0.8)
        for policy in ("dense", "streaming")
        for draft in ("lookup:ngram=3,depth=2", str(drafter))
    ]
    assert all(row["outputs_equal"] == 1.0 and row["prompts_that_differ"] == 0 for row in rows)
    assert "1/1" in result.out and "2/2" in result.out
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    alone = run(*base, "--text", book, "--prompts", 2, "--adaptive")
    assert (alone.code, alone.err) == (0, "")
    assert alone.out.count("1/1") == 2
    several = [*base, "--text", book, "--prompts", 2, "--draft", f"lookup,(lookup,{drafter})"]
    run(*several).refused(
        f"'(lookup,{drafter})' drafts in several ways, of which the fastest is chosen as it goes; add"
    )
    assert run(*several, "--adaptive").out.count("1/1") == 4


DRAFTS = [
    *("draft", "policy", "budget", "temperature", "text", "length", "prompts", "acceptance_length"),
    *("acceptance_by_position", "passes_per_token", "rows_per_pass", "draft_ms"),
    *("ms_per_token", "undrafted_ms_per_token", "speedup"),
    *("drafter_bytes", "outputs_equal", "prompts_that_differ", "changes_model"),
    *("perplexity", "base_perplexity", "complete"),
]


def test_eval_drafts_of_one_that_changes_the_model(run, folder, book, tmp_path):
    adapted = save_drafter(tmp_path / "adapted", folder, adapter=True)
    result = run(
        *("eval", "drafts", "--model", folder, "--text", book, "--draft", f"lookup,{adapted}", "--prompts", 2),
        *("--length", 64, "--max-tokens", 6, "--json", tmp_path / "out.json"),
    )
    assert result.code == 0 and result.err.count("\n") == 1
    assert result.err.startswith(f"springtide: the drafter '{adapted}' changes the model")
    assert "* changes the model: equal outputs are those of the model as changed, not of the one given." in result.out
    assert "adapted*" in result.out and "lookup*" not in result.out
    same, changed = json.loads((tmp_path / "out.json").read_text())
    assert (same["changes_model"], changed["changes_model"]) == (False, True)
    assert same["perplexity"] == same["base_perplexity"] == changed["base_perplexity"] != changed["perplexity"]
    assert same["outputs_equal"] == changed["outputs_equal"] == 1.0
    assert f"{changed['perplexity']:.2f} ({same['perplexity']:.2f})" in result.out
