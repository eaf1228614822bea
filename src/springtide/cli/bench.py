"""``springtide bench``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from springtide.cli.inputs import (
    Device,
    Dtype,
    Json,
    Model,
    Policies,
    Results,
    Revision,
    read_numbers,
    resolved,
)
from springtide.cli.show import result_of
from springtide.errors import SpringtideError

if TYPE_CHECKING:
    from springtide.attention.policy import Policy
    from springtide.benchmarks.peers import Peer
    from springtide.benchmarks.simulated import Simulated
    from springtide.engine.engine import Engine

Contexts = Annotated[str, typer.Option("--context", help="Comma list of context lengths, tokens.")]
Fill = Annotated[
    Literal["prefill", "random"],
    typer.Option(help="The cache holds what the model computes for random tokens, or random keys and values."),
]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads (default: torch's).")]


@dataclass(frozen=True)
class Weights:
    """A model or a shape with random weights, and where it runs."""

    model: Annotated[
        str | None,
        typer.Option(help="As for generate: a folder, file or name (default: 'pocket')."),
    ] = None
    revision: Revision = None
    shape: Annotated[
        str | None, typer.Option(help="Random weights instead of a model: llama-1b, llama-3b, llama-8b or qwen3-4b.")
    ] = None
    threads: Threads = None
    device: Device = None
    dtype: Dtype = None

    def load(self, contexts: Sequence[int], more: int) -> Engine:
        """An engine whose context holds the longest of ``contexts`` and ``more`` tokens; also sets torch's threads."""
        for option, given in (("--model", self.model), ("--revision", self.revision)):
            if given is not None and self.shape is not None:
                raise SpringtideError(f"Give either {option} or --shape, not both.")
        import torch
        from transformers.utils import logging

        from springtide.benchmarks.contenders import check_context
        from springtide.benchmarks.shapes import check_shape, random_engine
        from springtide.loading import as_device, as_dtype

        length = max(contexts) + more
        if self.shape is not None:
            check_shape(self.shape, length)
        _set_threads(self.threads)
        if self.shape is None:
            engine = Model(self.model or "pocket", self.revision, self.device, self.dtype).load()
        else:
            logging.set_verbosity_error()
            kind = as_dtype(self.dtype or "bfloat16")
            assert isinstance(kind, torch.dtype)
            engine = random_engine(self.shape, length, kind, as_device(self.device))
        check_context(engine, contexts, more)
        return engine


@dataclass(frozen=True)
class Peers:
    """Other projects to compare with."""

    against: Annotated[str | None, typer.Option(help="Comma list of peers: transformers, openvino, llama.cpp.")] = None
    cache: Annotated[
        Path | None,
        typer.Option(help="Folder for models in peers' formats (default: peers in the user's cache)."),
    ] = None

    @property
    def _names(self) -> list[str]:
        return [] if self.against is None else list(dict.fromkeys(name.strip() for name in self.against.split(",")))

    def check(self) -> None:
        """Raise SpringtideError for a peer that is not known, is not installed or does not work."""
        from springtide.benchmarks.peers import check_peers

        check_peers(self._names)

    def prepare(self, engine: Engine, shape: str | None, length: int) -> list[Peer]:
        """The peers with the engine's weights, a model's or random ones of a ``shape``, for ``length`` tokens."""
        import torch

        from springtide.benchmarks.contenders import dtype_name
        from springtide.benchmarks.peers import Target, prepare, weights_name
        from springtide.model.source import Source

        model = engine.stack.model
        dtype = dtype_name(model)
        name = f"{shape}-{dtype}" if shape is not None else weights_name(Source(Path(model.name_or_path)), dtype)
        where = {} if self.cache is None else {"folder": self.cache}
        return prepare(self._names, Target(model, name, length, torch.get_num_threads(), **where))


def decode(
    *,
    weights: Weights,
    context: Contexts = "1024,8192",
    policies: Policies,
    peers: Peers,
    draft: Annotated[
        str | None,
        typer.Option(
            help="sim:tau=T,rows=R,tokens=G,accept=A+B: what lossless decoding with drafts by the sparse policies "
            "would take if the shares A and B of them were accepted; see docs/performance.md."
        ),
    ] = None,
    steps: Annotated[
        int, typer.Option(min=1, help="Tokens to time after each context (with --draft: passes of each kind).")
    ] = 32,
    fill: Fill = "prefill",
    results: Results,
) -> None:
    """Time of a decoded token at batch 1, beside the floor that memory bandwidth sets and beside other projects."""
    from springtide.benchmarks import decode as benchmark
    from springtide.evaluation.report import plot_lines

    results.check()
    peers.check()
    contexts, wanted = read_numbers(context, "--context"), policies.read()
    if draft is not None:
        if peers.against is not None:
            raise SpringtideError("--draft compares with dense decoding alone; leave out --against or --draft.")
        _simulate(weights, contexts, wanted, draft, steps, fill, results)
        return
    more = steps + 1  # the first token after the prompt is not timed
    engine = weights.load(contexts, more)
    compared, others = resolved(engine, wanted), peers.prepare(engine, weights.shape, max(contexts) + more)
    total = benchmark.steps_of(len(contexts), len(compared) + len(others), steps)
    found = result_of(benchmark.decode(engine, compared, others, contexts, steps, fill), total, "decoding")
    rows = [asdict(row) for row in found]
    results.write(rows)
    print(f"{rows[0]['dtype']}, {rows[0]['threads']} threads, read bandwidth {rows[0]['bandwidth']:.1f} GB/s")
    _print_rows(rows, context="context", ms_per_token="ms", floor_ms="floor", ratio_to_floor="x\nfloor")
    if results.plot:
        plot_lines(
            results.plot,
            _series_of(rows, "context", "ms_per_token")
            | _series_of(rows, "context", "floor_ms", of="floor of ", springtide_only=True),
            x="context (tokens)",
            y="ms a token",
            log_x=True,
        )


def prefill(
    *,
    weights: Weights,
    context: Contexts = "1024,8192",
    policies: Policies = Policies("dense"),
    peers: Peers,
    repeats: Annotated[int, typer.Option(min=1, help="Readings to time of each context.")] = 1,
    results: Results,
) -> None:
    """Time to read a prompt of random tokens."""
    from springtide.benchmarks import prefill as benchmark
    from springtide.evaluation.report import plot_lines

    results.check()
    peers.check()
    contexts, wanted = read_numbers(context, "--context"), policies.read()
    engine = weights.load(contexts, 1)
    compared, others = resolved(engine, wanted), peers.prepare(engine, weights.shape, max(contexts) + 1)
    total = benchmark.steps_of(len(contexts), len(compared) + len(others), repeats)
    found = result_of(benchmark.prefill(engine, compared, others, contexts, repeats), total, "reading")
    rows = [asdict(row) for row in found]
    results.write(rows)
    print(f"{rows[0]['dtype']}, {rows[0]['threads']} threads")
    _print_rows(rows, context="context", seconds="seconds", tokens_per_second="tokens/s", tflops="TFLOP/s")
    if results.plot:
        series = _series_of(rows, "context", "tokens_per_second")
        plot_lines(results.plot, series, x="context (tokens)", y="tokens read a second", log_x=True)


def rows(
    *,
    weights: Weights,
    rows: Annotated[
        str, typer.Option(help="Comma list of rows in a pass; one row is always timed.")
    ] = "1,2,4,8,16,32,64",
    context: Annotated[int, typer.Option(min=1, help="Context length, tokens.")] = 8192,
    policies: Policies,
    passes: Annotated[int, typer.Option(min=1, help="Passes to time for each number of rows.")] = 10,
    fill: Fill = "prefill",
    results: Results,
) -> None:
    """Time of a pass by how many rows it has: what it costs to try drafted tokens."""
    from springtide.benchmarks import rows as benchmark
    from springtide.evaluation.report import plot_lines

    results.check()
    counts, wanted = read_numbers(rows, "--rows"), policies.read()
    engine = weights.load([context], max(counts))
    compared = resolved(engine, wanted)
    total = benchmark.steps_of(len(compared), counts, passes)
    found = result_of(benchmark.rows(engine, compared, counts, context, passes, fill), total, "passes")
    measured = [asdict(row) for row in found]
    results.write(measured)
    print(f"{measured[0]['dtype']}, {measured[0]['threads']} threads")
    _print_rows(measured, context="context", rows="rows", ms="ms", ratio_to_one_row="x one row")
    if results.plot:
        plot_lines(results.plot, _series_of(measured, "rows", "ratio_to_one_row"), x="rows", y="time over one row's")


def kernels(
    context: Annotated[int, typer.Option(min=1, help="Cached tokens.")] = 65536,
    budget: Annotated[str, typer.Option(help="Comma list of tokens that are gathered for each KV head.")] = "1024",
    turns: Annotated[int, typer.Option(min=1, help="Turns that each kernel gets.")] = 5,
    json_file: Json = None,
    threads: Threads = None,
    dtype: Dtype = None,
) -> None:
    """Time of the attention kernels by themselves (CPU), in the shape of llama-1b: 32 query and 8 KV heads of 64."""
    from springtide.evaluation.report import check_target, print_table, write_json

    check_target(json_file)
    budgets = read_numbers(budget, "--budget")
    if max(budgets) > context:
        raise SpringtideError(f"--budget {max(budgets)} is more than the context of {context} tokens.")
    import torch

    from springtide.benchmarks import kernels as benchmark
    from springtide.loading import as_dtype

    _set_threads(threads)
    kind = as_dtype(dtype or "bfloat16")
    assert isinstance(kind, torch.dtype)
    total = benchmark.steps_of(budgets, turns)
    rows = [asdict(row) for row in result_of(benchmark.run(context, budgets, turns, kind), total, "turns")]
    if json_file:
        write_json(json_file, rows)
    first = rows[0]
    print(f"{first['dtype']}, {first['threads']} threads, read bandwidth {first['bandwidth']:.1f} GB/s")
    shown = ("kernel", "rows", "budget", "ms", "gb_per_second", "share_of_bandwidth", "ratio_to_torch")
    print_table([{name: row[name] for name in shown} for row in rows])


def _simulate(
    weights: Weights,
    contexts: Sequence[int],
    policies: Sequence[Policy],
    draft: str,
    passes: int,
    fill: Literal["prefill", "random"],
    results: Results,
) -> None:
    """Show what drafts by the sparse ones of ``policies`` would gain."""
    from springtide.benchmarks import simulated as benchmark
    from springtide.evaluation.report import plot_lines

    drafts = benchmark.parse_drafts(draft)
    sparse = [policy for policy in policies if policy.name != "dense"]
    if not sparse:
        raise SpringtideError("--draft sim drafts by a sparse policy, but --policy names none; add one, such as tidal.")
    engine = weights.load(contexts, max(drafts.sparse_rows, *drafts.dense_rows))
    compared = resolved(engine, sparse)
    total = benchmark.steps_of(len(contexts), len(compared), drafts, passes)
    found = result_of(benchmark.simulated(engine, compared, drafts, contexts, passes, fill), total, "passes")
    rows = [asdict(row) for row in found]
    results.write(rows)
    print(f"{rows[0]['dtype']}, {rows[0]['threads']} threads; costs are measured, acceptance is simulated")
    for _, own in groupby(found, key=lambda row: (row.context, row.policy, row.budget)):
        _print_simulated(list(own))
    if results.plot:
        named = [row | {"policy": f"accepted {row['accept']:g}, {row['policy']}"} for row in rows]
        series = _series_of(named, "context", "speedup")
        plot_lines(results.plot, series, x="context (tokens)", y="speed-up, simulated acceptance", log_x=True)


def _print_simulated(rows: Sequence[Simulated]) -> None:
    """Print what one policy's drafts gain after one context, and how that follows from what was measured."""
    from springtide.benchmarks.contenders import title
    from springtide.evaluation.report import print_table, shown

    first = rows[0]
    name, passes = title(None, first.policy, first.budget), "g" if first.tau == 1 else f"ceil(g / {first.tau:g})"
    sparse = "1 row" if first.rows == 1 else f"{first.rows} rows ({shown(first.sparse_ms)} of 1)"
    dense = ", ".join(f"{shown(ms)} ms for {count} rows" for count, ms in first.measured_ms[1:])
    print(
        f"\nsimulated acceptance: {name} drafts after {first.context} tokens\n"
        f"d = {shown(first.dense_ms)} ms: a dense pass of 1 row; "
        f"c = {shown(first.draft_ms)} ms: a sparse pass of {sparse}\n"
        f"v: a dense pass of g + 1 rows; measured were {dense}\n"
        f"ms/token = ({passes} * c + v) / (1 + a + ... + a^g), for g drafted tokens of which the share a is accepted; "
        "speed-up = d / that"
    )
    print_table(
        [
            {
                "": f"simulated acceptance a = {row.accept:g}",
                "g": row.tokens,
                "passes": row.passes,
                "v": row.verify_ms,
                "tokens/round": row.tokens_per_round,
                "ms/token": row.ms_per_token,
                "speed-up": row.speedup,
            }
            for row in rows
        ]
    )
    if first.break_even is None:
        print(f"break-even after {first.context} tokens: none, even a simulated acceptance of 1 does not pay")
    elif first.break_even == 0:
        print(f"break-even after {first.context} tokens: none, every simulated acceptance pays")
    else:
        print(f"break-even after {first.context} tokens: a simulated acceptance of {first.break_even:.3f}")


def _set_threads(threads: int | None) -> None:
    """Have torch use so many threads, if it is said how many; raises SpringtideError for more than there are CPUs."""
    import torch

    most = os.cpu_count() or 1
    if threads is not None and threads > most:
        raise SpringtideError(f"--threads is {threads}, but the machine has {most} CPUs; use that many at most.")
    if threads is not None:
        torch.set_num_threads(threads)


def _print_rows(rows: Sequence[dict[str, Any]], /, **columns: str) -> None:
    """Print columns of a benchmark's rows under other names, each ratio to a peer in a column of its own."""
    from springtide.benchmarks.contenders import title
    from springtide.evaluation.report import print_table

    print_table(
        [
            {"": title(row.get("contender"), row["policy"], row["budget"])}
            | {shown: row[name] for name, shown in columns.items()}
            | {f"x\n{peer}": value for peer, value in row.get("ratio_to", {}).items()}
            for row in rows
        ]
    )


def _series_of(
    rows: Sequence[dict[str, Any]], x: str, y: str, of: str = "", springtide_only: bool = False
) -> dict[str, tuple[list[float | None], list[float]]]:
    """Lines of ``y`` over ``x``, one for each contender that was measured."""
    from springtide.benchmarks.contenders import title

    series: dict[str, tuple[list[float | None], list[float]]] = {}
    for row in rows:
        if row[y] is not None and not (springtide_only and row["policy"] is None):
            xs, ys = series.setdefault(of + title(row.get("contender"), row["policy"], row["budget"]), ([], []))
            xs.append(row[x])
            ys.append(row[y])
    return series
