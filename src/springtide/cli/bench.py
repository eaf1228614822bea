"""``springtide bench``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from springtide.cli.inputs import (
    Budgets,
    Device,
    Dtype,
    Json,
    Plot,
    Policies,
    Revision,
    load_engine,
    read_numbers,
    read_policies,
    resolved,
)
from springtide.cli.show import result_of
from springtide.errors import SpringtideError

if TYPE_CHECKING:
    from springtide.benchmarks.peers import Peer
    from springtide.engine.engine import Engine

BenchModel = Annotated[
    str | None, typer.Option("--model", help="As for generate: a folder, file or name (default: 'pocket').")
]
Shape = Annotated[
    str | None, typer.Option(help="Random weights instead of a model: llama-1b, llama-3b, llama-8b or qwen3-4b.")
]
Contexts = Annotated[str, typer.Option("--context", help="Comma list of context lengths, tokens.")]
Against = Annotated[str | None, typer.Option(help="Comma list of peers: transformers, openvino, llama.cpp.")]
Fill = Annotated[
    Literal["prefill", "random"],
    typer.Option(help="The cache holds what the model computes for random tokens, or random keys and values."),
]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads (default: torch's).")]
PeerCache = Annotated[
    Path | None,
    typer.Option("--cache", help="Folder for models in peers' formats (default: peers in the user's cache)."),
]


def decode(
    model: BenchModel = None,
    revision: Revision = None,
    shape: Shape = None,
    context: Contexts = "1024,8192",
    policy: Policies = "dense,tidal",
    budget: Budgets = None,
    against: Against = None,
    steps: Annotated[int, typer.Option(min=1, help="Tokens to time after each context.")] = 32,
    fill: Fill = "prefill",
    json_file: Json = None,
    plot: Plot = None,
    threads: Threads = None,
    cache: PeerCache = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Time of a decoded token at batch 1, beside the floor that memory bandwidth sets and beside other projects."""
    from springtide.benchmarks import decode as benchmark
    from springtide.benchmarks.contenders import check_context
    from springtide.evaluation.report import check_target, plot_lines, write_json

    check_target(json_file, plot)
    contexts, wanted, names = read_numbers(context, "--context"), read_policies(policy, budget), _peer_names(against)
    length = max(contexts) + steps + 1  # the first token after the prompt is not timed
    engine = _engine(model, revision, shape, length, threads, device, dtype)
    check_context(engine, contexts, steps + 1)
    policies = resolved(engine, wanted)
    peers = _peers(names, engine, shape, length, cache)
    total = benchmark.steps_of(len(contexts), len(policies) + len(peers), steps)
    found = result_of(benchmark.decode(engine, policies, peers, contexts, steps, fill), total, "decoding")
    rows = [asdict(row) for row in found]
    if json_file:
        write_json(json_file, rows)
    print(f"{rows[0]['dtype']}, {rows[0]['threads']} threads, read bandwidth {rows[0]['bandwidth']:.1f} GB/s")
    _print_rows(rows, context="context", ms_per_token="ms", floor_ms="floor", ratio_to_floor="x\nfloor")
    if plot:
        plot_lines(
            plot,
            _series_of(rows, "context", "ms_per_token")
            | _series_of(rows, "context", "floor_ms", of="floor of ", springtide_only=True),
            x="context (tokens)",
            y="ms a token",
            log_x=True,
        )


def prefill(
    model: BenchModel = None,
    revision: Revision = None,
    shape: Shape = None,
    context: Contexts = "1024,8192",
    policy: Policies = "dense",
    budget: Budgets = None,
    against: Against = None,
    repeats: Annotated[int, typer.Option(min=1, help="Readings to time of each context.")] = 1,
    json_file: Json = None,
    plot: Plot = None,
    threads: Threads = None,
    cache: PeerCache = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Time to read a prompt of random tokens."""
    from springtide.benchmarks import prefill as benchmark
    from springtide.benchmarks.contenders import check_context
    from springtide.evaluation.report import check_target, plot_lines, write_json

    check_target(json_file, plot)
    contexts, wanted, names = read_numbers(context, "--context"), read_policies(policy, budget), _peer_names(against)
    length = max(contexts) + 1
    engine = _engine(model, revision, shape, length, threads, device, dtype)
    check_context(engine, contexts, 1)
    policies = resolved(engine, wanted)
    peers = _peers(names, engine, shape, length, cache)
    total = benchmark.steps_of(len(contexts), len(policies) + len(peers), repeats)
    found = result_of(benchmark.prefill(engine, policies, peers, contexts, repeats), total, "reading")
    rows = [asdict(row) for row in found]
    if json_file:
        write_json(json_file, rows)
    print(f"{rows[0]['dtype']}, {rows[0]['threads']} threads")
    _print_rows(rows, context="context", seconds="seconds", tokens_per_second="tokens/s", tflops="TFLOP/s")
    if plot:
        series = _series_of(rows, "context", "tokens_per_second")
        plot_lines(plot, series, x="context (tokens)", y="tokens read a second", log_x=True)


def rows(
    model: BenchModel = None,
    revision: Revision = None,
    shape: Shape = None,
    rows: Annotated[
        str, typer.Option(help="Comma list of rows in a pass; one row is always timed.")
    ] = "1,2,4,8,16,32,64",
    context: Annotated[int, typer.Option(min=1, help="Context length, tokens.")] = 8192,
    policy: Policies = "dense,tidal",
    budget: Budgets = None,
    passes: Annotated[int, typer.Option(min=1, help="Passes to time for each number of rows.")] = 10,
    fill: Fill = "prefill",
    json_file: Json = None,
    plot: Plot = None,
    threads: Threads = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Time of a pass by how many rows it has: what it costs to try drafted tokens."""
    from springtide.benchmarks import rows as benchmark
    from springtide.benchmarks.contenders import check_context
    from springtide.evaluation.report import check_target, plot_lines, write_json

    check_target(json_file, plot)
    counts, wanted = read_numbers(rows, "--rows"), read_policies(policy, budget)
    engine = _engine(model, revision, shape, context + max(counts), threads, device, dtype)
    check_context(engine, [context], max(counts))
    policies = resolved(engine, wanted)
    total = benchmark.steps_of(len(policies), counts, passes)
    found = result_of(benchmark.rows(engine, policies, counts, context, passes, fill), total, "passes")
    results = [asdict(row) for row in found]
    if json_file:
        write_json(json_file, results)
    print(f"{results[0]['dtype']}, {results[0]['threads']} threads")
    _print_rows(results, context="context", rows="rows", ms="ms", ratio_to_one_row="x one row")
    if plot:
        plot_lines(plot, _series_of(results, "rows", "ratio_to_one_row"), x="rows", y="time over one row's")


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

    if threads is not None:
        torch.set_num_threads(threads)
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


def _engine(
    model: str | None,
    revision: str | None,
    shape: str | None,
    length: int,
    threads: int | None,
    device: str | None,
    dtype: str | None,
) -> Engine:
    """A model's engine, or one of a shape whose context holds ``length`` tokens, with ``threads`` set for torch."""
    for option, given in (("--model", model), ("--revision", revision)):
        if given is not None and shape is not None:
            raise SpringtideError(f"Give either {option} or --shape, not both.")
    import torch
    from transformers.utils import logging

    from springtide.benchmarks.shapes import check_shape, random_engine
    from springtide.loading import as_device, as_dtype

    if shape is not None:
        check_shape(shape, length)
    if threads is not None:
        torch.set_num_threads(threads)
    if shape is None:
        return load_engine(model or "pocket", device, dtype, revision)
    logging.set_verbosity_error()
    kind = as_dtype(dtype or "bfloat16")
    assert isinstance(kind, torch.dtype)
    return random_engine(shape, length, kind, as_device(device))


def _peer_names(text: str | None) -> list[str]:
    from springtide.benchmarks.peers import check_peers

    names = list(dict.fromkeys(name.strip() for name in text.split(","))) if text is not None else []
    check_peers(names)
    return names


def _peers(names: Sequence[str], engine: Engine, shape: str | None, length: int, folder: Path | None) -> list[Peer]:
    import torch

    from springtide.benchmarks.contenders import dtype_name
    from springtide.benchmarks.peers import Target, prepare, weights_name
    from springtide.model.source import Source

    loaded = engine.stack.model
    dtype = dtype_name(loaded)
    name = f"{shape}-{dtype}" if shape is not None else weights_name(Source(Path(loaded.name_or_path)), dtype)
    where = {} if folder is None else {"folder": folder}
    return prepare(names, Target(loaded, name, length, torch.get_num_threads(), **where))


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
