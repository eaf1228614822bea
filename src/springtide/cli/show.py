"""What the verbs show: text as it comes, what it took, and progress."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import typer

if TYPE_CHECKING:
    from springtide.engine.engine import Engine

T = TypeVar("T")

DELAY = 2  # seconds before a progress bar is shown


def print_pieces(engine: Engine, sequence: Any, coloured: bool = False) -> None:
    """Run a sequence and print its text as it comes, with a progress bar while the prompt is read.

    ``coloured``: on a terminal, drafted text is green.
    """
    coloured = coloured and sys.stdout.isatty()
    painter = _Painter(engine, sequence) if coloured else None
    known = sequence.cache.length
    with _bar(sequence.prefill_end, "reading", unit="tok", leave=False, initial=known) as bar:
        for piece in (event.text for event in engine.run([sequence])):
            bar.update(min(sequence.cache.length, sequence.prefill_end) - bar.n)
            if not sequence.prefilling:
                bar.close()
            if painter:
                painter.paint()
            else:
                print(piece, end="", flush=True)


class _Painter:
    """Prints a sequence's text token by token, what was drafted in green."""

    def __init__(self, engine: Engine, sequence: Any) -> None:
        from rich.console import Console

        from springtide.engine.text import Detokenizer

        self.console, self.sequence = Console(highlight=False), sequence
        self.text = Detokenizer(engine.tokenizer, sequence.sampling.stop)
        self.done = 0

    def paint(self) -> None:
        """Print what is new."""
        sequence = self.sequence
        new = zip(sequence.output[self.done :], sequence.from_draft[self.done :], strict=True)
        for token, drafted in new:
            self._print(self.text.add([token]), drafted)
            self.done += 1
        if sequence.finish_reason is not None:
            self._print(self.text.finish(), drafted=False)

    def _print(self, piece: str, drafted: bool) -> None:
        self.console.out(piece, style="green" if drafted else None, highlight=False, end="")
        self.console.file.flush()


def stats_line(stats: Any) -> str:
    parts = [
        f"{stats.prompt_tokens} prompt tokens",
        f"{stats.completion_tokens} generated",
        f"TTFT {stats.ttft_ms:.0f} ms",
    ]
    if stats.tpot_ms is not None:
        parts += [f"TPOT {stats.tpot_ms:.1f} ms", f"{stats.tokens_per_second:.1f} tokens/s"]
    if stats.kv_bytes_per_token is not None:
        parts.append(f"{stats.kv_bytes_per_token / 1e6:.3f} MB of KV cache read a token")
    if stats.acceptance_length is not None:
        parts += [
            f"{stats.passes} passes",
            f"{stats.drafted_tokens} tokens drafted",
            f"{stats.accepted_tokens} accepted",
            f"acceptance length {stats.acceptance_length:.2f}",
        ]
    return ", ".join(parts)


def progress(steps: Iterator[T], total: int, what: str) -> Iterator[T]:
    """Pass ``steps`` on; each None among them moves a progress bar on a terminal."""
    with _bar(total, what) as bar:
        for item in steps:
            if item is None:
                bar.update()
            yield item


def result_of(steps: Iterator[T | None], total: int, what: str) -> T:
    """The last of ``steps``, which is their result."""
    result: T | None = None
    for item in progress(steps, total, what):
        result = item
    assert result is not None
    return result


@dataclass(frozen=True)
class Measured(Generic[T]):
    """What an evaluation found. It is not ``complete`` if Ctrl-C ended it."""

    rows: list[T]
    complete: bool

    def as_json(self) -> list[dict[str, Any]]:
        """The rows as they are written to a file."""
        return [asdict(row) | {"complete": self.complete} for row in self.rows]  # type: ignore[call-overload]

    def end(self) -> None:
        """End the command, all being shown and written."""
        if not self.complete:
            raise typer.Exit(130)


def measured(steps: Iterator[Callable[[], list[T]]], total: int, what: str) -> Measured[T]:
    """The rows that the last of ``steps`` gives, which may be the last before Ctrl-C."""
    done: list[Callable[[], list[T]]] = []
    try:
        with _bar(total, what) as bar:
            for rows in steps:
                done.append(rows)
                bar.update()
    except KeyboardInterrupt:
        if not done:
            raise
        print(f"\nStopped; these are the results of {len(done)} of {total} {what}.", file=sys.stderr)
        return Measured(done[-1](), complete=False)
    return Measured(done[-1](), complete=True)


def _bar(total: int, what: str, **options: Any) -> Any:
    """A progress bar on standard error, if that is a terminal, of what takes longer than a moment."""
    from tqdm import tqdm

    return tqdm(total=total, desc=what, disable=None, delay=DELAY, **options)


@contextmanager
def resumable(path: Path) -> Iterator[None]:
    """Ctrl-C ends the command; what was done is in ``path``."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"\nStopped; the same command goes on from {path}.", file=sys.stderr)
        raise typer.Exit(130) from None
