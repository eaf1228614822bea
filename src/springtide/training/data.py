"""The pocket model's data: a folder of books, a tokenizer, and samples of text, copying and facts.

Every sample is a run of `length + 1` tokens in which each token carries a loss weight and belongs to one of three
objectives. A batch averages each objective by itself, so that a few answers in a long book count as much as the book.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from springtide import facts
from springtide.errors import SpringtideError

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

BOS, EOS = 0, 1
DIGITS = 5

# Objectives.
TEXT, ANSWER, COPY = 0, 1, 2

# Weights inside the answer objective, and inside the text objective those of a book with facts and of the facts.
DIGIT_WEIGHT, ANSWER_WEIGHT, QUESTION_WEIGHT = 3.0, 1.0, 0.2
BOOK_WEIGHT, STATEMENT_WEIGHT = 0.5, 0.1

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{ '\\n\\nQuestion: ' + message['content'].strip() + ' Answer:' }}"
    "{%- elif message['role'] == 'assistant' -%}{{ ' ' + message['content'].strip() + '</s>' }}"
    "{%- else -%}{{ message['content'] }}"
    "{%- endif -%}"
    "{%- endfor -%}"
)


@dataclass(frozen=True)
class Corpus:
    """The books of a folder, in name order, without those held out; `digest` identifies their content."""

    books: dict[str, str]
    digest: str


def read_corpus(folder: Path, hold_out: Sequence[str] = ()) -> Corpus:
    """Read every .txt file of `folder` whose name is not in `hold_out`."""
    if not folder.is_dir():
        raise SpringtideError(f"There is no corpus folder {folder}: pass a folder with .txt files.")
    paths = sorted(path for path in folder.glob("*.txt") if path.name not in hold_out)
    books, digest = {}, hashlib.sha256()
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise SpringtideError(f"{path} is not UTF-8 text: convert it, or move it out of the folder.") from None
        except OSError as error:
            raise SpringtideError(f"{path} cannot be read ({error.strerror}).") from error
        digest.update(f"{path.name}\0{len(text)}\0".encode() + text.encode())
        if text.strip():
            books[path.name] = text
    if not books:
        raise SpringtideError(f"{folder} holds no .txt file with text to train on: put some books there.")
    return Corpus(books, digest.hexdigest())


def train_tokenizer(corpus: Corpus, vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every digit is a token of its own, so that numbers are copied digit by digit."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_tokenizer_text(corpus), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _tokenizer_text(corpus: Corpus) -> Iterator[str]:
    """The books, and enough facts and questions that their wording gets short encodings."""
    yield from corpus.books.values()
    for _ in range(10):
        for word in facts.WORDS:
            yield facts.fact(word, "0") + facts.question(word) + facts.answer(word, "0")


@dataclass
class Sample:
    """Tokens with the loss weight and the objective of each; `digit_starts` are where the answers' digits begin."""

    tokens: Ints
    weights: Floats
    objectives: Ints
    digit_starts: list[int]


class Batch(NamedTuple):
    """`tokens [B, T + 1]`, `positions [B, T]`, `weights [B, T]` of the targets `tokens[:, 1:]`.

    The weights of each objective present sum to one. `answers`, `copies` and `text [B, T]`, bool, mark targets: the
    first digit of each answer, and those supervised by these objectives.
    """

    tokens: Tensor
    positions: Tensor
    weights: Tensor
    answers: Tensor
    copies: Tensor
    text: Tensor

    @property
    def length(self) -> int:
        return self.positions.shape[1]

    @property
    def gaps(self) -> bool:
        return int(self.positions.max()) >= self.length


@dataclass(frozen=True)
class Mix:
    """Shares of the kinds of sample in a batch; the rest is text."""

    copying: float
    facts: float


class _Builder:
    """A sample that grows piece by piece."""

    def __init__(self) -> None:
        self.tokens: list[Ints] = []
        self.weights: list[Floats] = []
        self.objectives: list[Ints] = []
        self.digit_starts: list[int] = []
        self.length = 0

    def add(self, tokens: Ints, weight: float | Floats, objective: int) -> None:
        count = len(tokens)
        self.tokens.append(tokens)
        self.weights.append(np.broadcast_to(np.asarray(weight, dtype=np.float32), count))
        self.objectives.append(np.full(count, objective))
        self.length += count

    def sample(self) -> Sample:
        return Sample(
            np.concatenate(self.tokens),
            np.concatenate(self.weights),
            np.concatenate(self.objectives),
            self.digit_starts,
        )


class _FactsBuilder(_Builder):
    """A sample about facts: those stated and not yet asked for, and the words still unused, as indices."""

    def __init__(self, words: list[int]) -> None:
        super().__init__()
        self.stated: list[tuple[int, Ints]] = []
        self.unused = words


class _Wording:
    """Token ids of facts, questions and answers; digits are filled into encoded templates."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        def encode(text: str) -> Ints:
            return np.array(tokenizer.encode(text, add_special_tokens=False), dtype=np.int64)

        blank = "0" * DIGITS
        self.digit_ids = encode("0123456789")
        self.facts = [encode(facts.fact(word, blank)) for word in facts.WORDS]
        self.questions = [encode(facts.question(word)) for word in facts.WORDS]
        self.answers = [encode(facts.answer(word, blank)) for word in facts.WORDS]

    def fill(self, template: Ints, digits: Ints) -> tuple[Ints, int]:
        """The template with `digits` in place of its zeros, and the index of the first of them."""
        start = int(np.flatnonzero(template == self.digit_ids[0])[0])
        filled = template.copy()
        filled[start : start + DIGITS] = self.digit_ids[digits]
        return filled, start


class SampleMaker:
    """Draws samples; all randomness comes from `rng`."""

    def __init__(self, corpus: Corpus, tokenizer: PreTrainedTokenizerFast, rng: np.random.Generator) -> None:
        self.rng = rng
        self.vocab_size = len(tokenizer)
        self.books = [np.array(ids, dtype=np.int64) for ids in _encode_books(corpus, tokenizer)]
        sizes = np.array([len(book) for book in self.books], dtype=np.float64)
        self.book_shares = sizes / sizes.sum()
        pieces = tokenizer.convert_ids_to_tokens(list(range(self.vocab_size)))
        self.ends_sentence = np.array([piece[-1] in ".!?" for piece in pieces])
        self.wording = _Wording(tokenizer)

    # -- batches ------------------------------------------------------------------------------------------

    def batch(self, size: int, length: int, mix: Mix, spread: int = 0) -> Batch:
        """`size` samples of `length` targets; with `spread`, positions have gaps and reach up to that far."""
        samples = [self._sample(length + 1, mix) for _ in range(size)]
        tokens = np.stack([sample.tokens for sample in samples])
        weights = np.stack([sample.weights for sample in samples])[:, 1:].copy()
        objectives = np.stack([sample.objectives for sample in samples])[:, 1:]
        supervised = weights > 0
        for objective in (TEXT, ANSWER, COPY):
            members = objectives == objective
            weights[members] /= max(float(weights[members].sum()), 1e-6)
        answers = np.zeros_like(supervised)
        for row, sample in enumerate(samples):
            answers[row, np.array(sample.digit_starts, dtype=np.int64) - 1] = True
        positions = np.stack([self._positions(length, spread) for _ in range(size)])
        copies, text = (objectives == COPY) & supervised, (objectives == TEXT) & supervised
        return Batch(*map(torch.from_numpy, (tokens, positions, weights, answers, copies, text)))

    def _positions(self, length: int, spread: int) -> Ints:
        """Positions with 1-4 random gaps (PoSE, Zhu et al. 2023): long distances at the cost of short samples."""
        positions = np.arange(length)
        if spread <= length:
            return positions
        total = int(self.rng.integers(0, spread - length + 1))
        cuts = self.rng.integers(1, length, size=int(self.rng.integers(1, 5)))
        shares = self.rng.dirichlet(np.ones(len(cuts)))
        for cut, gap in zip(cuts, np.floor(shares * total).astype(np.int64), strict=True):
            positions[cut:] += gap
        return positions

    def _sample(self, length: int, mix: Mix) -> Sample:
        draw = self.rng.random()
        if draw < mix.copying:
            return self.copying(length)
        if draw < mix.copying + mix.facts:
            return self.facts(length)
        return self.text(length)

    # -- samples ------------------------------------------------------------------------------------------

    def text(self, length: int) -> Sample:
        """A window of a book, now and then opened by `<s>`."""
        builder = _Builder()
        tokens = self._window(length).copy()
        if self.rng.random() < 0.1:
            tokens[0] = BOS
        builder.add(tokens, 1.0, TEXT)
        return builder.sample()

    def copying(self, length: int) -> Sample:
        """Random segments of 6-24 tokens that return later; a repeat is supervised from its second token on."""
        builder = _Builder()
        segments: list[Ints] = []
        while builder.length < length:
            room = length - builder.length
            if segments and self.rng.random() < 0.5:
                repeat = segments[int(self.rng.integers(len(segments)))][:room]
                weights = np.ones(len(repeat), dtype=np.float32)
                weights[0] = 0.0
                builder.add(repeat, weights, COPY)
            else:
                segment = self.rng.integers(2, self.vocab_size, size=int(self.rng.integers(6, 25)))
                segments.append(segment)
                builder.add(segment[:room], 0.0, COPY)
        return builder.sample()

    def facts(self, length: int) -> Sample:
        """Book text with facts strewn in and questions at its end; some samples have a second such turn."""
        builder = _FactsBuilder(self.rng.permutation(len(facts.WORDS)).tolist())
        if length >= 256 and self.rng.random() < 0.15:
            self._turn(builder, int(length * self.rng.uniform(0.3, 0.7)))
        self._turn(builder, length - builder.length)
        return builder.sample()

    def _turn(self, builder: _FactsBuilder, length: int) -> None:
        """Add exactly `length` tokens: text with new facts, then a chain of questions, closed by `</s>`."""
        most_facts, most_questions = (12, 8) if length < 4096 else (24, 16)
        # About 15 tokens a fact and 30 a question with its answer; the rest stays book text.
        most_facts = max(1, min(most_facts, length // 2 // 15))
        most_questions = max(1, min(most_questions, length // 3 // 30))
        new = [
            (builder.unused.pop(), self.rng.integers(0, 10, size=DIGITS))
            for _ in range(int(self.rng.integers(1, most_facts + 1)))
        ]
        builder.stated += new
        count = min(int(self.rng.integers(1, most_questions + 1)), len(builder.stated))
        asked = [builder.stated.pop(int(self.rng.integers(len(builder.stated)))) for _ in range(count)]
        self._add_text(builder, length, new, asked)
        for word, digits in asked:
            self._add_question(builder, word, digits)
        builder.add(np.array([EOS]), ANSWER_WEIGHT, ANSWER)

    def _add_text(
        self, builder: _FactsBuilder, length: int, new: list[tuple[int, Ints]], asked: list[tuple[int, Ints]]
    ) -> None:
        """Book text with the `new` facts in it, which leaves room for the questions out of `length` tokens."""
        statements = [self.wording.fill(self.wording.facts[word], digits)[0] for word, digits in new]
        questions = sum(len(self.wording.questions[word]) + len(self.wording.answers[word]) for word, _ in asked)
        room = length - questions - 1 - sum(map(len, statements))
        book = self._window(room, end_at_sentence=self.rng.random() < 0.5)
        places = sorted(self._place(book) for _ in statements)
        for start, place, statement in zip([0, *places], places, statements, strict=False):
            builder.add(book[start:place], BOOK_WEIGHT, TEXT)
            builder.add(statement, self._statement_weights(statement), TEXT)
        builder.add(book[places[-1] :], BOOK_WEIGHT, TEXT)

    def _add_question(self, builder: _FactsBuilder, word: int, digits: Ints) -> None:
        builder.add(self.wording.questions[word], QUESTION_WEIGHT, ANSWER)
        tokens, start = self.wording.fill(self.wording.answers[word], digits)
        weights = np.full(len(tokens), ANSWER_WEIGHT, dtype=np.float32)
        weights[start : start + DIGITS] = DIGIT_WEIGHT
        builder.digit_starts.append(builder.length + start)
        builder.add(tokens, weights, ANSWER)

    def _statement_weights(self, statement: Ints) -> Floats:
        """Nothing can be learnt from a fact's random digits, and little from the words around them."""
        return np.where(np.isin(statement, self.wording.digit_ids), 0.0, STATEMENT_WEIGHT).astype(np.float32)

    # -- books --------------------------------------------------------------------------------------------

    def _window(self, length: int, end_at_sentence: bool = False) -> Ints:
        """`length` consecutive tokens of a random book (a short book is repeated)."""
        book = self.books[int(self.rng.choice(len(self.books), p=self.book_shares))]
        if len(book) <= length + 64:
            book = np.tile(book, (length + 64) // len(book) + 1)
        start = int(self.rng.integers(0, len(book) - length - 63))
        if end_at_sentence:
            ends = np.flatnonzero(self.ends_sentence[book[start + length - 1 : start + length + 62]])
            start += int(ends[0]) if len(ends) else 0
        return book[start : start + length]

    def _place(self, book: Ints) -> int:
        """A uniform place in `book`, mostly moved to the next end of a sentence."""
        place = int(self.rng.integers(0, len(book) + 1))
        if self.rng.random() < 0.1:
            return place
        ends = np.flatnonzero(self.ends_sentence[book[place : place + 64]])
        return place + int(ends[0]) + 1 if len(ends) else place


def _encode_books(corpus: Corpus, tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """Token ids of each book, paragraphs encoded in parallel."""
    encoded = []
    for text in corpus.books.values():
        lines = text.splitlines(keepends=True)
        chunks = ["".join(lines[start : start + 200]) for start in range(0, len(lines), 200)]
        batch = tokenizer.backend_tokenizer.encode_batch_fast(chunks, add_special_tokens=False)
        encoded.append([token for encoding in batch for token in encoding.ids])
    return encoded
