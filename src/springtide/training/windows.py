"""Training data of drafters: documents from files, and windows of their tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from jinja2 import TemplateError
from torch import Tensor
from tqdm import tqdm

from springtide.engine.engine import Engine
from springtide.errors import SpringtideError

Messages = list[dict[str, str]]
Content = str | tuple[int, ...] | Messages

HELD_OUT = 0.05  # share of the windows that are kept for calibration
MOST_HELD_OUT = 64
LEAST_LENGTH = 16
CHUNK_LINES = 200  # of a text, encoded at a time


@dataclass(frozen=True)
class Document:
    """A text, token ids or a conversation; ``name`` says where it is from."""

    name: str
    content: Content

    @property
    def size(self) -> int:
        """Characters or tokens; 0 for white space."""
        if isinstance(self.content, str):
            return len(self.content.strip())
        return sum(len(part["content"]) if isinstance(part, dict) else 1 for part in self.content)


def read_documents(data: Path, hold_out: Sequence[str] = ()) -> tuple[list[Document], list[Document]]:
    """The documents of ``data``, and those of its files that ``hold_out`` names.

    ``data`` is a text file, a folder of .txt files, or a .jsonl file of which every line is a document:
    ``{"tokens": [...]}``, ``{"text": "..."}`` or ``{"messages": [{"role": "...", "content": "..."}, ...]}``.

    Raises SpringtideError for what cannot be read or holds no text, and for a broken line, which it names.
    """
    if data.is_dir():
        texts = {path.name: Document(f"'{path}'", _read(path)) for path in sorted(data.glob("*.txt"))}
    elif hold_out:
        raise SpringtideError(f"--hold-out names files of a folder, but '{data}' is none; leave it out.")
    elif data.suffix == ".jsonl":
        texts = {document.name: document for document in _lines(data)}
    else:
        texts = {data.name: Document(f"'{data}'", _read(data))}
    for name in hold_out:
        if name not in texts:
            raise SpringtideError(f"--hold-out names '{name}', but there is no such .txt file in '{data}'.")
    documents = [document for name, document in texts.items() if document.size and name not in hold_out]
    if not documents:
        raise SpringtideError(f"'{data}' holds no text; give a text file, a folder of .txt files, or a .jsonl file.")
    return documents, [texts[name] for name in hold_out]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise SpringtideError(f"'{path}' is not UTF-8 text; convert it, or move it away.") from None
    except OSError as error:
        raise SpringtideError(f"'{path}' cannot be read ({error.strerror}); check the path.") from None


def _lines(path: Path) -> list[Document]:
    documents = []
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if line.strip():
            name = f"'{path}', line {number},"
            documents.append(Document(name, _content(line, name)))
    return documents


def _content(line: str, name: str) -> Content:
    """What a line of JSON holds; raises SpringtideError, which names it, unless it is a document."""
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise SpringtideError(f"{name} is no JSON ({str(error).split(':')[0]}); mend or delete the line.") from None
    match fields:
        case {"tokens": [*tokens]} if all(type(token) is int and token >= 0 for token in tokens):
            return tuple(tokens)
        case {"text": str(text)}:
            return text
        case {"messages": [*messages]} if all(_is_message(part) for part in messages):
            return messages
    raise SpringtideError(
        f'{name} is no document: it must hold "tokens" (a list of token ids), "text" (a string) or "messages" '
        '(a list of {"role": ..., "content": ...}).'
    )


def _is_message(part: Any) -> bool:
    return isinstance(part, dict) and isinstance(part.get("role"), str) and isinstance(part.get("content"), str)


# -- windows --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Windows:
    """``tokens [N, T]``, int64, on the CPU."""

    unit: ClassVar = "tokens"
    tokens: Tensor

    @classmethod
    def cut(cls, tokens: Tensor, length: int, data: Path, least: int) -> Self:
        """Of ``tokens [n]``, which come from ``data``; raises SpringtideError for fewer than ``least`` windows."""
        count = len(tokens) // length
        if count < least:
            raise SpringtideError(
                f"'{data}' gives {len(tokens)} tokens, but {least} windows of {length} are needed at least; "
                "give more text, or use a shorter --length."
            )
        return cls(tokens[: count * length].view(count, length))

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def digest(self) -> str:
        """Tells data apart."""
        return hashlib.sha256(f"{self.tokens.shape}".encode() + self.tokens.numpy().tobytes()).hexdigest()[:16]

    def count(self, tokens: Tensor) -> int:
        """Tokens in windows of them."""
        return tokens.numel()

    def batch(self, step: int, size: int, seed: int) -> tuple[Tensor]:
        """The windows of a step, ``[size, T]``: each once, in an order that the seed decides; then in another order."""
        places = [divmod(place, len(self)) for place in range(step * size, (step + 1) * size)]
        orders = {epoch: self._order(epoch, seed) for epoch, _ in places}
        return (self.tokens[[int(orders[epoch][place]) for epoch, place in places]],)

    def split(self, held: int, seed: int) -> tuple[Self, Self]:
        """The others, and ``held`` random windows."""
        order = self._order(-1, seed)
        return type(self)(self.tokens[order[held:]]), type(self)(self.tokens[order[:held]])

    def _order(self, epoch: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(hash((seed, epoch)) & (2**63 - 1))
        return torch.randperm(len(self), generator=generator)


def training_windows(
    data: Path, engine: Engine, length: int, hold_out: Sequence[str] = (), seed: int = 0
) -> tuple[Windows, Windows]:
    """Windows of ``length`` tokens of ``data`` to train on, and up to 64 held out.

    The latter are of the files ``hold_out``, else some of the data's own, at random. Documents follow one another in a
    window. Raises SpringtideError for data that cannot be read or is too short.
    """
    if length < LEAST_LENGTH:
        raise SpringtideError(f"Windows of {length} tokens are too short to learn from; use {LEAST_LENGTH} or more.")
    documents, held = read_documents(data, hold_out)
    windows = Windows.cut(_encoded(documents, engine), length, data, least=1 if held else 2)
    if not held:
        return windows.split(min(MOST_HELD_OUT, max(1, round(HELD_OUT * len(windows)))), seed)
    others = Windows.cut(_encoded(held, engine), length, data, least=1)
    return windows, others.split(min(MOST_HELD_OUT, len(others)), seed)[1]


def _encoded(documents: Sequence[Document], engine: Engine) -> Tensor:
    """The tokens ``[n]`` of documents, one after the other, int64."""
    parts, vocab_size = [], engine.stack.spec.vocab_size
    with tqdm(total=sum(d.size for d in documents), unit_scale=True, desc="encoding", disable=None, delay=2) as bar:
        for document in documents:
            ids = _ids(document, engine.tokenizer)
            if max(ids, default=0) >= vocab_size:
                raise SpringtideError(
                    f"{document.name} holds token {max(ids)}, but the model knows {vocab_size} tokens; "
                    "give data that was made with this model."
                )
            parts.append(torch.tensor(ids, dtype=torch.int64))
            bar.update(document.size)
    return torch.cat(parts)


def _ids(document: Document, tokenizer: Any) -> list[int]:
    """A text as a prompt is encoded, token ids as they are, a conversation in the chat template."""
    match document.content:
        case str(text):
            lines = text.splitlines(keepends=True)
            chunks = ["".join(lines[start : start + CHUNK_LINES]) for start in range(0, len(lines), CHUNK_LINES)]
            ids: list[int] = tokenizer.encode("")
            return ids + [token for part in tokenizer(chunks, add_special_tokens=False).input_ids for token in part]
        case tuple(tokens):
            return list(tokens)
        case messages:
            try:
                rendered: list[int] = tokenizer.apply_chat_template(messages, return_dict=False)
            except (TemplateError, ValueError) as error:
                reason = str(error).rstrip(".")
                raise SpringtideError(f"{document.name} does not fit the chat template: {reason}.") from None
            return rendered
