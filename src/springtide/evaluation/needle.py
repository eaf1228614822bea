"""Needle in a haystack: questions about what is hidden in a book, and what each policy makes of their answers.

A trial is one context, read once and densely, with questions about it. Each policy is then given a question and its
right answer through the decode path, as if both had been generated: where each of the answer's tokens is the policy's
most probable one, greedy decoding would have written that answer. How far the predictions for these tokens are from
dense ones is measured on the way, and tells policies apart with fewer questions than right and wrong do.

What is hidden and asked is a task's to say, see :mod:`springtide.evaluation.tasks`.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from torch.nn.functional import kl_div

from springtide import facts
from springtide.attention.policy import Policy
from springtide.engine.engine import Engine
from springtide.engine.request import Request
from springtide.errors import SpringtideError
from springtide.evaluation.report import labels

DIGITS = 5
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
FACTS = (
    "Read the following text. Some magic numbers are hidden in it. Remember them, I will ask about them afterwards.\n\n"
)
CONTENT = "springtide-content"  # stands for the content of a message while a chat template is rendered


@dataclass(frozen=True)
class Question:
    """``tokens`` follow the context and lead up to the ``answer``.

    What is asked lies at ``depth``, a share of the context, or all over it (None). ``word`` and ``digits``: what the
    facts that are asked about say; empty if it is no such facts.
    """

    depth: float | None
    tokens: list[int]
    answer: list[int]
    word: str = ""
    digits: str = ""

    @property
    def size(self) -> int:
        """Tokens with the answer."""
        return len(self.tokens) + len(self.answer)


@dataclass(frozen=True)
class Trial:
    """A context, and questions about it."""

    context: list[int]
    questions: list[Question]


@dataclass(frozen=True)
class Cell:
    """What one policy made of a task's questions at one length and depth, or at all depths together (None).

    ``questions``: how many. ``exact_match``: share of them whose answer greedy decoding would have written;
    ``of_dense``: that share over dense attention's on the same questions, None where dense has none right.
    ``agreement``: share of the answers' tokens for which the most probable token is dense's. ``kl``: mean KL divergence
    of the predictions for these tokens from dense ones, nats a token. Each with its standard error, None for a single
    context; questions about the same context are not taken for independent ones.
    """

    policy: str
    budget: int | None
    length: int
    depth: float | None
    questions: int
    exact_match: float
    task: str
    exact_match_se: float | None
    of_dense: float | None
    of_dense_se: float | None
    agreement: float
    agreement_se: float | None
    kl: float
    kl_se: float | None


class Haystack:
    """Makes contexts from a text, and questions about them: the same ones for the same seed.

    Args:
        distractors: this many facts, which nobody asks about, are hidden in every context besides a task's own.
        chat: the context is the content of a user's message in the tokenizer's chat template, which begins with an
            introduction; the question ends it, and the answer begins the assistant's message.

    Raises SpringtideError for a negative number of distractors, and for a chat template that is missing or of no use.
    """

    def __init__(self, tokenizer: Any, text: str, seed: int = 0, distractors: int = 0, chat: bool = False) -> None:
        if distractors < 0:
            raise SpringtideError(f"There can be 0 distractors or more, not {distractors}.")
        self.tokenizer, self.seed, self.distractors = tokenizer, seed, distractors
        self.chat = chat_halves(tokenizer) if chat else None
        self.opening: list[int] = tokenizer.encode("")
        self.book: list[int] = self.encode(text)
        ends = [token for token in set(self.book) if tokenizer.decode([token]).rstrip().endswith((".", "!", "?"))]
        self.sentence_ends = frozenset(ends)

    def trial(self, length: int, number: int, depths: Sequence[float] = DEPTHS, distractors: int = 0) -> Trial:
        """Trial ``number``: a fact at each depth, each of them asked about, and more ``distractors``.

        The context with the longest question and its answer has ``length`` tokens. Raises SpringtideError for a length
        too short for the facts, or too long for the text.
        """
        rng = self.rng(length, number)
        words = self.words(rng, len(depths))
        told, questions = [], []
        for depth, word in zip(depths, words, strict=True):
            digits = self.digits(rng)
            told.append((depth, facts.fact(word, digits)))
            lead, answer = facts.answer(word, "").rstrip(". "), self.encode(f" {digits}")
            questions.append(Question(depth, self.lead(facts.question(word), lead), answer, word, digits))
        longest = max(question.size for question in questions)
        return Trial(self.context(rng, length, longest, told, words, distractors=distractors), questions)

    def asked(self, trial: Trial) -> tuple[list[int], list[bool]]:
        """The trial's questions with their right answers, one after the other; and which tokens are the answers'."""
        tokens: list[int] = []
        answers: list[bool] = []
        for question in trial.questions:
            end = self.encode(".")
            tokens += question.tokens + question.answer + end
            answers += [False] * len(question.tokens) + [True] * len(question.answer) + [False] * len(end)
        return tokens, answers

    def context(
        self,
        rng: random.Random,
        length: int,
        asked: int,
        told: Sequence[tuple[float, str]],
        used: Sequence[str] = (),
        introduction: str = FACTS,
        distractors: int = 0,
    ) -> list[int]:
        """A piece of the book in which sentences are ``told``, each at its depth, and distractors at random ones.

        The context has ``length`` tokens with ``asked``, those of the longest question and its answer. Distractors are
        not about words that are ``used``. Raises SpringtideError for a length too short, or too long for the text.
        """
        words = self.words(rng, self.distractors + distractors, used)
        told = [*told, *((rng.random(), facts.fact(word, self.digits(rng))) for word in words)]
        sentences = sorted(((depth, self.encode(text)) for depth, text in told), key=lambda pair: pair[0])
        opening = self.begin(introduction)
        room = length - len(opening) - sum(len(tokens) for _, tokens in sentences) - asked
        if room < 4 * max(1, len(told)):
            what = f"{len(told)} facts" if told else "a question"
            raise SpringtideError(f"A context of {length} tokens is too short for {what}; use a longer one.")
        if room > len(self.book):
            raise SpringtideError(
                f"The text has {len(self.book)} tokens, but a context of {length} needs {room}; give a longer text."
            )
        start = rng.randrange(len(self.book) - room + 1)
        context, done = opening, 0
        for depth, tokens in sentences:
            place = self._sentence_end(start, room, round(depth * room))
            context += self.book[start + done : start + place] + tokens
            done = place
        return context + self.book[start + done : start + room]

    def begin(self, introduction: str) -> list[int]:
        """Tokens before the piece of the book; a context that is no message has no introduction."""
        return list(self.opening) if self.chat is None else self.encode(self.chat[0] + introduction)

    def lead(self, question: str, lead: str) -> list[int]:
        """Tokens of a question and of the first words of its answer, which begin with a space."""
        return self.encode(question + (lead if self.chat is None else self.chat[1] + lead.lstrip()))

    def rng(self, *key: Any) -> random.Random:
        """Random numbers of their own for each key."""
        return random.Random(" ".join(map(str, (self.seed, *key))))

    def words(self, rng: random.Random, count: int, used: Sequence[str] = ()) -> list[str]:
        """``count`` different words, none of them ``used``; raises SpringtideError if there are not so many."""
        free = [word for word in facts.WORDS if word not in used]
        if count > len(free):
            raise SpringtideError(
                f"There are words for {len(facts.WORDS)} facts, but {len(used) + count} were asked for; "
                "use fewer distractors or depths."
            )
        return rng.sample(free, count)

    def digits(self, rng: random.Random) -> str:
        """A number to hide."""
        return "".join(rng.choices("0123456789", k=DIGITS))

    def encode(self, text: str) -> list[int]:
        """Tokens of a piece of text, without those that a text begins or ends with."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _sentence_end(self, start: int, room: int, place: int) -> int:
        """The first place at or after ``place`` where a sentence has ended, if one ends soon."""
        for end in range(place, min(place + 64, room)):
            if end > 0 and self.book[start + end - 1] in self.sentence_ends:
                return end
        return place


Task = Callable[[Haystack, int, int], Trial]
"""``task(haystack, length, number)`` makes trial ``number``; context, question and answer have ``length`` tokens.

It raises SpringtideError for a length or a text with which that cannot be.
"""


def chat_halves(tokenizer: Any) -> tuple[str, str]:
    """What a tokenizer's chat template writes before and after the content of a first message, up to the answer to it.

    Raises SpringtideError if there is no template, or none that takes such a message and writes its content once.
    """
    if tokenizer.chat_template is None:
        raise SpringtideError("The model's tokenizer has no chat template; ask without one (--no-chat).")
    try:
        messages = [{"role": "user", "content": CONTENT}]
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except (TemplateError, ValueError) as error:
        reason = str(error).rstrip(".")
        raise SpringtideError(f"The model's chat template does not take a question: {reason}.") from None
    before, *after = text.split(CONTENT)
    if len(after) != 1:
        raise SpringtideError(
            f"The model's chat template writes a message {len(after)} times instead of once; ask without (--no-chat)."
        )
    return before, after[0]


def ask(engine: Engine, trial: Trial, policies: Sequence[Policy]) -> Tensor:
    """What each policy makes of the trial's answers, fp64 ``[policy, question, 4]``.

    The four: whether every token of the answer is the policy's most probable one; whether it is dense's; the share of
    tokens for which the two agree; the mean KL divergence of the policy's predictions from dense ones, nats a token.
    """
    reader = engine.read(trial.context)
    scores = torch.zeros(len(policies), len(trial.questions), 4, dtype=torch.float64)
    for at, question in enumerate(trial.questions):
        answer = torch.tensor(question.answer, device=engine.stack.device)
        dense = _predicted(engine.using("dense"), trial, question, reader)
        best = dense.argmax(-1)
        for policy, row in zip(policies, scores[:, at], strict=True):
            own = dense if policy.name == "dense" else _predicted(engine.using(policy), trial, question, reader)
            choice = own.argmax(-1)
            row[0], row[1] = (choice == answer).all(), (best == answer).all()
            row[2] = (choice == best).double().mean()
            row[3] = kl_div(own, dense, reduction="sum", log_target=True) / len(answer)
    return scores


def _predicted(engine: Engine, trial: Trial, question: Question, reader: Request) -> Tensor:
    """Log-probabilities for each token of the answer, fp64 ``[n, V]``; ``reader`` has read the context."""
    tokens = [*trial.context, *question.tokens, *question.answer]
    logits = torch.cat(list(engine.predictions(tokens, len(trial.context), reader.fork())))
    return logits[-len(question.answer) :].double().log_softmax(-1)


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
    tasks: Mapping[str, Task],
    policies: Sequence[Policy],
    lengths: Sequence[int],
    trials: int,
) -> Iterator[Callable[[], list[Cell]]]:
    """Cells of every policy for each length, task and depth, and for all depths together.

    Yields after every trial what gives the cells of those done so far. Raises SpringtideError, before any work is done,
    for a length that the text or the model does not have.
    """
    for length in lengths:
        check_fit(engine, length, length + 1)
        for task in tasks.values():
            for number in range(trials):
                task(haystack, length, number)
    done: dict[tuple[str, int], list[tuple[Trial, Tensor]]] = defaultdict(list)

    def cells() -> list[Cell]:
        return [cell for (name, length), found in done.items() for cell in _cells(name, policies, length, found)]

    for length in lengths:
        for name, task in tasks.items():
            for number in range(trials):
                trial = task(haystack, length, number)
                done[name, length] += [(trial, ask(engine, trial, policies))]
                yield cells


def _cells(task: str, policies: Sequence[Policy], length: int, found: Sequence[tuple[Trial, Tensor]]) -> Iterator[Cell]:
    """Cells of trials, all of which ask at the same depths, with their scores, see :func:`ask`."""
    depths = [question.depth for question in found[0][0].questions]
    scores = torch.stack([own for _, own in found], 1)  # [policy, trial, question, 4]
    for name, policy, own in zip(labels(policies), policies, scores, strict=True):
        for depth in [*dict.fromkeys(depth for depth in depths if depth is not None), None]:
            chosen = own[:, [i for i, other in enumerate(depths) if depth in (None, other)]]
            exact, dense, agreement, kl = chosen.mean(1).T
            one = torch.ones_like(exact)
            exact_match, exact_match_se = ratio(exact, one)
            agreed, agreed_se = ratio(agreement, one)
            divergence, divergence_se = ratio(kl, one)
            of_dense, of_dense_se = ratio(exact, dense) if dense.any() else (None, None)
            yield Cell(
                policy=name,
                budget=policy.budget_at(length),
                length=length,
                depth=depth,
                questions=chosen.shape[0] * chosen.shape[1],
                exact_match=exact_match,
                task=task,
                exact_match_se=exact_match_se,
                of_dense=of_dense,
                of_dense_se=of_dense_se,
                agreement=agreed,
                agreement_se=agreed_se,
                kl=divergence,
                kl_se=divergence_se,
            )


def ratio(x: Tensor, y: Tensor) -> tuple[float, float | None]:
    """``mean(x) / mean(y)`` of figures ``[n]`` of the same contexts, and its standard error by the delta method.

    The error is None for a single context. With ones for ``y`` the two are a mean and its standard error.
    """
    value = x.mean() / y.mean()
    if len(x) == 1:
        return value.item(), None
    return value.item(), ((x - value * y).std() / (len(x) ** 0.5 * y.mean())).item()


def table(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Rows to print: cells of all depths together, with standard errors, and the worst depth's exact match."""
    rows, worst = [], 1.0
    for cell in cells:
        if cell.depth is not None:
            worst = min(worst, cell.exact_match)
            continue
        rows.append(
            {
                "task": cell.task,
                "policy": cell.policy,
                "budget": cell.budget,
                "length": cell.length,
                "questions": cell.questions,
                "exact": _shown(cell.exact_match, cell.exact_match_se),
                "of_dense": _shown(cell.of_dense, cell.of_dense_se),
                "agree": _shown(cell.agreement, cell.agreement_se),
                "KL": _shown(cell.kl, cell.kl_se, digits=4),
                "worst_depth": min(worst, cell.exact_match),
            }
        )
        worst = 1.0
    return rows


def _shown(value: float | None, error: float | None, digits: int = 3) -> str:
    """A figure with its standard error, to the same digits."""
    if value is None:
        return "-"
    return f"{value:.{digits}f}" if error is None else f"{value:.{digits}f}±{error:.{digits}f}"
