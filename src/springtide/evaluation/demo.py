"""The demonstration: one book, facts hidden in it, and the same questions to dense attention and to TidalDecode."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape

from springtide import facts
from springtide.attention.tidal import Tidal
from springtide.engine.engine import Engine, Output
from springtide.evaluation.needle import DEPTHS, Haystack
from springtide.evaluation.report import print_table
from springtide.rows.sampling import Sampling

LENGTH = 8500  # tokens of the book with its facts
BUDGET = 256


def demo(engine: Engine, book: str) -> dict[str, Any]:
    """Read, ask, print, and return what was printed: ``{tokens, answers, summary}``."""
    console = Console()
    trial = Haystack(engine.tokenizer, book).trial(LENGTH, number=0)
    engines = {"dense": engine.using("dense"), "tidal": engine.using(Tidal(budget=BUDGET))}
    console.print(
        f"Reading {len(trial.context):,} tokens of a book that the model has never seen, with 5 facts hidden in it ..."
    )
    reader = engine.read(trial.context)
    assert reader.first_token is not None
    seconds = reader.first_token - reader.started
    console.print(f"... read in {seconds:.1f} s, {len(trial.context) / seconds:,.0f} tokens/s.\n")
    answers: list[dict[str, Any]] = []
    outputs: dict[str, list[Output]] = {name: [] for name in engines}
    for question in trial.questions:
        asked = facts.question(question.word)
        tokens = trial.context + engine.tokenizer.encode(asked, add_special_tokens=False)
        row: dict[str, Any] = {"question": asked.strip().removesuffix(" Answer:"), "depth": question.depth}
        for name, under in engines.items():
            sequence = under.start(tokens, Sampling(max_tokens=32), prefill=len(trial.context), reuse=reader.fork())
            for _ in under.run([sequence]):
                pass
            outputs[name].append(under.output(sequence))
            row[name] = sequence.text.strip()
            row[f"{name}_right"] = question.digits in sequence.text
        answers.append(row)
        console.print(
            f"[bold]{row['question']}[/bold]  (hidden at {question.depth:.0%} of the book: {question.digits})"
        )
        for name in engines:
            mark = "[green]right[/green]" if row[f"{name}_right"] else "[red]wrong[/red]"
            console.print(f"  {name:6} {escape(row[name])}  {mark}", highlight=False)
    summary = [_summary(name, answers, outputs[name]) for name in engines]
    console.print()
    print_table(summary)
    return {"tokens": len(trial.context), "answers": answers, "summary": summary}


def _summary(name: str, answers: list[dict[str, Any]], outputs: list[Output]) -> dict[str, Any]:
    """Exact match and mean speed and cache traffic over the questions."""
    stats = [output.stats for output in outputs]
    tpot = sum(s.tpot_ms or 0.0 for s in stats) / len(stats)
    read = sum(s.kv_bytes_per_token or 0.0 for s in stats) / len(stats)
    return {
        "policy": name if name == "dense" else f"{name}, budget {BUDGET}",
        "exact_match": f"{sum(row[f'{name}_right'] for row in answers)}/{len(DEPTHS)}",
        "tokens_per_second": round(1e3 / tpot, 1),
        "kv_megabytes_read_a_token": round(read / 1e6, 3),
    }
