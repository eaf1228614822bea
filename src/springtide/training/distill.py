"""Self-distillation: the model writes the text that its drafter learns from (Cai et al., arXiv 2401.10774, 2.3.2)."""

from __future__ import annotations

import json
import os
import random
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path

from tqdm import tqdm

from springtide import facts
from springtide.engine.engine import Engine
from springtide.engine.request import Request
from springtide.errors import SpringtideError
from springtide.rows.sampling import Sampling
from springtide.training.running import cannot_write
from springtide.training.windows import Document

MOST_FACTS = 4  # in a prompt
LEAST_CHARACTERS, MOST_CHARACTERS = 4, 12  # of a token, on average
LINE = '{"tokens": ['  # how every line begins
# What a drafter is trained on by default.
SELF, SELF_LENGTH, SELF_FACTS = Sampling(temperature=0.7), 128, 0.3


@dataclass(frozen=True)
class Prompts:
    """Prompts cut from documents at random places; seed and number of a prompt decide all of it.

    Attributes:
        length: most tokens of an excerpt; the least are a quarter of it, if the document holds them.
        facts: share of the excerpts that have facts hidden in them and are followed by a question about one.

    Raises SpringtideError for a share that is none, and for prompts beyond the model's context.
    """

    engine: Engine
    documents: Sequence[Document]
    length: int
    facts: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.facts <= 1:
            raise SpringtideError(f"--facts is a share between 0 and 1, not {self.facts:g}.")
        limit = self.engine.stack.spec.context_limit
        if self.length >= limit:
            raise SpringtideError(f"The model's context holds {limit} tokens; use a --length below that.")

    def __getitem__(self, number: int) -> list[int]:
        """Token ids: of an excerpt, or of a conversation, in the chat template, up to the user's last words."""
        rng = random.Random(f"{self.seed} {number}")
        (document,) = rng.choices(self.documents, cum_weights=self._ends)
        if isinstance(document.content, list):
            spoken = [i for i, part in enumerate(document.content, start=1) if part["role"] == "user"]
            if not spoken:
                raise SpringtideError(f"{document.name} has no message whose role is user; mend or delete the line.")
            return self.engine.render(document.content[: spoken[-1]])
        excerpt = self._excerpt(document.content, rng.randint(-(-self.length // 4), self.length), rng)
        if rng.random() >= self.facts:
            return excerpt
        text: str = self.engine.tokenizer.decode(excerpt, skip_special_tokens=True)
        return self.engine.encode(with_facts(text, rng))

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(document.size for document in self.documents))

    def _excerpt(self, content: str | tuple[int, ...], count: int, rng: random.Random) -> list[int]:
        """About ``count`` tokens of a random place, in a text from the beginning of a word on."""
        if isinstance(content, tuple):
            start = rng.randrange(max(1, len(content) - count + 1))
            return list(content[start : start + count])
        text = content.strip()
        start = rng.randrange(max(1, len(text) - LEAST_CHARACTERS * count))
        passage = text[start : start + MOST_CHARACTERS * count]
        return self.engine.encode(re.sub(r"^\S*\s+(?=\S)", "", passage) if start else passage)[:count]


def with_facts(text: str, rng: random.Random) -> str:
    """The text with up to four facts behind sentences of it, and a question about one of them."""
    ends = [match.end() for match in re.finditer(r"[.!?](?=\s|$)", text)] or [len(text)]
    words = rng.sample(facts.WORDS, rng.randint(1, MOST_FACTS))
    for place, word in sorted(((rng.choice(ends), word) for word in words), reverse=True):
        digits = "".join(rng.choices("0123456789", k=5))
        text = text[:place] + facts.fact(word, digits) + text[place:]
    return text + facts.question(words[0])


@dataclass(frozen=True)
class Written:
    """What a file holds: ``tokens`` in all, of which the model wrote ``own``."""

    texts: int
    tokens: int
    own: int


def distill(prompts: Prompts, out: Path, count: int, sampling: Sampling, batch: int) -> Written:
    """Have the model continue ``count`` prompts, ``batch`` at a time, and write each to a line of ``out``.

    A line is ``{"tokens": [...], "prompt": n}``, its first n tokens being the prompt. Lines come in the prompts' order,
    as soon as they are finished; those that are in the file already are kept, and what is missing is added. Returns
    what the file then holds.

    Raises SpringtideError for a file whose lines are of other prompts, and when it cannot be written.
    """
    engine = prompts.engine
    session = engine.session(max_requests=batch)
    written = started = _lines_of(out, prompts)
    lines: dict[int, str] = {}  # finished, but not written yet
    running: dict[Request, int] = {}
    gained, began = 0, time.perf_counter()
    try:
        with out.open("a", encoding="utf-8") as file, _bar(count, written) as bar:
            while written < count:
                while len(running) < batch and started < count:
                    own = replace(sampling, seed=hash((sampling.seed, started)))
                    running[session.add(prompts[started], sampling=own)] = started
                    started += 1
                for event in session.step():
                    text = event.request
                    gained += len(event.token_ids)
                    if event.finish_reason is not None:
                        lines[running.pop(text)] = json.dumps({"tokens": text.tokens, "prompt": text.output_start})
                while written in lines:
                    file.write(lines.pop(written) + "\n")
                    file.flush()
                    written += 1
                    bar.update()
                bar.set_postfix_str(f"{gained / (time.perf_counter() - began):.0f} tokens/s", refresh=False)
    except OSError as error:
        raise cannot_write(out, error) from error
    texts = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    tokens = sum(len(text["tokens"]) for text in texts)
    return Written(len(texts), tokens, own=tokens - sum(text["prompt"] for text in texts))


def _bar(total: int, done: int) -> tqdm[None]:
    return tqdm(total=total, initial=done, desc="distilling", unit="prompt", disable=None)


def _lines_of(out: Path, prompts: Prompts) -> int:
    """How many prompts are done in ``out``; a last line that was cut short is taken away."""
    if not out.exists():
        return 0
    try:
        content = out.read_text(encoding="utf-8")
        *lines, rest = content.split("\n")
        known = LINE.startswith(rest) or rest.startswith(LINE)
        for number in {0, len(lines) - 1} if lines else ():
            known &= json.loads(lines[number])["tokens"][: len(prompts[number])] == prompts[number]
    except (OSError, ValueError, LookupError, TypeError):
        known = False
    if not known:
        raise SpringtideError(
            f"'{out}' holds something else than what this model writes for these prompts; choose another --out."
        )
    if rest:
        os.truncate(out, len(content.encode()) - len(rest.encode()))
    return len(lines)
