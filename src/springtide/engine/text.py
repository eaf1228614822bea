"""From tokens to text, as they come."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

MOST = 16  # tokens that are decoded again
UNFINISHED = "\ufffd"  # what a decoder shows for a character whose bytes have not all come


@dataclass
class Detokenizer:
    """Turns a growing list of tokens into text; holds back half characters and what may become a stop string.

    ``text`` is all that is final; ``stopped`` tells that a stop string was met, which is not part of ``text``.
    """

    tokenizer: Any
    stop: tuple[str, ...] = ()
    text: str = ""
    stopped: bool = False
    _tokens: list[int] = field(default_factory=list)
    _context: int = 0  # where decoding begins: before what is new, so that spaces between words come out right
    _shown: str = ""  # the text from there on, as far as it is in _seen
    _done: int = 0  # tokens that it is of
    _seen: str = ""

    def __copy__(self) -> Detokenizer:
        return replace(self, _tokens=list(self._tokens))

    def add(self, tokens: list[int]) -> str:
        """Take new tokens; returns the text that has become final."""
        self._tokens += tokens
        text = self._decode()
        if len(text) > len(self._shown) and not text.endswith(UNFINISHED):
            self._show(text)
            if len(self._tokens) - self._context > MOST:
                self._context = self._done
                self._shown = self._decode()
            self._done = len(self._tokens)
        return self._release(len(self._seen) - self._held())

    def finish(self) -> str:
        """No more tokens will come: returns the text held back."""
        if self.stopped:
            return ""
        self._show(self._decode())
        return self._release(len(self._seen))

    def _show(self, text: str) -> None:
        self._seen += text[len(self._shown) :]
        self._shown = text

    def _release(self, end: int) -> str:
        found = [(self._seen.find(stop, len(self.text)), stop) for stop in self.stop]
        met = [(at + len(stop), at) for at, stop in found if at >= 0]
        if met:
            # The one that ends first is met first, however many tokens come at once.
            self.stopped, end = True, min(met)[1]
        piece = self._seen[len(self.text) : end]
        self.text += piece
        return piece

    def _held(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        lengths = (n for stop in self.stop for n in range(len(stop) - 1, 0, -1) if self._seen.endswith(stop[:n]))
        return max(lengths, default=0)

    def _decode(self) -> str:
        text: str = self.tokenizer.decode(self._tokens[self._context :], skip_special_tokens=True)
        return text
