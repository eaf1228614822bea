"""What is hidden in a haystack, and what is asked about it.

Retrieval tasks like those of RULER (Hsieh et al., arXiv 2404.06654, section 3), and one that hides nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from springtide.errors import SpringtideError
from springtide.evaluation.needle import DEPTHS, Haystack, Question, Task, Trial

MORE_KEYS = 20  # facts that nobody asks about
WORDS_ASKED = 2  # words with several numbers in a context
VALUES = 3  # numbers of each
CHAINS = 2  # of variables in a context
HOPS = 2  # from the first variable of a chain to its last
SENTENCE = 16  # tokens at least of one that is quoted
BEGUN = 8  # of them are told by the question, the others are the answer
ATTEMPTS = 20  # contexts that are looked through for sentences

VARIABLES = (
    "Read the following text. Variables and their values are hidden in it. Remember them, I will ask about them "
    "afterwards.\n\n"
)
SENTENCES = "Read the following text. I will ask for sentences of it afterwards.\n\n"


def single(haystack: Haystack, length: int, number: int) -> Trial:
    """A fact at each depth, all of them asked about: every fact is the needle once, and a distractor otherwise."""
    return haystack.trial(length, number)


def multikey(haystack: Haystack, length: int, number: int) -> Trial:
    """The same facts and questions, among more facts that nobody asks about."""
    return haystack.trial(length, number, distractors=MORE_KEYS)


def multivalue(haystack: Haystack, length: int, number: int) -> Trial:
    """Words that have several numbers, one in each part of the text; all numbers of a word are asked for at once."""
    rng = haystack.rng("multivalue", length, number)
    words = haystack.words(rng, WORDS_ASKED)
    told: list[tuple[float, str]] = []
    questions = []
    for word in words:
        numbers = [haystack.digits(rng) for _ in range(VALUES)]
        places = [(part + rng.random()) / VALUES for part in range(VALUES)]
        sentences = [f" One of the magic numbers for {word} is {digits}." for digits in numbers]
        told += zip(places, sentences, strict=True)
        asked = f"\n\nQuestion: what are the {VALUES} magic numbers for {word}? Answer:"
        tokens = haystack.lead(asked, f" the magic numbers for {word} are")
        digits = ", ".join(numbers)
        questions.append(Question(None, tokens, haystack.encode(f" {digits}"), word, digits))
    longest = max(question.size for question in questions)
    return Trial(haystack.context(rng, length, longest, told, words), questions)


def tracking(haystack: Haystack, length: int, number: int) -> Trial:
    """Values that are copied along chains of variables, a link in each part of the text; a value is to be followed.

    The answer says every link in the text's words, from the first variable on.
    """
    rng = haystack.rng("tracking", length, number)
    words = haystack.words(rng, CHAINS * (HOPS + 1))
    told: list[tuple[float, str]] = []
    questions = []
    for first in range(0, len(words), HOPS + 1):
        chain, digits = words[first : first + HOPS + 1], haystack.digits(rng)
        said = [f" The value of {chain[0]} is {digits}."]
        said += [f" The value of {a} is copied to {b}." for a, b in pairwise(chain)]
        told += [((part + rng.random()) / len(said), sentence) for part, sentence in enumerate(said)]
        asked = f"\n\nQuestion: which variables get the value {digits}? Answer:"
        lead = f" the value of {chain[0]} is copied to"
        rest = "".join(f", the value of {a} is copied to {b}" for a, b in pairwise(chain[1:]))
        answer = haystack.encode(f" {chain[1]}{rest}")
        questions.append(Question(None, haystack.lead(asked, lead), answer, chain[0], digits))
    longest = max(question.size for question in questions)
    return Trial(haystack.context(rng, length, longest, told, words, VARIABLES), questions)


def quote(haystack: Haystack, length: int, number: int) -> Trial:
    """A sentence of the book itself at each depth, which the question begins and the answer goes on with.

    It is the first one at or after its depth that is long enough and begins like no other place of the context.
    """
    if haystack.distractors:
        raise SpringtideError("The quote task hides nothing in the text, so it takes no distractors; leave them out.")
    rng = haystack.rng("quote", length, number)
    lead = haystack.lead("\n\nQuestion: which sentence of the text begins like this? Answer:", " the sentence is:")
    begin = len(haystack.begin(SENTENCES))
    for _ in range(ATTEMPTS):
        context = haystack.context(rng, length, len(lead) + SENTENCE, [], introduction=SENTENCES)
        bounds = [begin + round(depth * (len(context) - begin)) for depth in (*DEPTHS, 1)]
        places = [place for part in pairwise(bounds) if (place := _sentence(haystack, context, *part)) is not None]
        if len(places) == len(DEPTHS):
            break
    else:
        raise SpringtideError(
            f"The text has no contexts of {length} tokens with a sentence of {SENTENCE} tokens at every depth; "
            "use a longer context or another text."
        )
    questions = []
    for depth, place in zip(DEPTHS, places, strict=True):
        sentence = context[place : place + SENTENCE]
        questions.append(Question(depth, lead + sentence[:BEGUN], sentence[BEGUN:]))
    return Trial(context, questions)


def _sentence(haystack: Haystack, context: Sequence[int], start: int, stop: int) -> int | None:
    """Where between two places of the context a sentence begins that a question can be about, None if there is none."""
    for place in range(start, stop - SENTENCE + 1):
        sentence = context[place : place + SENTENCE]
        if (
            context[place - 1] in haystack.sentence_ends
            and haystack.sentence_ends.isdisjoint(sentence)
            and "\n\n" not in haystack.tokenizer.decode(sentence)
            and sum(context[at : at + BEGUN] == sentence[:BEGUN] for at in range(len(context))) == 1
        ):
            return place
    return None


TASKS: dict[str, Task] = {task.__name__: task for task in (single, multikey, multivalue, tracking, quote)}


def parse_tasks(text: str) -> dict[str, Task]:
    """The tasks that a comma list names; raises SpringtideError for a name that is none of them."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in TASKS:
            raise SpringtideError(f"Unknown task '{name}': choose among {', '.join(TASKS)}.")
    return {name: TASKS[name] for name in names}
