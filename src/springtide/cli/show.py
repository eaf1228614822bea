"""What the verbs show: text as it comes, what it took, and progress."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import typer

if TYPE_CHECKING:
    from springtide.engine.request import Request
    from springtide.engine.session import Session
    from springtide.registry import Registry

T = TypeVar("T")

DELAY = 2  # seconds before a progress bar is shown


def print_pieces(session: Session, request: Request, coloured: bool = False) -> None:
    """Run the one request of a session and print its text as it comes, with a progress bar while its prompt is read.

    ``coloured``: on a terminal, drafted text is green.
    """
    coloured = coloured and sys.stdout.isatty()
    painter = _Painter(request) if coloured else None
    with _bar(request.prefill_end, "reading", unit="tok", leave=False) as bar:
        for event in session.run():
            if event.token_ids:
                bar.close()
            else:
                bar.update(request.cache.length - bar.n)
            if painter:
                painter.paint()
            else:
                print(event.text, end="", flush=True)


def finish(session: Session, requests: Sequence[Request]) -> None:
    """Run a session to the end of its requests, with a progress bar of how many have ended."""
    with _bar(len(requests), "generating") as bar:
        for event in session.run():
            bar.update(event.finish_reason is not None)


class _Painter:
    """Prints a request's text token by token, what was drafted in green."""

    def __init__(self, request: Request) -> None:
        from rich.console import Console

        from springtide.engine.text import Detokenizer

        assert request.writer is not None
        self.console, self.request = Console(highlight=False), request
        self.text = Detokenizer(request.writer.tokenizer, request.sampling.stop)
        self.done = 0

    def paint(self) -> None:
        """Print what is new."""
        request = self.request
        new = zip(request.output[self.done :], request.from_draft[self.done :], strict=True)
        for token, drafted in new:
            self._print(self.text.add([token]), drafted)
            self.done += 1
        if request.finish_reason is not None:
            self._print(self.text.finish(), drafted=False)

    def _print(self, piece: str, drafted: bool) -> None:
        self.console.out(piece, style="green" if drafted else None, highlight=False, end="")
        self.console.file.flush()


def stats_line(stats: Any, drafted: bool) -> str:
    """What a request took; ``drafted``: it had a drafter, to be told of."""
    parts = [
        f"{stats.prompt_tokens} prompt tokens" + (f" ({stats.cached_tokens} cached)" if stats.cached_tokens else ""),
        f"{stats.completion_tokens} generated",
    ]
    if stats.ttft_ms is not None:
        parts.append(f"TTFT {stats.ttft_ms:.0f} ms")
    if stats.tpot_ms is not None:
        parts += [f"TPOT {stats.tpot_ms:.1f} ms", f"{stats.tokens_per_second:.1f} tokens/s"]
    if stats.kv_bytes_per_token is not None:
        parts.append(f"{stats.kv_bytes_per_token / 1e6:.3f} MB of KV cache read a token")
    if drafted and stats.acceptance_length is not None:
        parts += [
            f"{stats.passes} passes",
            f"{stats.drafted_tokens} tokens drafted",
            f"{stats.accepted_tokens} accepted",
            f"acceptance length {stats.acceptance_length:.2f}",
        ]
    gains = {"predicted": stats.predicted_gain, "measured": stats.measured_gain}
    known = [f"{name} {gain:.2f}" for name, gain in gains.items() if gain is not None]
    if known and not stats.drafted_tokens:
        known.append("so nothing was drafted")
    if known:
        parts.append(f"speed with drafts over without: {', '.join(known)}")
    if stats.fastest is not None:
        parts.append(f"fastest at the end: {stats.fastest}")
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


def print_options(registry: Registry[Any]) -> None:
    """Print what has a name, with its options."""
    from springtide.options import options, spelled

    names: dict[type[Any], list[str]] = {}
    for name, cls in registry.kinds.items():
        names.setdefault(cls, []).append(name)
    for cls, own in names.items():
        print(f"{', '.join(own)}: {(cls.__doc__ or '').splitlines()[0].replace('``', '')}")
        for option in options(cls):
            default = "" if option.default is None else f" (default: {spelled(option.default)})"
            print(f"    {option.name:10} {option.metadata['help']}{default}")
