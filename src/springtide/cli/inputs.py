"""What the verbs take: options that several share, and the reading of them.

What goes together is a group, a dataclass: a verb takes it as one parameter, and its fields are options of the verb.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from springtide.errors import SpringtideError
from springtide.files import EXCERPT

if TYPE_CHECKING:
    from springtide.attention.policy import Policy
    from springtide.engine.engine import Engine
    from springtide.options import Share
    from springtide.rows import sampling

LAST_SEED = 2**63 - 1

Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a model on the hub.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ... (default: a GPU if there is one).")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16, float16 (default: the checkpoint's).")]
PolicyName = Annotated[
    str, typer.Option("--policy", help="dense, tidal, quest, streaming, oracle; NAME:OPTION=VALUE,...")
]
PolicyNames = Annotated[
    str, typer.Option("--policy", help="Comma list of policies, each as NAME or NAME:OPTION=VALUE,...")
]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the result to this file, as JSON.")]
Text = Annotated[Path | None, typer.Option("--text", help="UTF-8 text file (default: the bundled held-out excerpt).")]
MaxTokens = Annotated[int, typer.Option(help="Most tokens to generate.")]
Temperature = Annotated[float, typer.Option(help="0 takes the most probable token.")]
Stats = Annotated[
    bool,
    typer.Option("--stats", help="Print timing and traffic to standard error; on a terminal drafted text is green."),
]
Chat = Annotated[
    bool | None,
    typer.Option(help="Ask in the model's chat template (default: if it has one, but for pocket models)."),
]
Images = Annotated[str, typer.Option("--data", help="scenes, digits, or a folder with one of images for each class.")]
Draft = Annotated[
    str | None,
    typer.Option(
        help="Drafter: lookup, self, medusa, medusa2, hidden-transfer (which pocket has), longspec; "
        "NAME:OPTION=VALUE,...; or a drafter's folder. "
        "Of several, joined by commas, the fastest is used; auto: of those that `springtide advise` found, "
        "else of all that the model has."
    ),
]


@dataclass(frozen=True)
class Model:
    """A model, and where it runs."""

    name: Annotated[
        str,
        typer.Option(
            "--model", help="Model folder, .gguf file, name on the Hugging Face hub, or 'pocket' for the bundled model."
        ),
    ] = "pocket"
    revision: Revision = None
    device: Device = None
    dtype: Dtype = None

    def load(self, **options: Any) -> Engine:
        """Its engine, with other options of :func:`springtide.loading.load`."""
        from transformers.utils import logging

        from springtide.loading import load

        logging.set_verbosity_error()
        return load(self.name, device=self.device, dtype=self.dtype, revision=self.revision, **options)


@dataclass(frozen=True)
class OnePolicy:
    """A policy, and its budget."""

    policy: PolicyName = "dense"
    budget: Annotated[
        str | None, typer.Option(help="Tokens that a sparse layer reads per KV head, or a share of the context as 5%.")
    ] = None

    def read(self) -> Policy:
        from springtide.attention import parse_budget, parse_policy

        size = None if self.budget is None else parse_budget(self.budget)
        policy = parse_policy(self.policy, size)
        _check_budgets([policy], size)
        return policy


@dataclass(frozen=True)
class Policies:
    """Policies to compare, and their budgets."""

    policy: PolicyNames = "dense,tidal"
    budget: Annotated[str | None, typer.Option(help="Comma list of budgets: tokens per KV head, or shares as 5%.")] = (
        None
    )

    def read(self) -> list[Policy]:
        """Every policy with every budget; those without a budget once."""
        from springtide.attention import parse_budget, parse_policy
        from springtide.registry import split

        sizes = [None] if self.budget is None else [parse_budget(size) for size in self.budget.split(",")]
        found = [parse_policy(name, size) for name in split(self.policy) for size in sizes]
        if not found:
            raise SpringtideError("--policy names no policy; give at least one, such as dense.")
        _check_budgets(found, *sizes)
        return found


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and when to stop."""

    max_tokens: MaxTokens = 256
    temperature: Temperature = 0.0
    top_p: Annotated[float, typer.Option(help="Sample among the tokens that hold this probability.")] = 1.0
    top_k: Annotated[int, typer.Option(help="Sample among this many tokens (0: all).")] = 0
    min_p: Annotated[float, typer.Option(help="Drop tokens below this share of the most probable one.")] = 0.0
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 discourages tokens seen before.")] = 1.0
    seed: Annotated[int, typer.Option(help="Seed of the sampling noise.")] = 0
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the output; may be repeated.")] = None
    accept: Annotated[
        Literal["exact", "typical"],
        typer.Option(help="exact: the text is as without a drafter; typical: keeps more drafted tokens, but is lossy."),
    ] = "exact"

    def read(self, logprobs: int | None = None) -> sampling.Sampling:
        from springtide.rows import sampling

        return sampling.Sampling(**asdict(self), logprobs=logprobs)


@dataclass(frozen=True)
class Results:
    """Files for what is measured."""

    json_file: Json = None
    plot: Annotated[Path | None, typer.Option(help="Also draw the result to this file, as PNG.")] = None

    def check(self) -> None:
        """Raise SpringtideError, before any work is done, for a file that could not be written after it."""
        from springtide.evaluation.report import check_target

        check_target(self.json_file, self.plot)

    def write(self, rows: Any) -> None:
        """Write the JSON file, if there is to be one."""
        from springtide.evaluation.report import write_json

        if self.json_file:
            write_json(self.json_file, rows)


def chats(engine: Engine, wanted: bool | None) -> bool:
    """Whether questions are asked in the model's chat template: as wanted, else if it has one, not for them alone."""
    from springtide.training.data import CHAT_TEMPLATE

    return engine.tokenizer.chat_template not in (None, CHAT_TEMPLATE) if wanted is None else wanted


def quiet_transformers() -> None:
    """No messages and no progress bars of transformers, which come between ours."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _check_budgets(policies: Sequence[Policy], *budgets: int | Share | None) -> None:
    """Raise SpringtideError for a --budget that no policy takes."""
    for budget in budgets:
        budgets_set = [policy.budget for policy in policies if policy.budget is not None]
        if budget is None or budget in budgets_set:
            continue
        if budgets_set:
            raise SpringtideError(
                f"--budget {budget} has no effect: --policy sets budget={budgets_set[0]}; give one only."
            )
        raise SpringtideError(
            f"--budget {budget} has no effect: --policy names no policy that has a budget; name one, such as tidal."
        )


def resolved(engine: Engine, policies: Sequence[Policy]) -> list[Policy]:
    """The policies fitted to the model, each once; it is calibrated briefly if one of them needs that."""
    from springtide.loading import know_layers

    know_layers(engine, policies)
    return list(dict.fromkeys(engine.resolve(policy) for policy in policies))


def read_numbers(text: str, option: str) -> list[int]:
    try:
        numbers = list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise SpringtideError(f"{option} is '{text}', but it must be whole numbers joined by commas.") from None
    if min(numbers) < 1:
        raise SpringtideError(f"{option} must be at least 1, not {min(numbers)}.")
    return numbers


def read_decimals(text: str, option: str) -> list[float]:
    try:
        return list(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        raise SpringtideError(f"{option} is '{text}', but it must be numbers joined by commas.") from None


def read_temperatures(text: str) -> list[float]:
    found = read_decimals(text, "--temperature")
    if not all(0 <= temperature < math.inf for temperature in found):
        raise SpringtideError("--temperature must be 0 (greedy) or more, and finite.")
    return found


def read_prompt(prompt: str | None, file: Path | None) -> str:
    if prompt is not None and file is not None:
        raise SpringtideError("Give the prompt either as an argument or with --prompt-file, not both.")
    if file is not None:
        text = read_file(file)
    elif prompt not in (None, "-"):
        text = str(prompt)
    elif sys.stdin is None:
        raise SpringtideError("Standard input is closed; give the prompt as an argument, or with --prompt-file.")
    elif prompt is None and sys.stdin.isatty():
        raise SpringtideError("There is no prompt; give it as an argument, with --prompt-file, or on standard input.")
    else:
        text = _decoded(sys.stdin.buffer.read(), "Standard input")
    if not text:
        raise SpringtideError("The prompt is empty; give at least one character.")
    return text


def read_file(file: Path) -> str:
    try:
        return _decoded(file.read_bytes(), f"'{file}'")
    except OSError as error:
        raise SpringtideError(f"'{file}' cannot be read ({error.strerror}); check the path.") from None


def _decoded(text: bytes, source: str) -> str:
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise SpringtideError(f"{source} is not UTF-8 text; convert it first.") from None


def read_text(file: Path | None) -> str:
    text = excerpt() if file is None else read_file(file)
    if not text.strip():
        raise SpringtideError(f"'{file}' is empty; give a text.")
    return text


def read_texts(path: Path | None) -> list[str]:
    """A text, or those of a folder."""
    if path is None or not path.is_dir():
        return [read_text(path)]
    files = sorted(path.glob("*.txt"))
    if not files:
        raise SpringtideError(f"'{path}' holds no .txt file; give a folder with texts, or a text.")
    return [read_text(file) for file in files]


def excerpt() -> str:
    return EXCERPT.read_text(encoding="utf-8")
