"""The command line. Heavy imports are inside the verbs, so that ``--help`` is instant."""

from __future__ import annotations

import inspect
import io
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from springtide.errors import SpringtideError
from springtide.files import EXCERPT

if TYPE_CHECKING:
    from springtide.attention.policy import Policy
    from springtide.benchmarks.peers import Peer
    from springtide.engine.engine import Engine
    from springtide.model.stack import Stack
    from springtide.options import Share
    from springtide.training.trainer import Objective

T = TypeVar("T")

LAST_SEED = 2**63 - 1
MOST_ANSWERED = 64  # tokens, about an image

app = typer.Typer(no_args_is_help=True, add_completion=False)
train_app = typer.Typer(no_args_is_help=True, help="Train models and drafters.")
eval_app = typer.Typer(no_args_is_help=True, help="Measure quality.")
bench_app = typer.Typer(no_args_is_help=True, help="Measure speed.")
convert_app = typer.Typer(no_args_is_help=True, help="Convert drafters from and to other projects' layouts.")
sweep_app = typer.Typer(no_args_is_help=True, help="Find good settings for a drafter, before training it.")


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
    """Fast long-context decoding of Hugging Face models."""


app.add_typer(train_app, name="train")
app.add_typer(eval_app, name="eval")
app.add_typer(bench_app, name="bench")
app.add_typer(convert_app, name="convert")
app.add_typer(sweep_app, name="sweep")

Model = Annotated[str, typer.Option(help="Model folder, or 'pocket' for the bundled model.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ... (default: a GPU if there is one).")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16, float16 (default: the checkpoint's).")]
PolicyText = Annotated[
    str, typer.Option("--policy", help="dense, tidal, quest, streaming, oracle; NAME:OPTION=VALUE,...")
]
Policies = Annotated[
    str, typer.Option("--policy", help="Comma list of policies, each as NAME or NAME:OPTION=VALUE,...")
]
Budget = Annotated[
    str | None, typer.Option(help="Tokens that a sparse layer reads per KV head, or a share of the context as 5%.")
]
Budgets = Annotated[
    str | None, typer.Option("--budget", help="Comma list of budgets: tokens per KV head, or shares as 5%.")
]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the result to this file, as JSON.")]
Plot = Annotated[Path | None, typer.Option("--plot", help="Also draw the result to this file, as PNG.")]
Text = Annotated[Path | None, typer.Option("--text", help="UTF-8 text file (default: the bundled held-out excerpt).")]
BenchModel = Annotated[str | None, typer.Option("--model", help="Model folder, or 'pocket' (which is the default).")]
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
    typer.Option("--cache", help="Folder for models in peers' formats (default: ~/.cache/springtide/peers)."),
]
MaxTokens = Annotated[int, typer.Option(help="Most tokens to generate.")]
Temperature = Annotated[float, typer.Option(help="0 takes the most probable token.")]
TopP = Annotated[float, typer.Option(help="Sample among the tokens that hold this probability.")]
TopK = Annotated[int, typer.Option(help="Sample among this many tokens (0: all).")]
MinP = Annotated[float, typer.Option(help="Drop tokens below this share of the most probable one.")]
Penalty = Annotated[float, typer.Option(help="Above 1 discourages tokens seen before.")]
Seed = Annotated[int, typer.Option(help="Seed of the sampling noise.")]
Stop = Annotated[list[str] | None, typer.Option(help="Text that ends the output; may be repeated.")]
Chat = Annotated[
    bool | None,
    typer.Option(help="Ask in the model's chat template (default: if it has one, but for pocket models)."),
]
Images = Annotated[str, typer.Option("--data", help="scenes, digits, or a folder with one of images for each class.")]
HeadCount = Annotated[int, typer.Option("--heads", min=1, max=8, help="Heads, that is tokens to guess ahead.")]
FullHeads = Annotated[
    bool, typer.Option("--full/--shared", help="An LM head for each head, or the model's own for all (smaller).")
]
Draft = Annotated[
    str | None,
    typer.Option(help="Drafter: lookup, medusa, medusa2, hidden-transfer (which pocket has), or a drafter's folder."),
]
Accept = Annotated[
    Literal["exact", "typical"],
    typer.Option(help="exact: the text is as without a drafter; typical: keeps more drafted tokens, but is lossy."),
]


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; '-' or nothing reads standard input.")] = None,
    model: Model = "pocket",
    prompt_file: Annotated[Path | None, typer.Option(help="Read the prompt from this UTF-8 file.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap the prompt in the model's chat template.")] = False,
    policy: PolicyText = "dense",
    budget: Budget = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = 0,
    stop: Stop = None,
    draft: Draft = None,
    accept: Accept = "exact",
    stats: Annotated[
        bool,
        typer.Option(
            "--stats", help="Print timing and traffic to standard error; on a terminal drafted text is green."
        ),
    ] = False,
    json_file: Json = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Complete a prompt and print the text as it comes."""
    from springtide.evaluation.report import check_target, write_json
    from springtide.rows.sampling import Sampling

    check_target(json_file)
    sampling = Sampling(
        max_tokens, temperature, top_p, top_k, min_p, repetition_penalty, seed, tuple(stop or ()), accept=accept
    )
    chosen = _policy(policy, budget)
    text = _prompt(prompt, prompt_file)
    engine = _load(model, device, dtype, policy=chosen, draft=draft)
    tokens = engine.render([{"role": "user", "content": text}]) if chat else engine.encode(text)
    sequence = engine.start(tokens, sampling)
    interrupted = False
    try:
        _print_pieces(engine, sequence, coloured=stats)
    except KeyboardInterrupt:
        interrupted = True
    print(flush=True)
    output = engine.output(sequence)
    if stats:
        print(_stats_line(output.stats), file=sys.stderr)
    if json_file:
        write_json(json_file, output.as_json())
    if interrupted:
        raise typer.Exit(130)


@app.command()
def chat(
    model: Model = "pocket",
    system: Annotated[str | None, typer.Option(help="System message, or '@FILE' to read it from a file.")] = None,
    policy: PolicyText = "dense",
    budget: Budget = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    draft: Draft = None,
    accept: Accept = "exact",
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Talk with the model; the cache is kept between turns. /reset starts anew, /exit or Ctrl-D ends."""
    from springtide.rows.sampling import Sampling

    sampling = Sampling(max_tokens, temperature, top_p, seed=seed, accept=accept)
    chosen = _policy(policy, budget)
    if system and system.startswith("@"):
        system = _read(Path(system[1:]))
    opening = [{"role": "system", "content": system}] if system else []
    engine = _load(model, device, dtype, policy=chosen, draft=draft)
    engine.render([*opening, {"role": "user", "content": "Hello"}])  # does the model chat at all?
    messages, sequence = list(opening), None
    while (line := _ask_user()) not in (None, "/exit"):
        if line == "/reset":
            messages, sequence = list(opening), None
        if not line or line == "/reset":
            continue
        try:
            tokens = engine.render([*messages, {"role": "user", "content": line}])
            sequence = engine.start(tokens, sampling, reuse=sequence)
        except SpringtideError as error:
            if not sys.stdin.isatty():
                raise
            print(f"springtide: {error}", file=sys.stderr)
            continue
        try:
            _print_pieces(engine, sequence)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        print(flush=True)
        messages += [{"role": "user", "content": line}, {"role": "assistant", "content": sequence.text}]


@app.command()
def demo(json_file: Json = None) -> None:
    """The bundled model reads a book with facts hidden in it and answers, with dense attention and TidalDecode."""
    from springtide.evaluation.demo import demo as run
    from springtide.evaluation.report import check_target, write_json

    check_target(json_file)
    result = run(_load("pocket", None, None), _excerpt())
    if json_file:
        write_json(json_file, result)


@app.command()
def calibrate(
    model: Model = "pocket",
    dense_layers: Annotated[
        int | None, typer.Option(help="Layers, or as many KV heads, that stay dense (default: a third).")
    ] = None,
    target_kl: Annotated[
        float | None,
        typer.Option(help="Instead: as few as keep the answers' divergence from dense below this, nats a token."),
    ] = None,
    budget: Annotated[str, typer.Option(help="Tokens that a sparse layer reads per KV head, or a share as 3%.")] = "3%",
    length: Annotated[int, typer.Option(help="Context length to calibrate at, tokens.")] = 2048,
    prompts: Annotated[
        int, typer.Option(min=1, help="Contexts with questions, and plain texts, in each of three sets.")
    ] = 3,
    trials: Annotated[int, typer.Option(min=1, help="Layouts to measure for the number of layers taken.")] = 20,
    head_map: Annotated[bool, typer.Option("--map", help="Learn the map that tidal:heads=map needs too.")] = False,
    chat: Chat = None,
    text: Text = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for springtide.json and springtide.png, the curve (default: the model's)."),
    ] = None,
    json_file: Json = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Choose what TidalDecode keeps dense and which layers select; the same command goes on where one was stopped.

    The curve of dense layers and budgets against divergence, bytes and time goes to springtide.png, and to --json.
    """
    from springtide.attention import parse_budget
    from springtide.attention.tidal import Tidal
    from springtide.evaluation import calibrate as calibration
    from springtide.evaluation.report import check_target, plot_curve, print_table, write_json
    from springtide.loading import find_model

    folder = out or find_model(model)
    check_target(folder / "springtide.json", json_file)
    book, tidal = _text(text), Tidal(budget=parse_budget(budget))
    if model == "pocket" and out is None:
        raise SpringtideError("The bundled model is calibrated already; give --model DIR, or --out DIR to write to.")
    engine = _load(model, device, dtype, calibrated=False)
    wish = calibration.Wish(tidal, length, dense_layers, target_kl, prompts, trials, _chats(engine, chat), head_map)
    partial = folder / calibration.PARTIAL
    with _resumable(partial):
        steps = calibration.calibrate(engine, book, wish, partial)
        found = _last(steps, calibration.steps(engine, wish), "calibrating")
    plot_curve(folder / "springtide.png", found.curve)
    path = calibration.write(found.as_json(), folder)
    if json_file:
        write_json(json_file, [asdict(point) for point in found.curve])
    partial.unlink()
    print_table(
        [
            {
                "dense_layers": x.dense_layers,
                "full": _plus(x.full),
                "select": _plus(x.select),
                "heads": _plus(x.full_heads),
                "KL questions": x.kl_questions,
                "KL text": x.kl_text,
                "MB/token": x.kv_bytes / 1e6,
                "ms": x.predicted_ms,
            }
            for x in found.curve
            if x.budget == found.budget
        ]
    )
    print(found.said())
    print(f"Wrote the layers to {path}.")


@app.command()
def see(
    image: Annotated[Path, typer.Argument(help="Image file.")],
    question: Annotated[
        str | None, typer.Option(help="What to ask about it (default: 'describe the picture').")
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            help="Folder of a captioner, or of a DependencyViT, which answers nothing; 'pocket' is the bundled "
            "captioner, which knows the synthetic scenes only."
        ),
    ] = "pocket",
    keep: Annotated[
        float | None, typer.Option(help="Share of the image's tokens to keep (default: the model's own).")
    ] = None,
    parts: Annotated[int, typer.Option(min=1, help="Parts to cut the foreground into.")] = 3,
    out: Annotated[Path | None, typer.Option(help="Draw tree, saliency, parts and kept tokens to this PNG.")] = None,
    policy: PolicyText = "dense",
    draft: Annotated[str | None, typer.Option(help="Drafter: lookup, or a drafter's folder.")] = None,
    json_file: Json = None,
    device: Device = None,
) -> None:
    """Answer a question about an image, and draw what the vision model made of it."""
    from springtide.evaluation.report import check_target, write_json
    from springtide.loading import as_device
    from springtide.vision.captioner import PROJECTOR, Captioner
    from springtide.vision.dependency_vit import DependencyViTForImageClassification
    from springtide.vision.folder import load_any
    from springtide.vision.images import DependencyViTImageProcessor, read_image
    from springtide.vision.page import draw_page
    from springtide.vision.tree import Grid, look, partitions, saliencies, trees

    check_target(json_file, out)
    if image.resolve() in (path.resolve() for path in (json_file, out) if path):
        raise SpringtideError(f"'{image}' is the image itself; choose another file for what is found.")
    picture = read_image(image)
    _quiet_transformers()
    folder = Path(model).expanduser()
    alone = model != "pocket" and (folder / "config.json").exists() and not (folder / PROJECTOR).exists()
    if alone and (question or draft):
        raise SpringtideError(
            f"'{folder}' holds no captioner, so it answers nothing; leave out --question and --draft."
        )
    captioner = None if alone else Captioner.load(model, policy=policy, device=device, draft=draft)
    vit = captioner.vit if captioner else load_any(folder).to(as_device(device)).eval()
    processor = captioner.processor if captioner else DependencyViTImageProcessor.square(vit.config.image_size)
    pixels = processor(picture, return_tensors="pt")["pixel_values"].to(vit.device)
    grid, seen = Grid.of(pixels, vit.config.patch_size), look(vit, pixels, keep, masks=out is not None)
    found: dict[str, Any] = {}
    if captioner:
        question = question or "describe the picture"
        answered = captioner.answer(captioner.project(seen, grid), question, max_tokens=MOST_ANSWERED)
        found = {"question": question, **answered.as_json()}
    elif isinstance(vit, DependencyViTForImageClassification):
        score, label = vit.classifier(seen.pooler_output)[0].softmax(0).max(0)
        found = {"text": vit.config.id2label[label.item()], "score": round(score.item(), 4)}
    if answer := found.get("text"):
        print(answer)
    kept = seen.indices.shape[1]
    if out:
        salient = saliencies(seen, grid)
        [tree], [cut] = trees(seen, grid.tokens), partitions(seen, salient, parts)
        facts = {"image": image.name, "asked": question, "answer": answer, "kept": f"{kept} of {grid.tokens} tokens"}
        draw_page(out, picture, seen, tree, salient[0], cut, {name: fact for name, fact in facts.items() if fact})
    if json_file:
        write_json(json_file, {**found, "image_tokens": kept})


@train_app.command("pocket")
def train_pocket(
    corpus: Annotated[Path, typer.Option(help="Folder of .txt files.")],
    out: Annotated[Path, typer.Option(help="Folder for the model, its checkpoint and its log.")] = Path("pocket"),
    minutes: Annotated[float, typer.Option(help="Training time.")] = 95,
    hold_out: Annotated[
        list[str] | None, typer.Option(help="File name to keep out of training; may be repeated.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of initial weights and data.")] = 0,
) -> None:
    """Train the pocket model from books; the same command goes on where an earlier one stopped."""
    import logging

    from springtide.training import pocket

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with _resumable(out / "checkpoint.pt"):
        pocket.train_pocket(corpus, out, minutes=minutes, hold_out=hold_out or pocket.HOLD_OUT, seed=seed)


@convert_app.command("medusa")
def convert_medusa(
    source: Annotated[Path, typer.Option("--from", help="Folder with the heads, in any of the layouts.")],
    target: Annotated[Path, typer.Option("--to", help="Folder for the result.")],
    layout: Annotated[Literal["original", "vllm", "springtide"], typer.Option("--format", help="Layout to write.")],
    model: Annotated[
        str | None,
        typer.Option(help="The heads' model folder: checked, named in the result, and its LM head stored if need be."),
    ] = None,
) -> None:
    """Read Medusa heads in the original project's, vLLM's or Springtide's layout and write them in another."""
    from dataclasses import replace

    from springtide.drafting import ADAPTER
    from springtide.drafting.folder import CONFIG
    from springtide.drafting.medusa import Medusa

    if (target / CONFIG).exists():
        raise SpringtideError(f"'{target}' holds a {CONFIG} already; choose another folder for --to.")
    drafter = Medusa.load(source)
    if model is not None:
        drafter = replace(drafter.resolve(_load(model, "cpu", None).stack), base_model=model)
    drafter.save(target, layout)
    if (source / ADAPTER).is_dir():
        warnings.warn(f"these heads are for the model with '{source / ADAPTER}' merged into it", stacklevel=1)


@dataclass(frozen=True)
class Training:
    """The options of every drafter's training."""

    out: Annotated[Path, typer.Option(help="Folder for the drafter, its checkpoint, log and curves.")]
    model: Model = "pocket"
    data: Annotated[
        str,
        typer.Option(
            help="Text file, folder of .txt files, .jsonl file with tokens, text or messages in a line, or 'self': "
            "what the model itself writes."
        ),
    ] = "self"
    text: Annotated[
        Path | None, typer.Option(help="What 'self' begins with: a file or folder (default: the bundled excerpt).")
    ] = None
    prompts: Annotated[int, typer.Option(min=1, help="Texts that 'self' writes.")] = 512
    hold_out: Annotated[
        list[str] | None, typer.Option(help="File name in the folder, for calibration only; may be repeated.")
    ] = None
    steps: Annotated[int, typer.Option(min=1, help="Steps of optimization.")] = 1000
    batch: Annotated[int, typer.Option(min=1, help="Windows in a step.")] = 8
    length: Annotated[int, typer.Option(help="Tokens in a window.")] = 256
    lr: Annotated[float | None, typer.Option(help="Highest learning rate (default: the method's).")] = None
    seed: Annotated[
        int, typer.Option(min=0, max=LAST_SEED, help="Seed of the order of the data, and of what the model writes.")
    ] = 0
    json_file: Json = None
    device: Device = None
    dtype: Dtype = None


def _trains(verb: Callable[..., None]) -> Callable[..., None]:
    """A verb whose first parameter, a :class:`Training`, becomes options beside those of the parameters after it."""
    shared = inspect.signature(Training, eval_str=True).parameters
    own = list(inspect.signature(verb, eval_str=True).parameters.values())[1:]

    def command(**given: Any) -> None:
        verb(Training(**{name: given.pop(name) for name in shared}), **given)

    options = [option.replace(kind=inspect.Parameter.KEYWORD_ONLY) for option in [*shared.values(), *own]]
    command.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    command.__annotations__ = {option.name: option.annotation for option in options}
    command.__doc__ = verb.__doc__
    return command


@train_app.command("medusa")
@_trains
def train_medusa(training: Training, heads: HeadCount = 3, full: FullHeads = True) -> None:
    """Train Medusa heads beside the frozen model; the same command goes on where an earlier one stopped."""
    from springtide.training.medusa import MedusaObjective

    kind: Literal["full", "shared"] = "full" if full else "shared"
    _train(training, lambda target: MedusaObjective(target, heads, lm_head=kind), heads=heads, full=full)


@train_app.command("medusa2")
@_trains
def train_medusa2(
    training: Training,
    heads: HeadCount = 3,
    full: FullHeads = True,
    distilled: Annotated[
        bool, typer.Option("--distilled", help="The model wrote the data, and is to write as before ('self': always).")
    ] = False,
    heads_weight: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Weight of the heads' loss in the model's: more makes it easier to guess, and less like itself "
            "(default: 0.2, or 0.01 with --distilled).",
        ),
    ] = None,
) -> None:
    """Train Medusa heads, then heads and model, which gets a LoRA adapter; goes on where an earlier one stopped."""
    from springtide.training.medusa import Medusa2Objective

    kind: Literal["full", "shared"] = "full" if full else "shared"
    kept = distilled or training.data == "self"
    _train(
        training,
        lambda target: Medusa2Objective(
            target, training.steps, heads, lm_head=kind, distilled=kept, heads_weight=heads_weight
        ),
        heads=heads,
        full=full,
        distilled=kept,
        heads_weight=heads_weight,
    )


@train_app.command("hidden-transfer")
@_trains
def train_hidden_transfer(
    training: Training,
    steps_ahead: Annotated[int, typer.Option(min=1, max=8, help="Tokens to guess ahead.")] = 3,
    layers: Annotated[
        str | None, typer.Option(help="Each step's transfer layer, as 6+8+10 (default: spread over the upper half).")
    ] = None,
) -> None:
    """Train maps between hidden states of the frozen model; goes on where an earlier command stopped."""
    from springtide.training.hidden_transfer import HiddenTransferObjective

    _train(
        training,
        lambda target: HiddenTransferObjective(target, _transfers(layers, steps_ahead, target.spec.num_layers)),
        layers=layers,
        steps_ahead=steps_ahead,
    )


@train_app.command("dependency-vit")
def train_dependency_vit(
    data: Images,
    out: Annotated[Path, typer.Option(help="Folder for the model, its checkpoint, log and curves.")],
    model: Annotated[
        str | None, typer.Option(help="pocket (the default), tiny or small, or a name that create_model takes.")
    ] = None,
    start: Annotated[
        Path | None, typer.Option("--from", help="Model folder to go on from, such as one of --objective masked.")
    ] = None,
    objective: Annotated[
        Literal["labels", "masked"],
        typer.Option(help="Learn from labels, or to paint patches that are hidden, which needs none."),
    ] = "labels",
    image_size: Annotated[
        int | None, typer.Option(min=1, max=4096, help="Pixels of a side (default: the model's).")
    ] = None,
    patch_size: Annotated[
        int | None, typer.Option(min=1, help="Pixels of a token's side (default: the model's).")
    ] = None,
    attention: Annotated[
        Literal["reversed", "forward"] | None,
        typer.Option(help="Who chooses: children, or parents as in a plain ViT, a control (default: reversed)."),
    ] = None,
    no_head_selector: Annotated[
        bool, typer.Option("--no-head-selector", help="Control: tokens send by all heads alike.")
    ] = False,
    no_controller: Annotated[bool, typer.Option("--no-controller", help="Control: tokens never send less.")] = False,
    keep: Annotated[
        float,
        typer.Option(help="Share of the tokens that is left at the end; trained so, a model does well with more."),
    ] = 1.0,
    prune_by: Annotated[
        Literal["controller", "received", "norm", "random"] | None,
        typer.Option(help="What tokens are kept for (default: the first of these that the model has)."),
    ] = None,
    steps: Annotated[int, typer.Option(min=0, help="Steps of optimization; 0 makes an untrained control.")] = 2000,
    batch: Annotated[int, typer.Option(min=1, help="Images in a step.")] = 64,
    lr: Annotated[float, typer.Option(min=0.0, help="Highest learning rate, of matrices; others have a fifth.")] = 5e-3,
    seed: Annotated[
        int, typer.Option(min=0, max=LAST_SEED, help="Seed of initial weights, of the data and of what is drawn.")
    ] = 0,
    json_file: Json = None,
    device: Device = None,
) -> None:
    """Train a DependencyViT, or a control of it; the same command goes on where an earlier one stopped."""
    import logging

    import torch

    from springtide.evaluation.report import check_target, write_json
    from springtide.loading import as_device
    from springtide.training.running import make_folder
    from springtide.training.trainer import Trainer, new_accelerator, train
    from springtide.vision.folder import load_config
    from springtide.vision.training import dependency_vit as vision

    check_target(json_file)
    if objective == "masked" and (keep != 1 or prune_by is not None):
        raise SpringtideError("--objective masked keeps all tokens; leave out --keep and --prune-by.")
    shape = {"image_size": image_size, "patch_size": patch_size, "attention": attention}
    shape |= {"head_selector": False} if no_head_selector else {}
    shape |= {"controller": False} if no_controller else {}
    own = {name: value for name, value in shape.items() if value is not None}
    if start is not None and (own or model is not None):
        raise SpringtideError(
            "The model in --from has its sizes and parts already; leave out the options that set them."
        )
    _quiet_transformers()
    place = as_device(device)
    accelerator = new_accelerator(place)
    config = vision.new_config(model or "pocket", **own) if start is None else load_config(start)
    images = vision.find_data(data, config.image_size)
    held_out = images.held_out(vision.HELD_OUT)  # read now, lest a damaged file be met after hours of training
    origin = start and str(start)
    record = {
        "objective": objective,
        "from": origin,
        "data": data,
        "steps": steps,
        "batch": batch,
        "lr": lr,
        "seed": seed,
    }
    config = vision.adapted(config, images.classes, keep, prune_by, record)
    make_folder(out)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.manual_seed(seed)  # initial weights are drawn from it
    learner = vision.new_objective(objective, config, start)
    learner.model.to(accelerator.device if device is None else place)
    with _resumable(out):
        options = {"--from": origin, **vision.identity(config)}
        trainer = Trainer(
            learner, vision.Ahead(images), out, steps=steps, batch=batch, lr=lr, seed=seed, options=options
        )
        train(trainer)
        if not accelerator.is_main_process:
            return
        result = {"objective": objective, **trainer.finish(*held_out)}
    if json_file:
        write_json(json_file, result)
    found = "" if result["accuracy"] is None else f", which names {result['accuracy']:.1%} of images held out rightly"
    print(f"Saved the model in {out}{found}.")


@train_app.command("captioner")
def train_captioner(
    out: Annotated[Path, typer.Option(help="Folder for the captioner, its checkpoint, log and curves.")],
    start: Annotated[
        Path | None, typer.Option("--from", help="DependencyViT's folder to begin with (default: random weights).")
    ] = None,
    layers: Annotated[int, typer.Option(min=1, help="Layers of the language model.")] = 4,
    steps: Annotated[int, typer.Option(min=1, help="Steps of optimization.")] = 2800,
    batch: Annotated[int, typer.Option(min=1, help="Scenes in a step.")] = 64,
    lr: Annotated[float, typer.Option(min=0.0, help="Highest learning rate, of matrices; others have a fifth.")] = 5e-3,
    seed: Annotated[int, typer.Option(min=0, max=LAST_SEED, help="Seed of initial weights and of the scenes.")] = 0,
    json_file: Json = None,
    device: Device = None,
) -> None:
    """Train a captioner of synthetic scenes end to end; the same command goes on where an earlier one stopped."""
    import logging

    import torch

    from springtide.evaluation.report import check_target, write_json
    from springtide.loading import as_device
    from springtide.training.running import make_folder
    from springtide.training.trainer import Trainer, new_accelerator, train
    from springtide.vision.scenes import Scenes
    from springtide.vision.training.captioner import CaptionerObjective, Exchanges, new_tokenizer, starting_vit

    check_target(json_file)
    _quiet_transformers()
    place = as_device(device)
    accelerator = new_accelerator(place)
    torch.manual_seed(seed)  # initial weights are drawn from it
    vit = starting_vit(start).to(accelerator.device if device is None else place)
    data = Exchanges(new_tokenizer(), Scenes(vit.config.image_size))
    objective = CaptionerObjective(vit, data, layers)
    make_folder(out)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = {"--from": start and str(start), "--layers": layers}
    with _resumable(out):
        trainer = Trainer(objective, data, out, steps=steps, batch=batch, lr=lr, seed=seed, options=options)
        train(trainer)
        if not accelerator.is_main_process:
            return
        result = trainer.finish(*data.held_out())
    if json_file:
        write_json(json_file, result)
    print(f"Saved the captioner; ask it with springtide see IMAGE --model {out}")


@sweep_app.command("hidden-transfer")
def sweep_hidden_transfer(
    data: Annotated[Path, typer.Option(help="What to train on: as for train; best what the model wrote (distill).")],
    held: Annotated[Path | None, typer.Option(help="What to measure on (default: some of the data, held out).")] = None,
    model: Model = "pocket",
    layers: Annotated[str | None, typer.Option(help="Comma list of layers (default: eight at most, evenly).")] = None,
    steps_ahead: Annotated[int, typer.Option(min=1, max=8, help="Tokens to guess ahead.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Steps of optimization.")] = 150,
    batch: Annotated[int, typer.Option(min=1, help="Windows in a step.")] = 4,
    length: Annotated[int, typer.Option(help="Tokens in a window.")] = 256,
    json_file: Json = None,
    plot: Plot = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Train Hidden Transfer briefly at each of some layers and measure how often its guesses are right."""
    from springtide.evaluation.report import check_target, plot_lines, print_table, write_json
    from springtide.training.hidden_transfer import sweep
    from springtide.training.windows import training_windows

    check_target(json_file, plot)
    engine = _load(model, device, dtype)
    spec = engine.stack.spec
    last = spec.num_layers - 1
    places = sorted(_numbers(layers, "--layers") if layers else range(last, 0, -math.ceil(last / 8)))
    if not places or places[-1] > last:
        raise SpringtideError(f"--layers must name layers from 1 to {last}, which is the model's last.")
    windows, rest = training_windows(data, engine, length)
    if held is not None:
        rest, _ = training_windows(held, engine, length)
    training = sweep(engine.stack, places, windows, rest.tokens, steps=steps, batch=batch, ahead=steps_ahead)
    found = _last(training, steps + len(places), "steps")
    if json_file:
        write_json(json_file, [asdict(row) for row in found])
    print_table([{"layer": x.layer, "step": x.step, **{f"top-{n}": x.top(n) for n in (1, 2, 3, 4, 5)}} for x in found])
    if plot:
        lines = [
            (f"step {step}, top-{n}", [row for row in found if row.step == step], n)
            for n in (1, 5)
            for step in range(1, steps_ahead + 1)
        ]
        series = {name: ([row.layer for row in rows], [row.top(n) for row in rows]) for name, rows, n in lines}
        plot_lines(plot, series, x="layer of all transfers", y="accuracy")


@app.command()
def distill(
    data: Annotated[Path, typer.Option(help="Text file, folder of .txt files, or .jsonl file (text or messages).")],
    out: Annotated[Path, typer.Option(help="File for the lines, .jsonl; lines that are there are kept.")],
    model: Model = "pocket",
    prompts: Annotated[int, typer.Option(min=1, help="Prompts to continue.")] = 512,
    length: Annotated[int, typer.Option(min=1, help="Most tokens of a prompt.")] = 128,
    facts: Annotated[float, typer.Option(help="Share of prompts that ask for facts hidden in them.")] = 0.0,
    hold_out: Annotated[
        list[str] | None, typer.Option(help="File name in the folder to leave out; may be repeated.")
    ] = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    batch: Annotated[int, typer.Option(min=1, help="Texts that are written at once.")] = 16,
    policy: PolicyText = "dense",
    budget: Budget = None,
    seed: Annotated[int, typer.Option(help="Seed of prompts and sampling.")] = 0,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Have the model continue excerpts of texts, for its drafter to learn from; run again, it adds what is missing."""
    from springtide.evaluation.report import check_target
    from springtide.rows.sampling import Sampling
    from springtide.training.distill import Prompts
    from springtide.training.distill import distill as run
    from springtide.training.windows import read_documents

    check_target(out)
    sampling, chosen = Sampling(max_tokens, temperature, seed=seed), _policy(policy, budget)
    documents, _ = read_documents(data, hold_out or ())
    source = Prompts(_load(model, device, dtype, policy=chosen), documents, length, facts, seed)
    with _resumable(out):
        written = run(source, out, prompts, sampling, batch)
    print(f"'{out}' holds {written.texts} texts of {written.tokens} tokens, of which the model wrote {written.own}.")


@eval_app.command()
def needle(
    model: Model = "pocket",
    length: Annotated[str, typer.Option(help="Comma list of context lengths, tokens.")] = "4096",
    trials: Annotated[
        int, typer.Option(min=1, help="Contexts of each length and task, each with 2 or 5 questions.")
    ] = 50,
    task: Annotated[
        str, typer.Option(help="Comma list of tasks: single, multikey, multivalue, tracking, quote.")
    ] = "single",
    policy: Policies = "dense,tidal",
    budget: Budgets = None,
    text: Text = None,
    chat: Chat = None,
    distractors: Annotated[int, typer.Option(help="More facts in the context, which nobody asks about.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of facts and places.")] = 0,
    json_file: Json = None,
    plot: Plot = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Answers about what is hidden in a book: exact match, and divergence from dense predictions."""
    from springtide.evaluation.needle import Haystack, table
    from springtide.evaluation.needle import needle as run
    from springtide.evaluation.report import check_target, plot_lines, print_table, write_json
    from springtide.evaluation.tasks import parse_tasks

    check_target(json_file, plot)
    lengths, wanted, book = _numbers(length, "--length"), _policies(policy, budget), _text(text)
    tasks = parse_tasks(task)
    engine = _load(model, device, dtype)
    policies = _resolved(engine, wanted)
    haystack = Haystack(engine.tokenizer, book, seed, distractors, _chats(engine, chat))
    steps, total = run(engine, haystack, tasks, policies, lengths, trials), len(lengths) * len(tasks) * trials
    cells = [cell for cell in _progress(steps, total, "needle") if cell]
    if json_file:
        write_json(json_file, [asdict(cell) for cell in cells])
    print_table(table(cells))
    if plot:
        rows = [asdict(cell) for cell in cells if cell.depth is None]
        for row in rows if len(tasks) > 1 else ():
            row["policy"] += f", {row['task']}"
        plot_lines(
            plot,
            _series(rows, "budget", "exact_match", lengths),
            x="budget (tokens per KV head)",
            y="exact match",
            log_x=True,
        )


@eval_app.command()
def ppl(
    model: Model = "pocket",
    length: Annotated[int, typer.Option(help="Tokens in a window; its second half is scored.")] = 4096,
    windows: Annotated[int, typer.Option(min=1, help="Windows, spread over the text.")] = 4,
    policy: Policies = "dense,tidal",
    budget: Budgets = None,
    text: Text = None,
    json_file: Json = None,
    plot: Plot = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Perplexity of a text, teacher-forced through the decode path, and KL divergence from dense predictions."""
    from springtide.evaluation.perplexity import perplexity
    from springtide.evaluation.report import check_target, plot_lines, print_table, write_json

    check_target(json_file, plot)
    wanted, book = _policies(policy, budget), _text(text)
    if plot and "dense" not in [policy.name for policy in wanted]:
        raise SpringtideError("--plot shows the divergence from dense predictions; add dense to --policy.")
    engine = _load(model, device, dtype)
    policies = _resolved(engine, wanted)
    tokens = engine.encode(book)
    found = _last(perplexity(engine, tokens, policies, length, windows), windows * (length - length // 2), "perplexity")
    rows = [asdict(row) for row in found]
    if json_file:
        write_json(json_file, rows)
    curves = [row | {"tokens": at, "kl": kl} for row in rows for at, kl in row.pop("kl_curve") or ()]
    print_table(rows)
    if plot:
        plot_lines(plot, _series(curves, "tokens", "kl"), x="decoded tokens", y="KL to dense (nats a token)")


@eval_app.command()
def recall(
    model: Model = "pocket",
    length: Annotated[int, typer.Option(help="Context length, tokens.")] = 4096,
    trials: Annotated[int, typer.Option(min=1, help="Contexts.")] = 4,
    policy: Policies = "tidal,quest,streaming,oracle",
    budget: Budgets = None,
    text: Text = None,
    json_file: Json = None,
    plot: Plot = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Attention mass and true top tokens that each sparse layer still reads while questions are answered."""
    from springtide.evaluation.needle import Haystack
    from springtide.evaluation.recall import recall as run
    from springtide.evaluation.report import check_target, plot_lines, print_table, write_json

    check_target(json_file, plot)
    wanted, book = _policies(policy, budget), _text(text)
    engine = _load(model, device, dtype)
    policies = _resolved(engine, wanted)
    haystack = Haystack(engine.tokenizer, book)
    rows = [asdict(row) for row in _last(run(engine, haystack, policies, length, trials), trials, "recall")]
    if json_file:
        write_json(json_file, rows)
    print_table([{name: value for name, value in row.items() if name != "mass_by_head"} for row in rows])
    if plot:
        plot_lines(plot, _series(rows, "layer", "mass"), x="layer", y="attention mass kept")


@eval_app.command("drafts")
def eval_drafts(
    model: Model = "pocket",
    draft: Annotated[str, typer.Option(help="Comma list of drafters, see generate --draft.")] = "lookup",
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 text file, or a folder of .txt files (default: the bundled excerpt).")
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts that are cut from the text.")] = 200,
    recall: Annotated[int, typer.Option(min=0, help="Prompts that ask for facts hidden in the text, besides.")] = 0,
    length: Annotated[str, typer.Option(help="Comma list of prompt lengths, tokens, which take turns.")] = "1024,2048",
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens to decode after each prompt.")] = 128,
    temperature: Annotated[str, typer.Option(help="Comma list of temperatures.")] = "0",
    policy: Policies = "dense",
    budget: Budgets = None,
    adaptive: Annotated[
        bool, typer.Option("--adaptive", help="Leave out drafts while they do not pay, as generate does.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the places in the text.")] = 0,
    json_file: Json = None,
    plot: Plot = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Drafters against the same engine without one: acceptance, speed, and whether the output is the same."""
    from springtide.drafting import find_adapter
    from springtide.evaluation import drafts
    from springtide.evaluation.report import check_target, write_json
    from springtide.loading import find_model

    check_target(json_file, plot)
    names = list(dict.fromkeys(filter(None, (name.strip() for name in draft.split(",")))))
    if not names:
        raise SpringtideError("--draft names no drafter; give at least one, such as lookup.")
    lengths, temperatures, wanted = _numbers(length, "--length"), _temperatures(temperature), _policies(policy, budget)
    texts, folder = _texts(text), find_model(model)
    own = [name for name in names if find_adapter(name, folder) is not None]  # these change the model
    engine = _load(model, device, dtype)
    changed = {name: _load(model, device, dtype, draft=name) for name in own}
    contenders = drafts.contenders(engine, changed, names, _resolved(engine, wanted), adaptive)
    cutting = drafts.passages(engine.tokenizer, texts, lengths, prompts, recall, seed)
    passages = _last(cutting, len(texts), "texts")
    found = _last(drafts.drafts(contenders, passages, temperatures, max_tokens), drafts.steps(passages), "prompts")
    if json_file:
        write_json(json_file, [asdict(row) for row in found])
    drafts.show(found)
    if plot:
        drafts.plot(plot, found)


@eval_app.command("captioner")
def eval_captioner(
    model: Annotated[str, typer.Option(help="Captioner's folder, or 'pocket' for the bundled one.")] = "pocket",
    keep: Annotated[str, typer.Option(help="Comma list of shares of the image's tokens to keep.")] = "1,0.36",
    policy: Policies = "dense",
    images: Annotated[int, typer.Option(min=1, help="Scenes to ask about, which no training has seen.")] = 200,
    json_file: Json = None,
    device: Device = None,
) -> None:
    """Right answers about scenes with all image tokens and with some, and what leaving tokens out saves."""
    from springtide.evaluation.report import check_target, print_table, write_json
    from springtide.vision.captioner import Captioner
    from springtide.vision.evaluation import captioner as evaluation
    from springtide.vision.scenes import Scenes

    check_target(json_file)
    shares, policies = _decimals(keep, "--keep"), _policies(policy, None)
    _quiet_transformers()
    captioner = Captioner.load(model, device=device)
    scenes = Scenes(captioner.vit.config.image_size).held_out_scenes(images)
    steps = evaluation.evaluate(captioner, scenes, shares, policies)
    rows = list(_progress(steps, len(shares) * len(policies), "asking"))
    if json_file:
        write_json(json_file, rows)
    print_table([{name: row[name] for name in evaluation.SHOWN} for row in rows])


@eval_app.command("dependency-vit")
def eval_dependency_vit(
    model: Annotated[
        str, typer.Option(help="Comma list of folders that train dependency-vit wrote, or 'pocket', the bundled one.")
    ] = "pocket",
    data: Images = "scenes",
    images: Annotated[int, typer.Option(min=1, help="Images held out to measure on, at most.")] = 1000,
    costs: Annotated[bool, typer.Option(help="Measure operations, memory and time, too.")] = True,
    json_file: Json = None,
    plot: Plot = None,
    device: Device = None,
) -> None:
    """Accuracy, pruning and cost of DependencyViTs; on scenes saliency and parts too. Seeds of a model go together."""
    from springtide.evaluation.report import check_target, write_json
    from springtide.loading import as_device
    from springtide.vision.evaluation import dependency_vit as vision
    from springtide.vision.folder import find_vit, load_config
    from springtide.vision.training.dependency_vit import find_data

    check_target(json_file, plot)
    folders = list(dict.fromkeys(find_vit(name.strip()) for name in model.split(",") if name.strip()))
    if not folders:
        raise SpringtideError("--model names no folder; give at least one.")
    _quiet_transformers()
    configs = [load_config(folder) for folder in folders]
    source = find_data(data, configs[0].image_size)
    measured = vision.evaluate(folders, source, images, as_device(device), costs)
    found = _last(measured, vision.steps(folders, images, costs), "measuring")
    if json_file:
        write_json(json_file, [asdict(row) for row in found])
    vision.show(found)
    if plot:
        vision.plot(plot, found)


@bench_app.command("decode")
def bench_decode(
    model: BenchModel = None,
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
    from springtide.benchmarks import decode
    from springtide.benchmarks.contenders import check_context
    from springtide.evaluation.report import check_target, plot_lines, write_json

    check_target(json_file, plot)
    contexts, wanted, names = _numbers(context, "--context"), _policies(policy, budget), _peer_names(against)
    length = max(contexts) + steps + 1  # the first token after the prompt is not timed
    engine = _bench_engine(model, shape, length, threads, device, dtype)
    check_context(engine, contexts, steps + 1)
    policies = _resolved(engine, wanted)
    peers = _peers(names, engine, model, shape, length, cache)
    total = decode.steps_of(len(contexts), len(policies) + len(peers), steps)
    found = _last(decode.decode(engine, policies, peers, contexts, steps, fill), total, "decoding")
    rows = [asdict(row) for row in found]
    if json_file:
        write_json(json_file, rows)
    print(f"{rows[0]['dtype']}, {rows[0]['threads']} threads, read bandwidth {rows[0]['bandwidth']:.1f} GB/s")
    _print_bench(rows, context="context", ms_per_token="ms", floor_ms="floor", ratio_to_floor="x\nfloor")
    if plot:
        plot_lines(
            plot,
            _bench_series(rows, "context", "ms_per_token")
            | _bench_series(rows, "context", "floor_ms", of="floor of ", springtide_only=True),
            x="context (tokens)",
            y="ms a token",
            log_x=True,
        )


@bench_app.command("prefill")
def bench_prefill(
    model: BenchModel = None,
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
    from springtide.benchmarks import prefill
    from springtide.benchmarks.contenders import check_context
    from springtide.evaluation.report import check_target, plot_lines, write_json

    check_target(json_file, plot)
    contexts, wanted, names = _numbers(context, "--context"), _policies(policy, budget), _peer_names(against)
    length = max(contexts) + 1
    engine = _bench_engine(model, shape, length, threads, device, dtype)
    check_context(engine, contexts, 1)
    policies = _resolved(engine, wanted)
    peers = _peers(names, engine, model, shape, length, cache)
    total = prefill.steps_of(len(contexts), len(policies) + len(peers), repeats)
    found = _last(prefill.prefill(engine, policies, peers, contexts, repeats), total, "reading")
    rows = [asdict(row) for row in found]
    if json_file:
        write_json(json_file, rows)
    print(f"{rows[0]['dtype']}, {rows[0]['threads']} threads")
    _print_bench(rows, context="context", seconds="seconds", tokens_per_second="tokens/s", tflops="TFLOP/s")
    if plot:
        series = _bench_series(rows, "context", "tokens_per_second")
        plot_lines(plot, series, x="context (tokens)", y="tokens read a second", log_x=True)


@bench_app.command("rows")
def bench_rows(
    model: BenchModel = None,
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
    counts, wanted = _numbers(rows, "--rows"), _policies(policy, budget)
    engine = _bench_engine(model, shape, context + max(counts), threads, device, dtype)
    check_context(engine, [context], max(counts))
    policies = _resolved(engine, wanted)
    total = benchmark.steps_of(len(policies), counts, passes)
    found = _last(benchmark.rows(engine, policies, counts, context, passes, fill), total, "passes")
    results = [asdict(row) for row in found]
    if json_file:
        write_json(json_file, results)
    print(f"{results[0]['dtype']}, {results[0]['threads']} threads")
    _print_bench(results, context="context", rows="rows", ms="ms", ratio_to_one_row="x one row")
    if plot:
        plot_lines(plot, _bench_series(results, "rows", "ratio_to_one_row"), x="rows", y="time over one row's")


@bench_app.command("kernels")
def bench_kernels(
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
    budgets = _numbers(budget, "--budget")
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
    rows = [asdict(row) for row in _last(benchmark.run(context, budgets, turns, kind), total, "turns")]
    if json_file:
        write_json(json_file, rows)
    first = rows[0]
    print(f"{first['dtype']}, {first['threads']} threads, read bandwidth {first['bandwidth']:.1f} GB/s")
    shown = ("kernel", "rows", "budget", "ms", "gb_per_second", "share_of_bandwidth", "ratio_to_torch")
    print_table([{name: row[name] for name in shown} for row in rows])


@app.command()
def policies() -> None:
    """The attention policies with their options."""
    from springtide.attention import POLICIES
    from springtide.options import options

    for name, policy in POLICIES.items():
        print(f"{name}: {(policy.__doc__ or '').splitlines()[0].replace('``', '')}")
        for option in options(policy):
            default = "" if option.default is None else f" (default: {option.default})"
            print(f"    {option.name:10} {option.metadata['help']}{default}")


@app.command()
def env() -> None:
    """Versions, device and kernels in use, for bug reports."""
    import platform

    import torch
    import transformers

    from springtide import __version__
    from springtide.kernels import native

    level = native.level()
    rows = {
        "springtide": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "platform": platform.platform(),
        "cpu": f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "kernels": f"C++ ({level.name})" if level else "torch",
    }
    for name, value in rows.items():
        print(f"{name:13} {value}")


def main() -> None:
    """Run the command line; a mistake of the user's is one sentence on standard error and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # for a terminal that cannot show every character
    warnings.showwarning = lambda message, *_: print(f"springtide: {message}", file=sys.stderr)
    try:
        app()
    except SpringtideError as error:
        print(f"springtide: {error}", file=sys.stderr)
        sys.exit(2)


# -- training -------------------------------------------------------------------------------------------------------


def _train(training: Training, build: Callable[[Stack], Objective], **own: Any) -> None:
    """Train, calibrate and save a drafter; ``build`` makes its objective, with its ``own`` options."""
    import logging

    import torch

    from springtide.evaluation.report import check_target, print_table, write_json
    from springtide.loading import as_device
    from springtide.training.running import make_folder
    from springtide.training.trainer import Trainer, new_accelerator, train
    from springtide.training.windows import training_windows

    check_target(training.json_file)
    if training.data != "self" and training.text is not None:
        raise SpringtideError("--text is what `--data self` begins with; give one of the two only.")
    accelerator = new_accelerator(as_device(training.device))
    engine = _load(training.model, training.device or str(accelerator.device), training.dtype)
    make_folder(training.out)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with _resumable(training.out):
        with accelerator.main_process_first():
            data = _self_written(engine, training) if training.data == "self" else Path(training.data)
        windows, held = training_windows(data, engine, training.length, training.hold_out or (), training.seed)
        torch.manual_seed(training.seed)  # initial weights are drawn from it
        options = {f"--{name.replace('_', '-')}": value for name, value in own.items()}
        objective = build(engine.stack)
        trainer = Trainer(
            objective,
            windows,
            training.out,
            steps=training.steps,
            batch=training.batch,
            lr=training.lr,
            seed=training.seed,
            options={"--model": engine.stack.fingerprint, **options},
        )
        train(trainer)
        if not accelerator.is_main_process:
            return
        result = {"drafter": objective.name, **trainer.finish(held.tokens)}
    if training.json_file:
        write_json(training.json_file, result)
    print_table(
        [
            {"tokens_ahead": step} | {f"top-{count}": sum(accuracy[:count]) for count in range(1, 6)}
            for step, accuracy in enumerate(result["accuracy"], start=1)
        ]
    )
    print(f"Saved the drafter; use it with --draft {training.out}")


def _self_written(engine: Engine, training: Training) -> Path:
    """The file of what the model writes after excerpts of the text."""
    from springtide.training.distill import SELF, SELF_FACTS, SELF_LENGTH, Prompts, distill
    from springtide.training.windows import read_documents

    documents, _ = read_documents(training.text or EXCERPT)
    path = training.out / "self.jsonl"
    prompts = Prompts(engine, documents, SELF_LENGTH, SELF_FACTS, training.seed)
    distill(prompts, path, training.prompts, replace(SELF, seed=training.seed), batch=16)
    return path


def _transfers(layers: str | None, steps: int, num_layers: int) -> list[int]:
    """A transfer layer for each step: those given, else spread over the upper half of the model."""
    if layers is None:
        return [num_layers // 2 + step * (num_layers - num_layers // 2) // steps for step in range(steps)]
    try:
        found = [int(layer) for layer in layers.split("+")]
    except ValueError:
        raise SpringtideError(f"--layers is '{layers}', but it must be whole numbers joined by +, as 6+8+10.") from None
    if found != sorted(found) or not 0 <= found[0] <= found[-1] < num_layers:
        raise SpringtideError(f"--layers is '{layers}', but it must ascend, from 0 to {num_layers - 1} at most.")
    return found


@contextmanager
def _resumable(path: Path) -> Iterator[None]:
    """Ctrl-C ends the command; what was done is in ``path``."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"\nStopped; the same command goes on from {path}.", file=sys.stderr)
        raise typer.Exit(130) from None


# -- inputs ---------------------------------------------------------------------------------------------------------


def _chats(engine: Engine, wanted: bool | None) -> bool:
    """Whether questions are asked in the model's chat template: as wanted, else if it has one, not for them alone."""
    from springtide.training.data import CHAT_TEMPLATE

    return engine.tokenizer.chat_template not in (None, CHAT_TEMPLATE) if wanted is None else wanted


def _quiet_transformers() -> None:
    """No messages and no progress bars of transformers, which come between ours."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _load(model: str, device: str | None, dtype: str | None, **options: Any) -> Engine:
    from transformers.utils import logging

    from springtide.loading import load

    logging.set_verbosity_error()
    return load(model, device=device, dtype=dtype, **options)


def _bench_engine(
    model: str | None, shape: str | None, length: int, threads: int | None, device: str | None, dtype: str | None
) -> Engine:
    """A model's engine, or one of a shape whose context holds ``length`` tokens, with ``threads`` set for torch."""
    if model is not None and shape is not None:
        raise SpringtideError("Give either --model or --shape, not both.")
    import torch
    from transformers.utils import logging

    from springtide.benchmarks.shapes import check_shape, random_engine
    from springtide.loading import as_device, as_dtype

    if shape is not None:
        check_shape(shape, length)
    if threads is not None:
        torch.set_num_threads(threads)
    if shape is None:
        return _load(model or "pocket", device, dtype)
    logging.set_verbosity_error()
    kind = as_dtype(dtype or "bfloat16")
    assert isinstance(kind, torch.dtype)
    return random_engine(shape, length, kind, as_device(device))


def _peer_names(text: str | None) -> list[str]:
    from springtide.benchmarks.peers import check_peers

    names = list(dict.fromkeys(name.strip() for name in text.split(","))) if text is not None else []
    check_peers(names)
    return names


def _peers(
    names: Sequence[str], engine: Engine, model: str | None, shape: str | None, length: int, folder: Path | None
) -> list[Peer]:
    import torch

    from springtide.benchmarks.contenders import dtype_name
    from springtide.benchmarks.peers import CACHE, Target, prepare, weights_name
    from springtide.loading import find_model

    loaded = engine.stack.model
    dtype = dtype_name(loaded)
    name = f"{shape}-{dtype}" if shape is not None else weights_name(find_model(model or "pocket"), dtype)
    return prepare(names, Target(loaded, name, length, torch.get_num_threads(), folder or CACHE))


def _policy(text: str, budget: str | None) -> Policy:
    from springtide.attention import parse_budget, parse_policy

    size = None if budget is None else parse_budget(budget)
    policy = parse_policy(text, size)
    _check_budgets([policy], size)
    return policy


def _policies(text: str, budgets: str | None) -> list[Policy]:
    """Every policy with every budget; those without a budget once."""
    from springtide.attention import parse_budget, parse_policy, split_policies

    sizes = [None] if budgets is None else [parse_budget(size) for size in budgets.split(",")]
    found = [parse_policy(name, size) for name in split_policies(text) for size in sizes]
    if not found:
        raise SpringtideError("--policy names no policy; give at least one, such as dense.")
    _check_budgets(found, *sizes)
    return found


def _check_budgets(policies: Sequence[Policy], *budgets: int | Share | None) -> None:
    """Raise SpringtideError for a --budget that no policy takes."""
    for budget in budgets:
        budgets_set = [policy.budget for policy in policies if hasattr(policy, "budget")]
        if budget is None or budget in budgets_set:
            continue
        if budgets_set:
            raise SpringtideError(
                f"--budget {budget} has no effect: --policy sets budget={budgets_set[0]}; give one only."
            )
        raise SpringtideError(
            f"--budget {budget} has no effect: --policy names no policy that has a budget; name one, such as tidal."
        )


def _resolved(engine: Engine, policies: Sequence[Policy]) -> list[Policy]:
    """The policies fitted to the model, each once; it is calibrated briefly if one of them needs that."""
    from springtide.loading import know_layers

    know_layers(engine, policies)
    return list(dict.fromkeys(engine.resolve(policy) for policy in policies))


def _numbers(text: str, option: str) -> list[int]:
    try:
        numbers = list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise SpringtideError(f"{option} is '{text}', but it must be whole numbers joined by commas.") from None
    if min(numbers) < 1:
        raise SpringtideError(f"{option} must be at least 1, not {min(numbers)}.")
    return numbers


def _decimals(text: str, option: str) -> list[float]:
    try:
        return list(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        raise SpringtideError(f"{option} is '{text}', but it must be numbers joined by commas.") from None


def _temperatures(text: str) -> list[float]:
    found = _decimals(text, "--temperature")
    if not all(temperature >= 0 for temperature in found):
        raise SpringtideError("--temperature must be 0 (greedy) or more.")
    return found


def _prompt(prompt: str | None, file: Path | None) -> str:
    if prompt is not None and file is not None:
        raise SpringtideError("Give the prompt either as an argument or with --prompt-file, not both.")
    if file is not None:
        text = _read(file)
    elif prompt not in (None, "-"):
        text = str(prompt)
    elif prompt is None and sys.stdin.isatty():
        raise SpringtideError("There is no prompt; give it as an argument, with --prompt-file, or on standard input.")
    else:
        text = _decoded(sys.stdin.buffer.read(), "Standard input")
    if not text:
        raise SpringtideError("The prompt is empty; give at least one character.")
    return text


def _read(file: Path) -> str:
    try:
        return _decoded(file.read_bytes(), f"'{file}'")
    except OSError as error:
        raise SpringtideError(f"'{file}' cannot be read ({error.strerror}); check the path.") from None


def _decoded(text: bytes, source: str) -> str:
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise SpringtideError(f"{source} is not UTF-8 text; convert it first.") from None


def _text(file: Path | None) -> str:
    text = _excerpt() if file is None else _read(file)
    if not text.strip():
        raise SpringtideError(f"'{file}' is empty; give a text.")
    return text


def _texts(path: Path | None) -> list[str]:
    """A text, or those of a folder."""
    if path is None or not path.is_dir():
        return [_text(path)]
    files = sorted(path.glob("*.txt"))
    if not files:
        raise SpringtideError(f"'{path}' holds no .txt file; give a folder with texts, or a text.")
    return [_text(file) for file in files]


def _excerpt() -> str:
    return EXCERPT.read_text(encoding="utf-8")


def _ask_user() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        return None
    except UnicodeDecodeError:
        raise SpringtideError("Standard input is not UTF-8 text; convert it first.") from None


# -- outputs --------------------------------------------------------------------------------------------------------


def _print_pieces(engine: Engine, sequence: Any, coloured: bool = False) -> None:
    """Run a sequence and print its text as it comes, with a progress bar while the prompt is read.

    ``coloured``: on a terminal, drafted text is green.
    """
    from tqdm import tqdm

    coloured = coloured and sys.stdout.isatty()
    painter = _Painter(engine, sequence) if coloured else None
    with tqdm(total=sequence.prefill_end, unit="tok", desc="reading", leave=False, disable=None, delay=2) as bar:
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


def _stats_line(stats: Any) -> str:
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


def _progress(steps: Iterator[T], total: int, what: str) -> Iterator[T]:
    """Pass ``steps`` on; each None among them moves a progress bar on a terminal."""
    from tqdm import tqdm

    with tqdm(total=total, desc=what, disable=None, delay=2) as bar:
        for item in steps:
            if item is None:
                bar.update()
            yield item


def _last(steps: Iterator[T | None], total: int, what: str) -> T:
    """The last of ``steps``, which is their result."""
    result: T | None = None
    for item in _progress(steps, total, what):
        result = item
    assert result is not None
    return result


def _series(
    rows: Sequence[dict[str, Any]], x: str, y: str, lengths: Sequence[int] = ()
) -> dict[str, tuple[list[float | None], list[float]]]:
    """Lines of ``y`` over ``x``, one for each policy (and length or budget, where there are several)."""
    budgets = {row["budget"] for row in rows if row["budget"] is not None}
    series: dict[str, tuple[list[float | None], list[float]]] = {}
    for row in rows:
        name = row["policy"]
        if len(lengths) > 1:
            name += f", {row['length']}"
        if x != "budget" and len(budgets) > 1 and row["budget"] is not None:
            name += f", budget {row['budget']}"
        xs, ys = series.setdefault(name, ([], []))
        xs.append(row[x])
        ys.append(row[y])
    return series


def _print_bench(rows: Sequence[dict[str, Any]], /, **columns: str) -> None:
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


def _bench_series(
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


def _plus(parts: Sequence[object]) -> str:
    return "+".join(map(str, parts)) or "-"
