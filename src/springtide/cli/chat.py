"""``springtide chat``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from springtide.cli.inputs import Draft, Model, OnePolicy, Sampling, Stats, read_file
from springtide.cli.show import print_pieces, stats_line
from springtide.errors import SpringtideError


def chat(
    *,
    model: Model,
    system: Annotated[str | None, typer.Option(help="System message, or '@FILE' to read it from a file.")] = None,
    policy: OnePolicy,
    sampling: Sampling,
    draft: Draft = None,
    stats: Stats = False,
) -> None:
    """Talk with the model; the cache is kept between turns. /reset starts anew, /exit or Ctrl-D ends."""
    if sys.stdin is None:
        raise SpringtideError(
            "Standard input is closed, from which chat reads what you say; open it, or use springtide generate."
        )
    sampled, chosen = sampling.read(), policy.read()
    if system and system.startswith("@"):
        system = read_file(Path(system[1:]))
    opening = [{"role": "system", "content": system}] if system else []
    engine = model.load(policy=chosen, draft=draft)
    engine.render([*opening, {"role": "user", "content": "Hello"}])  # does the model chat at all?
    messages, session = list(opening), engine.session()
    while (line := _ask_user()) not in (None, "/exit"):
        if line == "/reset":
            messages, session = list(opening), engine.session()
        if not line or line == "/reset":
            continue
        try:
            tokens = engine.render([*messages, {"role": "user", "content": line}])
            request = session.add(tokens, sampling=sampled)
        except SpringtideError as error:
            if not sys.stdin.isatty():
                raise
            print(f"springtide: {error}", file=sys.stderr)
            continue
        try:
            print_pieces(session, request, coloured=stats)
        except KeyboardInterrupt:
            if request in session.unfinished:
                session.cancel(request)
            print(" [stopped]", end="")
        print(flush=True)
        if stats:
            print(stats_line(request.stats(), draft is not None), file=sys.stderr)
        messages += [{"role": "user", "content": line}, {"role": "assistant", "content": request.text}]


def _ask_user() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        return None
    except UnicodeDecodeError:
        raise SpringtideError("Standard input is not UTF-8 text; convert it first.") from None
