"""The command line. Each verb is in a file of its name; heavy imports are inside the verbs, so that help is instant."""

from __future__ import annotations

import inspect
import io
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Annotated, Any, NoReturn

import typer

from springtide.cli import (
    advise,
    bench,
    calibrate,
    chat,
    convert,
    demo,
    distill,
    drafters,
    env,
    evaluate,
    generate,
    policies,
    see,
    sweep,
)
from springtide.cli.train import drafters as heads
from springtide.cli.train import pocket, vision
from springtide.errors import SpringtideError
from springtide.files import reason

Verb = Callable[..., None]
Verbs = dict[str, Verb]

VERBS: Verbs = {
    "generate": generate.generate,
    "chat": chat.chat,
    "demo": demo.demo,
    "calibrate": calibrate.calibrate,
    "advise": advise.advise,
    "see": see.see,
    "distill": distill.distill,
    "policies": policies.policies,
    "drafters": drafters.drafters,
    "env": env.env,
}

GROUPS: dict[str, tuple[str, Verbs]] = {
    "train": (
        "Train models and drafters.",
        {
            "pocket": pocket.pocket,
            "medusa": heads.medusa,
            "medusa2": heads.medusa2,
            "hidden-transfer": heads.hidden_transfer,
            "longspec": heads.longspec,
            "dependency-vit": vision.dependency_vit,
            "captioner": vision.captioner,
        },
    ),
    "eval": (
        "Measure quality.",
        {
            "needle": evaluate.needle,
            "ppl": evaluate.ppl,
            "recall": evaluate.recall,
            "drafts": evaluate.drafts,
            "captioner": evaluate.captioner,
            "dependency-vit": evaluate.dependency_vit,
        },
    ),
    "bench": (
        "Measure speed.",
        {"decode": bench.decode, "prefill": bench.prefill, "rows": bench.rows, "kernels": bench.kernels},
    ),
    "convert": ("Convert drafters from and to other projects' layouts.", {"medusa": convert.medusa}),
    "sweep": (
        "Find good settings for a drafter, before training it.",
        {"hidden-transfer": sweep.hidden_transfer},
    ),
}


def _typer(verbs: Verbs, purpose: str) -> typer.Typer:
    made = typer.Typer(no_args_is_help=True, help=purpose)
    for name, verb in verbs.items():
        made.command(name)(_command(verb))
    return made


def _command(verb: Verb) -> Verb:
    """The verb as typer takes it: with the options of its groups, dataclasses such as ``inputs.Model``, one by one."""

    def command(**given: Any) -> None:
        _call(verb, given)

    options = list(_options(verb))
    command.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    command.__annotations__ = {option.name: option.annotation for option in options}
    command.__doc__ = verb.__doc__
    return command


def _options(taker: Callable[..., Any], defaults: object = None) -> Iterator[inspect.Parameter]:
    """The options of a verb or a group and of the groups in it; ``defaults`` is a group that has their defaults."""
    for taken in _takes(taker):
        default = taken.default if defaults is None else getattr(defaults, taken.name)
        if _is_group(taken):
            yield from _options(taken.annotation, None if default is taken.empty else default)
        else:
            yield taken.replace(kind=inspect.Parameter.KEYWORD_ONLY, default=default)


def _call(taker: Callable[..., Any], given: dict[str, Any]) -> Any:
    """Call a verb, or make a group, with its own of the options that are ``given``."""
    return taker(
        **{
            taken.name: _call(taken.annotation, given) if _is_group(taken) else given[taken.name]
            for taken in _takes(taker)
        }
    )


def _takes(taker: Callable[..., Any]) -> Iterable[inspect.Parameter]:
    return inspect.signature(taker, eval_str=True).parameters.values()


def _is_group(taken: inspect.Parameter) -> bool:
    return is_dataclass(taken.annotation)


app = _typer(VERBS, "Fast long-context decoding of Hugging Face models.")
for group, (purpose, verbs) in GROUPS.items():
    app.add_typer(_typer(verbs, purpose), name=group)


def _version(wanted: bool) -> None:
    if wanted:
        from springtide import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """What may be said before a verb."""


def main() -> None:
    """Run the command line; a mistake of the user's is one sentence on standard error and exit code 2.

    A pipe whose reader has left ends it quietly with code 1.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # for a terminal that cannot show every character
    warnings.showwarning = lambda message, *_: print(f"springtide: {message}", file=sys.stderr)
    try:
        if sys.stdout is None:
            raise SpringtideError("Standard output is closed; send it to a file, or to /dev/null.")
        with _written_out():
            code = app(standalone_mode=False)  # in which mode it raises what it would print in a box
        sys.exit(code or 0)
    except typer.TyperException as error:
        _refuse(" ".join(error.format_message().split()))
    except SpringtideError as error:
        _refuse(str(error))


def _refuse(message: str) -> NoReturn:
    """End the command with what is wrong; an empty message is of a verb without arguments, which printed its help."""
    if message:
        print(f"springtide: {message}" + ("" if message.endswith((".", "?")) else "."), file=sys.stderr)
    sys.exit(2)


@contextmanager
def _written_out() -> Iterator[None]:
    """What the block prints is written when it ends; raises SpringtideError where standard output takes no more."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except OSError as error:
        try:
            print(flush=True)  # was it standard output that failed?
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # lest the interpreter try once more
            if isinstance(error, BrokenPipeError):
                sys.exit(1)
            raise SpringtideError(
                f"Standard output cannot be written ({reason(error)}); send it elsewhere, or make room."
            ) from None
        raise
