"""Trials are what they say, and asking is decoding."""

from __future__ import annotations

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import springtide
from folders import BOOK, VOCAB, tokenizer
from springtide import SpringtideError, facts
from springtide.attention import Tidal
from springtide.engine.engine import Engine
from springtide.evaluation.needle import ANSWER, DEPTHS, DIGITS, Cell, Haystack, ask, needle, overall
from tiny import tiny

LENGTH = 420
LAYERS = {"full": (0,), "select": 1, "reselect": (3,)}


@pytest.fixture(scope="module")
def haystack() -> Haystack:
    return Haystack(tokenizer(), BOOK)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return springtide.load(tiny("qwen3", vocab_size=VOCAB, max_position_embeddings=1024), tokenizer())


@pytest.mark.parametrize("length", [300, LENGTH, 1000])
@pytest.mark.parametrize("number", [0, 1, 7])
def test_context_and_longest_question_have_the_length_exactly(haystack, length, number):
    trial = haystack.trial(length, number)
    assert len(trial.context) + max(len(question.tokens) for question in trial.questions) == length


def test_every_fact_is_told_at_its_depth_and_only_there(haystack):
    trial = haystack.trial(1000, 3)
    text = tokenizer().decode(trial.context)
    assert [question.depth for question in trial.questions] == list(DEPTHS)
    for question in trial.questions:
        fact = facts.fact(question.word, question.digits)
        assert len(question.digits) == DIGITS and question.digits.isdigit()
        assert text.count(fact) == text.count(question.digits) == 1
        assert abs(text.index(fact) / len(text) - question.depth) < 0.1
    assert len({question.word for question in trial.questions}) == len(DEPTHS)


def test_distractors_are_facts_that_nobody_asks_about():
    trial = Haystack(tokenizer(), BOOK, distractors=7).trial(1000, 3)
    text = tokenizer().decode(trial.context)
    assert text.count(" The magic number for ") == len(DEPTHS) + 7
    assert len(trial.questions) == len(DEPTHS)
    assert len(trial.context) + max(len(question.tokens) for question in trial.questions) == 1000
    for question in trial.questions:
        fact = facts.fact(question.word, question.digits)
        assert text.count(fact) == text.count(f"for {question.word} is") == 1
        assert abs(text.index(fact) / len(text) - question.depth) < 0.2


def test_there_are_only_so_many_words():
    with pytest.raises(SpringtideError, match=r"There can be 0 to \d+ distractors, not 9999"):
        Haystack(tokenizer(), BOOK, distractors=9999)


def test_facts_follow_the_end_of_a_sentence_where_one_is_near(haystack):
    text = tokenizer().decode(haystack.trial(1000, 3).context)
    before = [part[-1] for part in text.split(" The magic number for ")[:-1]]
    assert sum(character in ".!?" for character in before) >= 4


def test_questions_lead_up_to_the_digits(haystack):
    trial = haystack.trial(LENGTH, 0)
    question = trial.questions[2]
    asked = tokenizer().decode(question.tokens)
    assert asked == facts.question(question.word) + f" the magic number for {question.word} is"
    tokens, numbers = haystack.asked(trial)
    answers = tokenizer().decode([token for token, number in zip(tokens, numbers, strict=True) if number])
    assert answers == "".join(f" {q.digits}" for q in trial.questions)


def test_the_same_seed_gives_the_same_trial(haystack):
    assert haystack.trial(LENGTH, 4) == Haystack(tokenizer(), BOOK).trial(LENGTH, 4)
    others = [haystack.trial(LENGTH, 5), haystack.trial(LENGTH + 1, 4), Haystack(tokenizer(), BOOK, 1).trial(LENGTH, 4)]
    assert all(other.context != haystack.trial(LENGTH, 4).context for other in others)


def test_opening_tokens_come_first():
    backend = tokenizer().backend_tokenizer
    opened = PreTrainedTokenizerFast(tokenizer_object=type(backend).from_str(backend.to_str()), bos_token="<s>")
    opened.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    trial = Haystack(opened, BOOK).trial(LENGTH, 0)
    assert trial.context[0] == 0
    assert 0 not in trial.context[1:]
    assert all(0 not in question.tokens for question in trial.questions)
    assert len(trial.context) + max(len(question.tokens) for question in trial.questions) == LENGTH


def test_asking_is_generating(engine, haystack):
    """Under dense attention: the same tokens as for context and question in one prompt."""
    trial = haystack.trial(LENGTH, 0)
    outputs = []
    run = Engine.run

    def spy(self, sequences):
        yield from run(self, sequences)
        outputs.append([sequence.output for sequence in sequences])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "run", spy)
        ask(engine, trial, [engine.policy])
    expected = [
        engine.generate(trial.context + question.tokens, max_tokens=ANSWER).token_ids for question in trial.questions
    ]
    assert outputs[-1] == expected


@pytest.mark.parametrize(
    ("said", "right"), [(" {}", True), (" {}.", True), ("{}", True), (" {}9", True), (" 0 {}", False), (" no", False)]
)
def test_what_counts_as_right(engine, haystack, said, right, monkeypatch):
    trial = haystack.trial(LENGTH, 0)
    digits = trial.questions[1].digits

    def run(self, sequences):
        for sequence in sequences:
            sequence.text = said.format(digits)
        return iter(())

    monkeypatch.setattr(Engine, "run", run)
    assert ask(engine, trial, [engine.policy])[0][1] is right


def test_cells(engine, haystack):
    policies = [engine.policy, engine.resolve(Tidal(budget=32, **LAYERS))]
    found = list(needle(engine, haystack, policies, [LENGTH, 500], trials=2))
    assert found.count(None) == 4
    cells = [cell for cell in found if cell is not None]
    assert len(cells) == 2 * 2 * len(DEPTHS)
    assert {(c.policy, c.budget) for c in cells} == {("dense", None), ("tidal", 32)}
    assert {(c.length, c.trials) for c in cells} == {(LENGTH, 2), (500, 2)}


def test_variants_of_a_policy_have_names_of_their_own(engine, haystack):
    variants = [Tidal(budget=32, heads=heads, **LAYERS) for heads in ("kv", "all")]
    cells = [cell for cell in needle(engine, haystack, variants, [LENGTH], trials=1) if cell]
    assert {cell.policy for cell in cells} == {"tidal:heads=kv", "tidal:heads=all"}
    assert len(overall(cells)) == 2


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([LENGTH, 60], "context of 60 tokens is too short for 5 facts"),
        ([LENGTH, 1020], "takes 1028 tokens with questions and answers, but the model's context holds 1024"),
    ],
)
def test_lengths_that_cannot_be_are_refused_before_any_work(engine, haystack, lengths, message, monkeypatch):
    monkeypatch.setattr(Engine, "run", lambda *_: pytest.fail("worked"))
    with pytest.raises(SpringtideError, match=message):
        list(needle(engine, haystack, [engine.policy], lengths, trials=1))


def test_a_text_too_short(engine):
    with pytest.raises(SpringtideError, match=r"The text has .* tokens, but a context of 420 needs"):
        list(needle(engine, Haystack(tokenizer(), "Too short."), [engine.policy], [LENGTH], trials=1))


def test_overall():
    cells = [
        Cell("dense", None, 100, 0.1, 4, 1.0),
        Cell("dense", None, 100, 0.5, 12, 0.5),
        Cell("tidal", 8, 100, 0.1, 4, 0.25),
        Cell("tidal", 16, 100, 0.1, 4, 0.75),
        Cell("tidal", 16, 200, 0.1, 4, 0.0),
    ]
    rows = overall(cells)
    assert rows[0] == {
        "policy": "dense",
        "budget": None,
        "length": 100,
        "trials": 16,
        "exact_match": 0.625,
        "worst_depth": 0.5,
    }
    assert [(row["budget"], row["length"], row["exact_match"]) for row in rows[1:]] == [
        (8, 100, 0.25),
        (16, 100, 0.75),
        (16, 200, 0.0),
    ]
