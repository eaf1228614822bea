"""What is asked is in the text, where and as often as it should be."""

from __future__ import annotations

import re
from copy import copy
from itertools import pairwise

import pytest

from folders import BOOK, tokenizer
from springtide import SpringtideError, facts
from springtide.evaluation.needle import DEPTHS, Haystack
from springtide.evaluation.tasks import BEGUN, SENTENCE, TASKS, parse_tasks

LENGTH = 1600
TURNS = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}<assistant>"


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "chat"])
def haystack(request) -> Haystack:
    own = copy(tokenizer())
    own.chat_template = TURNS
    return Haystack(own, BOOK, chat=request.param)


def texts(trial) -> tuple[str, list[tuple[str, str]]]:
    """The context, and what comes before and in each answer."""
    decode = tokenizer().decode
    return decode(trial.context), [(decode(q.tokens), decode(q.answer)) for q in trial.questions]


@pytest.mark.parametrize("task", TASKS)
def test_trials_have_their_length_and_are_the_same_for_the_same_seed(haystack, task):
    trials = [TASKS[task](haystack, LENGTH, number) for number in range(3)]
    for trial in trials:
        assert len(trial.context) + max(len(q.tokens) + len(q.answer) for q in trial.questions) == LENGTH
    assert TASKS[task](haystack, LENGTH, 1) == trials[1]
    other = Haystack(haystack.tokenizer, BOOK, seed=1, chat=haystack.chat is not None)
    assert TASKS[task](other, LENGTH, 1).context != trials[1].context
    assert len({tuple(trial.context) for trial in trials}) == 3


@pytest.mark.parametrize("task", TASKS)
def test_chats_introduce_the_text_and_let_the_assistant_answer(haystack, task):
    context, asked = texts(TASKS[task](haystack, LENGTH, 0))
    for question, answer in asked:
        assert question.startswith("\n\nQuestion: ")
        assert answer.startswith(" ") or task == "quote"
        assert "\n\n" not in answer
        if haystack.chat is None:
            assert "? Answer: " in question
        else:
            assert "? Answer:</><assistant>the " in question
    assert context.startswith("<user>Read the following text. ") is (haystack.chat is not None)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(("text", "length"), [("Too short.", LENGTH), (BOOK, 90)])
def test_what_is_too_short_is_refused(task, text, length):
    with pytest.raises(SpringtideError, match=r"too short|give a longer text|another text"):
        TASKS[task](Haystack(tokenizer(), text), length, 0)


def test_multikey_is_single_among_more_facts(haystack):
    one, many = (TASKS[task](haystack, LENGTH, 2) for task in ("single", "multikey"))
    assert one == haystack.trial(LENGTH, 2)
    assert many.questions == one.questions
    assert texts(one)[0].count("The magic number for") == 5
    assert texts(many)[0].count("The magic number for") == 25
    for question in many.questions:
        assert texts(many)[0].count(f"for {question.word} is") == 1
        assert texts(many)[0].count(facts.fact(question.word, question.digits)) == 1


def test_distractors_come_on_top():
    haystack = Haystack(tokenizer(), BOOK, distractors=4)
    found = {
        task: texts(TASKS[task](haystack, LENGTH, 0))[0].count("The magic number for")
        for task in TASKS
        if task != "quote"
    }
    assert found == {"single": 9, "multikey": 29, "multivalue": 4, "tracking": 4}
    with pytest.raises(SpringtideError, match="quote task hides nothing in the text, so it takes no distractors"):
        TASKS["quote"](haystack, LENGTH, 0)


def test_multivalue_asks_for_all_numbers_in_their_order(haystack):
    trial = TASKS["multivalue"](haystack, LENGTH, 1)
    context, asked = texts(trial)
    told = re.findall(r" One of the magic numbers for (\w+) is (\d{5})\.", context)
    assert len(told) == len(set(told)) == 3 * len(trial.questions)
    for question, (before, answer) in zip(trial.questions, asked, strict=True):
        assert before.endswith(f"he magic numbers for {question.word} are")
        assert f"what are the 3 magic numbers for {question.word}? Answer:" in before
        assert answer == " " + ", ".join(digits for word, digits in told if word == question.word)
        assert question.depth is None
        places = [context.index(digits) / len(context) for digits in answer.strip().split(", ")]
        assert [int(3 * place) for place in places] == [0, 1, 2]
    assert len({question.word for question in trial.questions}) == len(trial.questions)


def test_tracking_follows_a_value_along_its_chain(haystack):
    trial = TASKS["tracking"](haystack, LENGTH, 1)
    context, asked = texts(trial)
    given = dict(re.findall(r" The value of (\w+) is (\d{5})\.", context))
    copied = re.findall(r" The value of (\w+) is copied to (\w+)\.", context)
    assert len(trial.questions) == len(given) == len(set(given.values())) == 2
    assert len(copied) == len(dict(copied)) == len({b for _, b in copied}) == 4
    for question, (before, answer) in zip(trial.questions, asked, strict=True):
        assert f"which variables get the value {given[question.word]}? Answer:" in before
        assert question.digits == given[question.word]
        first, second = dict(copied)[question.word], dict(copied)[dict(copied)[question.word]]
        assert before.endswith(f"he value of {question.word} is copied to")
        assert answer == f" {first}, the value of {first} is copied to {second}"
        assert question.depth is None
        sentences = (f" {question.word} is {question.digits}", f"copied to {first}.", f"copied to {second}.")
        assert [int(3 * context.index(sentence) / len(context)) for sentence in sentences] == [0, 1, 2]


def test_quotes_are_sentences_that_begin_once(haystack):
    trial = TASKS["quote"](haystack, LENGTH, 0)
    assert [question.depth for question in trial.questions] == list(DEPTHS)
    ends = {token for token in trial.context if tokenizer().decode([token]).rstrip()[-1:] in tuple(".!?")}
    runs = [tuple(trial.context[at : at + SENTENCE]) for at in range(len(trial.context))]
    for question, (depth, after) in zip(trial.questions, pairwise((*DEPTHS, 1)), strict=True):
        begun = question.tokens[-BEGUN:]
        assert len(question.answer) == SENTENCE - BEGUN
        assert [run[:BEGUN] for run in runs].count(tuple(begun)) == 1
        place = runs.index((*begun, *question.answer))
        assert trial.context[place - 1] in ends
        assert ends.isdisjoint(runs[place])
        assert depth - 0.01 < place / len(trial.context) < after + 0.03
        assert tokenizer().decode(begun + question.answer) in BOOK


def test_a_text_without_sentences_is_not_quoted():
    with pytest.raises(SpringtideError, match="no contexts of 900 tokens with a sentence of 16 tokens at every depth"):
        TASKS["quote"](Haystack(tokenizer(), "words and words " * 2000), 900, 0)


def test_tasks_by_name():
    assert list(parse_tasks("tracking, single")) == ["tracking", "single"]
    with pytest.raises(SpringtideError, match="Unknown task 'nosuch': choose among single, multikey, multivalue, tr"):
        parse_tasks("single,nosuch")
