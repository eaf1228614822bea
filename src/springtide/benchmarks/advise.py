"""Which policy and which drafter are fastest with a model on this machine: predicted from parts, and measured whole.

A pass with a draft commits tau tokens, and takes what drafting and what verifying its rows take; so does a plain pass,
with one token and one row. What is measured whole is what :mod:`springtide.evaluation.drafts` measures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from math import prod
from pathlib import Path
from shlex import quote
from typing import Any

from springtide.attention.policy import Policy
from springtide.attention.tidal import Tidal
from springtide.benchmarks.rows import median_ms
from springtide.drafting.drafter import Drafter
from springtide.engine.drafters import AUTO, DRAFTERS, beside
from springtide.engine.engine import Engine
from springtide.engine.self_draft import SelfDraft
from springtide.errors import SpringtideError
from springtide.evaluation import drafts as evaluation
from springtide.evaluation.drafts import Contender, Drafts, Passage
from springtide.evaluation.report import print_table
from springtide.loading import know_layers
from springtide.model.cost import lines
from springtide.options import Share, options, spelled
from springtide.registry import is_folder, split

PLAIN = Drafter.name  # what a combination without a drafter is called
TIDAL = Tidal(budget=Share(3))
LOOKUP = ("lookup", "lookup:tokens=6")
SELF = tuple(
    f"self:policy=({TIDAL.name}:budget={TIDAL.budget}),{rest}"
    for rest in ("tokens=4", "tokens=8", "tokens=8,draft=lookup")
)
ROWS = (1, 2, 4, 8, 16, 32)  # of the passes that are timed; others lie on lines between them
PASSES = 8  # timed of each kind

Costs = Mapping[tuple[Policy, int], Callable[[float], float]]  # milliseconds of a pass, by its rows


@dataclass(frozen=True)
class Combination:
    """What a policy and a drafter take after prompts of ``context`` tokens.

    ``policy`` and ``draft`` are as ``generate`` takes them; ``draft`` is ``"none"`` for plain decoding. ``lossless``:
    the output is the model's own, token for token. ``acceptance_length``: tokens of a pass, of ``rows_per_pass`` rows;
    ``outputs_equal``: the share of prompts whose tokens are those of the policy undrafted. ``draft_ms``: proposing the
    draft of a pass; ``verify_ms``: a pass of so many rows under the policy, forward and head; ``dense_ms``: a dense one
    of one row. ``predicted_speedup``: by these, over dense decoding. ``ms_per_token``: measured end to end, and so is
    ``speedup``, over dense decoding. Figures that no decoded token stands behind are None.
    """

    context: int
    policy: str
    draft: str
    lossless: bool
    prompts: int
    acceptance_length: float | None
    rows_per_pass: float | None
    outputs_equal: float
    draft_ms: float | None
    verify_ms: float | None
    dense_ms: float
    predicted_speedup: float | None
    ms_per_token: float | None
    speedup: float | None


def policies(engine: Engine, asked: Sequence[Policy] | None) -> dict[Policy, str]:
    """Dense and those that are ``asked`` for, resolved, with their names; by default tidal if it was calibrated for."""
    if asked is None:
        asked = [TIDAL] if engine.stack.spec.calibration else []
    know_layers(engine, asked)
    return {engine.resolve(policy): written(policy) for policy in (Policy(), *asked)}


def default_drafters(engine: Engine) -> list[str]:
    """Those that need no training and those beside the model; self-drafting where layers were chosen for tidal."""
    name = engine.stack.model.name_or_path
    own = [path.name if path.name in DRAFTERS.kinds else str(path) for path in beside(Path(name) if name else None)]
    return [*LOOKUP, *own, *(SELF if engine.stack.spec.calibration else ())]


def read_drafters(text: str) -> list[str]:
    """The names in a comma list, folders in full; raises SpringtideError where several are to be one."""
    names = list(dict.fromkeys(split(text, folders=True)))
    if not names:
        raise SpringtideError("--draft names no drafter; give at least one, such as lookup.")
    for name in names:
        if name == AUTO or name.startswith("("):
            raise SpringtideError(
                f"--draft names '{name}', but each drafter is measured by itself; name those that it stands for."
            )
    return [str(Path(name).expanduser().resolve()) if _is_path(name) else name for name in names]


def _is_path(name: str) -> bool:
    return name not in DRAFTERS.kinds and is_folder(name)


def written(policy: Policy) -> str:
    """A policy, not resolved, as ``--policy`` takes it."""
    given = [
        f"{each.name}={spelled(value)}"
        for each in options(type(policy))
        if (value := getattr(policy, each.name)) != each.default
    ]
    return policy.name + (f":{','.join(given)}" if given else "")


def check_contexts(engine: Engine, contexts: Sequence[int], max_tokens: int) -> None:
    """Raise SpringtideError unless the model's context holds each of them, and what is decoded and tried after it."""
    limit, more = engine.stack.spec.context_limit, max(max_tokens, ROWS[-1])
    if max(contexts) + more > limit:
        raise SpringtideError(
            f"A context of {max(contexts)} tokens and {more} more are beyond the model's context of {limit}; "
            "give a shorter --context."
        )


def contenders(
    engine: Engine, changed: Mapping[str, Engine], names: Sequence[str], policies: Sequence[Policy]
) -> list[Contender]:
    """Each policy (resolved) with no drafter, and with each but itself, see :func:`springtide.evaluation.drafts`."""
    drafted = evaluation.contenders(engine, changed, names, policies, adaptive=False)
    found = []
    for base in dict.fromkeys(each.base for each in drafted):
        found.append(Contender(PLAIN, base, base, base))
        found += [each for each in drafted if each.base is base and _sparser(each.engine.drafter, base.policy)]
    return found


def _sparser(drafter: Drafter, policy: Policy) -> bool:
    """Whether the drafter is not the policy itself, which would gain nothing."""
    return not isinstance(drafter, SelfDraft) or drafter.policy != policy


def steps_of(policies: int, contexts: int) -> int:
    """How often :func:`costs` yields before its result."""
    return contexts * (1 + policies * len(ROWS) * PASSES)


def costs(engine: Engine, policies: Sequence[Policy], contexts: Sequence[int]) -> Iterator[Costs | None]:
    """Time passes under each policy after each context, by turns.

    Yields None after everything done, for progress, and the result last.
    """
    found: dict[tuple[Policy, int], Callable[[float], float]] = {}
    for context in contexts:
        cells = [(policy, count) for policy in policies for count in ROWS]
        ms = yield from median_ms(engine, cells, context, PASSES, "prefill", pause=0)
        for policy in policies:
            found[policy, context] = lines(ROWS, [ms[policy, count] for count in ROWS])
    yield found


def advise(
    contenders: Sequence[Contender],
    names: Mapping[Policy, str],
    passages: Sequence[Passage],
    costs: Costs,
    temperature: float,
    max_tokens: int,
) -> Iterator[Callable[[], list[Combination]]]:
    """Decode after every prompt with each of the contenders; ``names`` are those of their policies, dense among them.

    Yields after every prompt what gives the combinations as measured so far.
    """
    for rows in evaluation.drafts(contenders, passages, [temperature], max_tokens):
        yield partial(_combinations, rows, contenders, names, costs)


def _combinations(
    rows: Callable[[], list[Drafts]], contenders: Sequence[Contender], names: Mapping[Policy, str], costs: Costs
) -> list[Combination]:
    """``rows`` are of all contenders in order, for each context again."""
    dense = next(policy for policy in names if policy.name == Policy.name)
    paired = list(zip(rows(), cycle(contenders), strict=False))
    undrafted = {
        row.length: row.ms_per_token for row, each in paired if each.engine is each.base and each.base.policy == dense
    }
    return [_combination(row, each, names, costs, dense, undrafted[row.length]) for row, each in paired]


def _combination(
    row: Drafts, contender: Contender, names: Mapping[Policy, str], costs: Costs, dense: Policy, undrafted: float | None
) -> Combination:
    policy = contender.base.policy
    tau, rows, draft_ms, ms = row.acceptance_length, row.rows_per_pass, row.draft_ms, row.ms_per_token
    verify_ms = None if rows is None else costs[policy, row.length](rows)
    dense_ms = costs[dense, row.length](1)
    predicted = None
    if tau is not None and draft_ms is not None and verify_ms is not None:
        predicted = tau * dense_ms / (draft_ms + verify_ms)
    return Combination(
        context=row.length,
        policy=names[policy],
        draft=row.draft,
        lossless=policy == dense and not row.changes_model,
        prompts=row.prompts,
        acceptance_length=tau,
        rows_per_pass=rows,
        outputs_equal=row.outputs_equal,
        draft_ms=draft_ms,
        verify_ms=verify_ms,
        dense_ms=dense_ms,
        predicted_speedup=predicted,
        ms_per_token=ms,
        speedup=undrafted / ms if undrafted and ms else None,
    )


@dataclass(frozen=True)
class Advice:
    """What is fastest after ``context`` tokens: of what is ``lossless``, and of all (``fastest``)."""

    context: int
    lossless: Combination
    fastest: Combination

    def as_json(self) -> dict[str, Any]:
        """What is kept of it."""
        return {"context": self.context, "lossless": _choice(self.lossless), "fastest": _choice(self.fastest)}


def _choice(each: Combination) -> dict[str, Any]:
    return {name: getattr(each, name) for name in ("policy", "draft", "ms_per_token", "speedup")}


def advice(found: Sequence[Combination]) -> list[Advice]:
    """For each context what took the least time a token. Raises SpringtideError where no token was decoded."""
    return [
        Advice(context, *(_fastest(found, context, lossless) for lossless in (True, False)))
        for context in sorted({each.context for each in found})
    ]


def _fastest(found: Sequence[Combination], context: int, lossless: bool) -> Combination:
    timed = [
        (each.ms_per_token, number)
        for number, each in enumerate(found)
        if each.ms_per_token is not None and each.context == context and (each.lossless or not lossless)
    ]
    if not timed:
        raise SpringtideError(
            f"After prompts of {context} tokens the model ends at once, so that there is nothing to time; give another "
            "--text."
        )
    return found[min(timed)[1]]


def drafters(advices: Sequence[Advice], found: Sequence[Combination], contenders: Sequence[Contender]) -> list[str]:
    """The lossless drafters that are advised, those of all contexts, of each kind one: the faster over all contexts."""
    kinds = {contender.draft: contender.engine.drafter.name for contender in contenders}
    chosen: dict[str, str] = {}
    for draft in dict.fromkeys(each.lossless.draft for each in advices if each.lossless.draft != PLAIN):
        rivals = [draft, *([chosen[kinds[draft]]] if kinds[draft] in chosen else [])]
        chosen[kinds[draft]] = min(rivals, key=lambda name: _total(found, name))
    return list(chosen.values())


def _total(found: Sequence[Combination], draft: str) -> float:
    """Milliseconds a token, multiplied over the contexts: less is faster over all of them."""
    return prod(each.ms_per_token or 1.0 for each in found if each.lossless and each.draft == draft)


def show(found: Sequence[Combination]) -> None:
    """Print a table."""
    several = len({each.context for each in found}) > 1
    print_table(
        [
            {
                **({"context": each.context} if several else {}),
                "policy": each.policy,
                "draft": Path(each.draft).name,
                "lossless": "yes" if each.lossless else "no",
                "acceptance\nlength": each.acceptance_length,
                "rows a\npass": each.rows_per_pass,
                "draft\nms": each.draft_ms,
                "verify\nms": each.verify_ms,
                "predicted\nspeed-up": each.predicted_speedup,
                "measured\nspeed-up": each.speedup,
                "ms a\ntoken": each.ms_per_token,
            }
            for each in found
        ]
    )


def said(advices: Sequence[Advice]) -> str:
    """The advice, a line for each context."""
    return "\n".join(_said(each) for each in advices)


def _said(each: Advice) -> str:
    line = f"After {each.context} tokens: {_options(each.lossless)} is the fastest of what is lossless"
    if each.fastest is each.lossless:
        return f"{line}, and of all."
    return f"{line}; {_options(each.fastest)}, which is not lossless, is the fastest of all."


def _options(each: Combination) -> str:
    """The options of ``generate`` as a shell takes them, and what they were measured to gain."""
    parts = [f"--policy {quote(each.policy)}"] if each.policy != Policy.name else []
    parts += [f"--draft {quote(each.draft)}"] if each.draft != PLAIN else []
    return f"{' '.join(parts) or 'plain decoding'} ({each.speedup:.2f}x)"
