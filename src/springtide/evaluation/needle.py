"""Needle in a haystack: facts hidden in a book, and questions whose answers are decoded token by token.

A trial is one context that holds one fact at each depth and is asked about each of them, so that every fact is the
needle once and a distractor otherwise; more distractors, which nobody asks about, make it harder. The context is read
once, densely; each policy then decodes the question's tokens and the answer from a copy of that cache, as if the
question had been generated.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from springtide import facts
from springtide.attention.policy import Policy
from springtide.engine.engine import Engine
from springtide.engine.sampling import Sampling
from springtide.errors import SpringtideError
from springtide.evaluation.report import labels

DIGITS = 5
ANSWER = DIGITS + 3  # tokens that an answer may take
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True)
class Question:
    """``tokens`` follow the context; the answer is right if its first number is ``digits``."""

    depth: float
    word: str
    digits: str
    tokens: list[int]


@dataclass(frozen=True)
class Trial:
    """A book with a fact at each depth, and a question about each fact."""

    context: list[int]
    questions: list[Question]


@dataclass(frozen=True)
class Cell:
    """Exact match of one policy at one length and depth."""

    policy: str
    budget: int | None
    length: int
    depth: float
    trials: int
    exact_match: float


class Haystack:
    """Makes trials from a text, with ``distractors`` more facts than are asked about: the same ones for the same seed.

    Raises SpringtideError for more distractors than there are words.
    """

    def __init__(self, tokenizer: Any, text: str, seed: int = 0, distractors: int = 0) -> None:
        most = len(facts.WORDS) - len(DEPTHS)
        if not 0 <= distractors <= most:
            raise SpringtideError(f"There can be 0 to {most} distractors, not {distractors}.")
        self.tokenizer, self.seed, self.distractors = tokenizer, seed, distractors
        self.opening: list[int] = tokenizer.encode("")
        self.book: list[int] = self._encode(text)
        ends = [token for token in set(self.book) if tokenizer.decode([token]).rstrip().endswith((".", "!", "?"))]
        self.sentence_ends = frozenset(ends)

    def trial(self, length: int, number: int, depths: Sequence[float] = DEPTHS) -> Trial:
        """Trial ``number``, whose context and question have ``length`` tokens together."""
        rng = random.Random(f"{self.seed} {length} {number}")
        places = [*depths, *(rng.random() for _ in range(self.distractors))]
        words = rng.sample(facts.WORDS, len(places))
        numbers = ["".join(rng.choices("0123456789", k=DIGITS)) for _ in places]
        statements = [self._encode(facts.fact(word, digits)) for word, digits in zip(words, numbers, strict=True)]
        questions = [self._encode(facts.question(word) + self._lead(word)) for word in words[: len(depths)]]
        room = length - len(self.opening) - sum(map(len, statements)) - max(map(len, questions))
        if room < 4 * len(places):
            raise SpringtideError(
                f"A context of {length} tokens is too short for {len(places)} facts; use a longer one."
            )
        if room > len(self.book):
            raise SpringtideError(
                f"The text has {len(self.book)} tokens, but a context of {length} needs {room}; give a longer text."
            )
        start = rng.randrange(len(self.book) - room + 1)
        context = list(self.opening)
        done = 0
        for depth, statement in sorted(zip(places, statements, strict=True), key=lambda pair: pair[0]):
            place = self._sentence_end(start, room, round(depth * room))
            context += self.book[start + done : start + place] + statement
            done = place
        context += self.book[start + done : start + room]
        asked = [Question(*item) for item in zip(depths, words, numbers, questions, strict=False)]
        return Trial(context, asked)

    def asked(self, trial: Trial) -> tuple[list[int], list[bool]]:
        """The trial's questions with their right answers, one after the other; and which tokens are the numbers."""
        tokens: list[int] = []
        numbers: list[bool] = []
        for question in trial.questions:
            number, end = self._encode(f" {question.digits}"), self._encode(".")
            tokens += question.tokens + number + end
            numbers += [False] * len(question.tokens) + [True] * len(number) + [False] * len(end)
        return tokens, numbers

    def _sentence_end(self, start: int, room: int, place: int) -> int:
        """The first place at or after ``place`` where a sentence has ended, if one ends soon."""
        for end in range(place, min(place + 64, room)):
            if end > 0 and self.book[start + end - 1] in self.sentence_ends:
                return end
        return place

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    @staticmethod
    def _lead(word: str) -> str:
        """The answer up to its digits, so that the first decoded tokens are the number."""
        return facts.answer(word, "").rstrip(". ")


def ask(engine: Engine, trial: Trial, policies: Sequence[Policy]) -> list[list[bool]]:
    """Whether each policy answers each question of the trial rightly: ``[policy][question]``."""
    sampling = Sampling(max_tokens=ANSWER)
    reader = engine.read(trial.context)
    results = []
    for policy in policies:
        under = engine.using(policy)
        sequences = [
            under.start([*trial.context, *q.tokens], sampling, prefill=len(trial.context), reuse=reader.fork())
            for q in trial.questions
        ]
        list(under.run(sequences))
        results.append([s.text.strip().startswith(q.digits) for s, q in zip(sequences, trial.questions, strict=True)])
    return results


def check_fit(engine: Engine, length: int, needed: int) -> None:
    """Raise SpringtideError if ``needed`` tokens, for a context of ``length`` and what follows, are too many."""
    limit = engine.stack.spec.context_limit
    if needed > limit:
        raise SpringtideError(
            f"A length of {length} takes {needed} tokens with questions and answers, but the model's context holds "
            f"{limit}; use a shorter length."
        )


def needle(
    engine: Engine,
    haystack: Haystack,
    policies: Sequence[Policy],
    lengths: Sequence[int],
    trials: int,
    depths: Sequence[float] = DEPTHS,
) -> Iterator[Cell | None]:
    """Cells of every policy, length and depth; None is yielded after every trial, for progress.

    Raises SpringtideError, before any work is done, for a length that the text or the model does not have.
    """
    for length in lengths:
        check_fit(engine, length, length + ANSWER)
        for number in range(trials):
            haystack.trial(length, number, depths)
    names = labels(policies)
    for length in lengths:
        right = [[0] * len(depths) for _ in policies]
        for number in range(trials):
            for counts, answers in zip(
                right, ask(engine, haystack.trial(length, number, depths), policies), strict=True
            ):
                for i, answer in enumerate(answers):
                    counts[i] += answer
            yield None
        for name, policy, counts in zip(names, policies, right, strict=True):
            for depth, count in zip(depths, counts, strict=True):
                yield Cell(name, getattr(policy, "budget", None), length, depth, trials, count / trials)


def overall(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """One row for each policy, budget and length: exact match over all depths, and in the worst depth."""
    grouped: dict[tuple[str, int | None, int], list[Cell]] = {}
    for cell in cells:
        grouped.setdefault((cell.policy, cell.budget, cell.length), []).append(cell)
    return [
        {
            "policy": policy,
            "budget": budget,
            "length": length,
            "trials": sum(cell.trials for cell in found),
            "exact_match": sum(cell.exact_match * cell.trials for cell in found) / sum(cell.trials for cell in found),
            "worst_depth": min(cell.exact_match for cell in found),
        }
        for (policy, budget, length), found in grouped.items()
    ]
