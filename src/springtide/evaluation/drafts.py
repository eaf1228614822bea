"""Drafters against the same engine without one: how much they get right, how much time that saves, the same output.

Every prompt is read once. Each contender then decodes from a copy of that cache, in an order that rotates from prompt
to prompt. What is timed is everything that decoding takes, after the first token.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import exp, log
from pathlib import Path
from statistics import mean
from typing import Any, Literal

from springtide import facts
from springtide.attention.policy import Policy
from springtide.drafting.drafter import Drafter
from springtide.drafting.several import Several
from springtide.engine.engine import Engine
from springtide.engine.request import Request
from springtide.errors import SpringtideError
from springtide.evaluation.needle import Haystack
from springtide.evaluation.perplexity import perplexity
from springtide.evaluation.report import labels, plot_drafts, print_table, shown
from springtide.loading import drafting
from springtide.rows.sampling import Sampling

Text = Literal["book", "recall"]
ENDS = (".", "!", "?", "\n")  # of the token before a prompt's first one
WARM_UP = 8  # tokens that each contender decodes before anything is timed
WINDOWS = 16  # pieces of a book, at most, that give the perplexity of a target


@dataclass(frozen=True)
class Passage:
    """``prompts`` that all begin with ``context``: a piece of a book, or a book with facts and questions about them.

    ``length``: about how many tokens each prompt has.
    """

    text: Text
    length: int
    context: list[int]
    prompts: list[list[int]]


@dataclass(frozen=True, eq=False)
class Contender:
    """An engine with the drafter of this name, the same one without, ``plain``, and the model as it was, ``base``.

    The latter two differ for a drafter that changes the model.
    """

    draft: str
    engine: Engine
    plain: Engine
    base: Engine


@dataclass(frozen=True)
class Drafts:
    """What a drafter gains over ``prompts`` prompts of about ``length`` tokens from one kind of ``text``.

    ``acceptance_length``: tokens that a pass of the target gives, its own one counted; ``passes_per_token`` is its
    inverse. ``rows_per_pass``: that such a pass has; ``draft_ms``: that proposing its draft took; both means.
    ``acceptance_by_position``: the share of passes in which the draft at depth 1, 2, ... was accepted.
    ``ms_per_token`` and ``undrafted_ms_per_token``: means over the decoded tokens; ``speedup``: the latter over the
    former. ``outputs_equal``: the share of prompts whose tokens are those decoded without a drafter, which all are but
    ``prompts_that_differ``; where the drafter ``changes_model``, both are decoded by the model as it changed it.
    ``perplexity``: the target's on the book, and ``base_perplexity`` that of the model before a drafter changed it;
    both None where none of the drafters does. ``drafter_bytes``: what the drafter remembered of a prompt and its
    output, at most. Figures that no decoded token stands behind are None.
    """

    draft: str
    policy: str
    budget: int | str | None
    temperature: float
    text: Text
    length: int
    prompts: int
    acceptance_length: float | None
    acceptance_by_position: list[float]
    passes_per_token: float | None
    rows_per_pass: float | None
    draft_ms: float | None
    ms_per_token: float | None
    undrafted_ms_per_token: float | None
    speedup: float | None
    drafter_bytes: int
    outputs_equal: float
    prompts_that_differ: int
    changes_model: bool
    perplexity: float | None
    base_perplexity: float | None


@dataclass
class Tally:
    """Sums over prompts. ``depths``: how many drafted tokens each pass had accepted; ``drafting``: in seconds."""

    prompts: int = 0
    tokens: int = 0
    seconds: float = 0.0
    differing: int = 0
    drafter_bytes: int = 0
    drafted: int = 0
    drafting: float = 0.0
    depths: list[int] = field(default_factory=list)

    def add(self, sequence: Request, expected: list[int]) -> None:
        """Count a sequence; the first token came with the prompt, so it does not count."""
        self.prompts += 1
        self.tokens += len(sequence.output) - 1
        self.seconds += (sequence.last_token or 0.0) - (sequence.first_token or 0.0)
        self.differing += sequence.output != expected
        self.drafted += sequence.drafted
        self.drafting += sequence.drafting
        self.depths += accepted_depths(sequence.from_draft[1:])
        self.drafter_bytes = max(self.drafter_bytes, getattr(sequence.draft, "nbytes", 0))

    @property
    def by_position(self) -> list[float]:
        """Share of passes that had at least 1, 2, ... drafted tokens accepted."""
        deepest = max(self.depths, default=0)
        return [sum(depth >= place for depth in self.depths) / len(self.depths) for place in range(1, deepest + 1)]

    @property
    def ms_per_token(self) -> float | None:
        return 1e3 * self.seconds / self.tokens if self.tokens else None


def accepted_depths(from_draft: Sequence[bool]) -> list[int]:
    """How many drafted tokens each pass gave, from which of the tokens were drafted; each pass adds one that is not.

    The last pass may have been cut off before that one.
    """
    depths, depth = [], 0
    for drafted in from_draft:
        depth += drafted
        if not drafted:
            depths.append(depth)
            depth = 0
    return [*depths, depth] if depth else depths


def passages(
    tokenizer: Any, texts: Sequence[str], lengths: Sequence[int], prompts: int, recall: int, seed: int = 0
) -> Iterator[list[Passage] | None]:
    """``prompts`` pieces of the texts, from the start of a sentence or a line, and ``recall`` questions.

    Lengths, in tokens, are taken by turns. The same seed gives the same prompts. Yields None after every text, for
    progress, and the result last. Raises SpringtideError for texts too short.
    """
    rng, haystacks = random.Random(seed), []
    for text in texts:
        haystacks.append(Haystack(tokenizer, text, seed))
        yield None
    longest = max(lengths)
    fitting = [haystack for haystack in haystacks if len(haystack.opening) + len(haystack.book) >= longest]
    if not fitting:
        most = max(len(haystack.opening) + len(haystack.book) for haystack in haystacks)
        raise SpringtideError(
            f"The text has {most} tokens, but a prompt needs {longest}; give a longer text or shorter prompts."
        )
    places = [(haystack, start) for haystack in fitting for start in _starts(haystack, longest)]
    if len(places) < prompts:
        raise SpringtideError(
            f"The text has {len(places)} sentences or lines that a prompt may begin with, but {prompts} prompts were "
            "asked for; give a longer text or fewer --prompts."
        )
    found = []
    for number, (haystack, start) in enumerate(rng.sample(places, prompts)):
        length = lengths[number % len(lengths)]
        context = haystack.opening + haystack.book[start : start + length - len(haystack.opening)]
        found.append(Passage("book", length, context, [context]))
    asked = 0
    while asked < recall:
        number = len(found) - prompts
        haystack = fitting[number % len(fitting)]
        length = lengths[number % len(lengths)]
        trial = haystack.trial(length, number)
        questions = trial.questions[: recall - asked]
        ends = [tokenizer.encode(facts.question(q.word), add_special_tokens=False) for q in questions]
        found.append(Passage("recall", length, trial.context, [trial.context + end for end in ends]))
        asked += len(questions)
    yield found


def _starts(haystack: Haystack, length: int) -> list[int]:
    """Where in the book a prompt of ``length`` tokens may begin."""
    book = haystack.book
    ends = {token for token in set(book) if haystack.tokenizer.decode([token]).rstrip(" ").endswith(ENDS)}
    last = len(book) - (length - len(haystack.opening))
    return [start for start in range(last + 1) if start == 0 or book[start - 1] in ends]


def contenders(
    engine: Engine, changed: Mapping[str, Engine], names: Sequence[str], policies: Sequence[Policy], adaptive: bool
) -> list[Contender]:
    """A contender for each policy and each drafter in ``names``, see :func:`springtide.load`.

    ``changed``: engines with the drafters that changed their model; they are compared with that model undrafted.
    ``adaptive``: leave out drafts while they do not pay; several drafters as one are refused without it.
    """
    found = []
    for policy in policies:
        base = engine.using(policy)
        for name in names:
            plain = changed[name].using(policy).drafting(Drafter()) if name in changed else base
            drafter = changed[name].drafter if name in changed else name
            drafted = drafting(plain, drafter)
            drafted.adaptive = adaptive
            if isinstance(drafted.drafter, Several) and not adaptive:
                raise SpringtideError(
                    f"'{name}' drafts in several ways, of which the fastest is chosen as it goes; add --adaptive."
                )
            found.append(Contender(name, drafted, plain, base))
    return found


def steps(passages: Sequence[Passage]) -> int:
    """How often :func:`drafts` yields."""
    return sum(len(passage.prompts) for passage in passages)


def drafts(
    contenders: Sequence[Contender], passages: Sequence[Passage], temperatures: Sequence[float], max_tokens: int
) -> Iterator[Callable[[], list[Drafts]]]:
    """Decode up to ``max_tokens`` tokens after every prompt, undrafted and with each drafter.

    Yields after every prompt what gives the rows of those done so far. Raises SpringtideError for prompts that do not
    fit the model's context.
    """
    _check_fit(contenders, passages, max_tokens)
    quality, policies = _perplexities(contenders, passages), labels([other.plain.policy for other in contenders])
    plain = {contender.engine: contender.plain for contender in contenders}
    engines = list(dict.fromkeys([*plain.values(), *plain]))
    for engine in engines:
        reader = plain.get(engine, engine).read(passages[0].context)
        _decode(engine, passages[0].prompts[0], reader, Sampling(max_tokens=WARM_UP))
    tallies: dict[tuple[Text, int, float, Engine], Tally] = defaultdict(Tally)

    def rows() -> list[Drafts]:
        return [
            _result(
                contender,
                policy,
                text,
                length,
                temperature,
                tallies[text, length, temperature, contender.engine],
                tallies[text, length, temperature, contender.plain],
                quality,
            )
            for text, length in sorted({(passage.text, passage.length) for passage in passages})
            for temperature in temperatures
            for contender, policy in zip(contenders, policies, strict=True)
            if (text, length, temperature, contender.engine) in tallies
        ]

    number = 0
    for passage in passages:
        models = {engine.stack: engine for engine in plain.values()}
        readers = {stack: engine.read(passage.context) for stack, engine in models.items()}
        for prompt in passage.prompts:
            number += 1
            turn = number % len(engines)
            for temperature in temperatures:
                sampling = Sampling(max_tokens=max_tokens, temperature=temperature, seed=number)
                decoded = {
                    engine: _decode(engine, prompt, readers[engine.stack], sampling)
                    for engine in engines[turn:] + engines[:turn]
                }
                for engine, sequence in decoded.items():
                    expected = decoded[plain.get(engine, engine)].output
                    tallies[passage.text, passage.length, temperature, engine].add(sequence, expected)
            yield rows


def _check_fit(contenders: Sequence[Contender], passages: Sequence[Passage], max_tokens: int) -> None:
    limit = contenders[0].plain.stack.spec.context_limit
    longest = max(len(prompt) for passage in passages for prompt in passage.prompts)
    if longest + max_tokens > limit:
        raise SpringtideError(
            f"A prompt of {longest} tokens and {max_tokens} more are beyond the model's context of {limit}; "
            "use a shorter --length."
        )


def _decode(engine: Engine, prompt: list[int], reader: Request, sampling: Sampling) -> Request:
    """Complete a prompt, which ``reader`` has read as far as its context goes."""
    sequence = engine.start(prompt, sampling, reuse=reader.fork())
    for _ in engine.run([sequence]):
        pass
    return sequence


def _perplexities(contenders: Sequence[Contender], passages: Sequence[Passage]) -> dict[Engine, float]:
    """Of each undrafted engine, on the second halves of some pieces of the book; none if no model was changed."""
    if all(contender.plain is contender.base for contender in contenders):
        return {}
    windows = [passage.context for passage in passages if passage.text == "book"][:WINDOWS]
    found: dict[Engine, float] = {}
    for engine in {engine: None for contender in contenders for engine in (contender.base, contender.plain)}:
        logs = []
        for window in windows:
            *_, rows = perplexity(engine, window, [engine.policy], len(window), 1)
            logs.append(log(rows()[0].perplexity))
        found[engine] = exp(mean(logs))
    return found


def _result(
    contender: Contender,
    policy: str,
    text: Text,
    length: int,
    temperature: float,
    own: Tally,
    plain: Tally,
    quality: Mapping[Engine, float],
) -> Drafts:
    ms, undrafted = own.ms_per_token, plain.ms_per_token
    return Drafts(
        draft=contender.draft,
        policy=policy,
        budget=contender.plain.policy.named_budget,
        temperature=temperature,
        text=text,
        length=length,
        prompts=own.prompts,
        acceptance_length=own.tokens / len(own.depths) if own.depths else None,
        acceptance_by_position=own.by_position,
        passes_per_token=len(own.depths) / own.tokens if own.tokens else None,
        rows_per_pass=1 + own.drafted / len(own.depths) if own.depths else None,
        draft_ms=1e3 * own.drafting / len(own.depths) if own.depths else None,
        ms_per_token=ms,
        undrafted_ms_per_token=undrafted,
        speedup=undrafted / ms if undrafted and ms else None,
        drafter_bytes=own.drafter_bytes,
        outputs_equal=1 - own.differing / own.prompts,
        prompts_that_differ=own.differing,
        changes_model=contender.plain.stack is not contender.base.stack,
        perplexity=quality.get(contender.plain),
        base_perplexity=quality.get(contender.base),
    )


def show(found: Sequence[Drafts]) -> None:
    """Print a table."""
    print_table(
        [
            {
                "draft": Path(row.draft).name + ("*" if row.changes_model else ""),
                **settings,
                "acceptance\nlength": row.acceptance_length,
                "ms a\ntoken": row.ms_per_token,
                "un-\ndrafted": row.undrafted_ms_per_token,
                "speed-\nup": row.speedup,
                "equal\noutputs": f"{row.prompts - row.prompts_that_differ}/{row.prompts}",
                **_quality(row),
            }
            for row, settings in zip(found, _settings(found), strict=True)
        ]
    )
    if any(row.changes_model for row in found):
        print("* changes the model: equal outputs are those of the model as changed, not of the one given.")


def _quality(row: Drafts) -> dict[str, str]:
    if row.perplexity is None:
        return {}
    return {"perplexity\n(base)": f"{row.perplexity:.2f} ({row.base_perplexity:.2f})"}


def plot(path: Path, found: Sequence[Drafts]) -> None:
    """A picture: acceptance by position and speed-up."""
    panels: dict[str, dict[str, tuple[list[float], float]]] = {}
    for row, settings in zip(found, _settings(found), strict=True):
        own = [f"{name} {shown(value)}" for name, value in settings.items() if name != "text"]
        name = ", ".join([Path(row.draft).name, *own])
        panels.setdefault(row.text, {})[name] = (row.acceptance_by_position, row.speedup or 0.0)
    plot_drafts(path, panels)


def _settings(found: Sequence[Drafts]) -> list[dict[str, Any]]:
    """Of each row, that in which the rows differ."""
    names = {"text": "text", "length": "length", "policy": "policy", "budget": "budget", "T": "temperature"}
    varied = {title: name for title, name in names.items() if len({getattr(row, name) for row in found}) > 1}
    return [{title: getattr(row, name) for title, name in varied.items()} for row in found]
