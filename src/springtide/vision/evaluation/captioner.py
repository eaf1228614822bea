"""A captioner on held-out scenes: right answers, and what pruning image tokens saves, at several shares of them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from math import isqrt
from statistics import mean, median
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from springtide.attention.policy import Policy
from springtide.drafting.lookup import Lookup
from springtide.engine.engine import Engine
from springtide.engine.request import Request
from springtide.evaluation.report import labels
from springtide.rows.sampling import Sampling
from springtide.rows.segment import PromptEmbeds
from springtide.vision.captioner import Captioner
from springtide.vision.scenes import Question, SceneBatch, questions

GREEDY = Sampling(max_tokens=32)
TIMED = 20  # images of which the time to the first token is measured
LARGE = 1024  # tokens of those that are enlarged for it
TOGETHER = 64  # sequences in a batch
SHOWN = (
    "policy",
    "keep",
    "image_tokens",
    "foreground",
    "background",
    "caption",
    "prompt_tokens",
    "ttft_ms",
    "ttft_large_ms",
    "outputs_equal",
    "outputs",
)


def evaluate(
    captioner: Captioner, scenes: SceneBatch, keeps: Sequence[float], policies: Sequence[Policy]
) -> Iterator[dict[str, Any]]:
    """For each policy and share of the image tokens the documented fields of ``eval captioner --json``.

    Every question is answered twice from the same image tokens: without a drafter, and with lookup.
    """
    images = [scenes.images[i : i + 1] for i in range(len(scenes.images))]
    everything = [(i, question) for i in range(len(images)) for question in questions(scenes, i)]
    for policy, name in zip(policies, labels(policies), strict=True):
        plain = captioner.engine.using(policy)
        drafted = plain.drafting(Lookup())
        drafted.adaptive = False
        for keep in keeps:
            embeds = [captioner.embeds(image, keep) for image in images]
            found = _answers(captioner, plain, embeds, everything)
            again = _answers(captioner, drafted, embeds, everything)
            right = [(wanted, one.text == wanted.answer) for one, (_, wanted) in zip(found, everything, strict=True)]
            stats = [one.stats() for one in again]
            yield {
                "policy": name,
                "keep": keep,
                "image_tokens": len(embeds[0]),
                "images": len(images),
                **{
                    kind: mean(ok for question, ok in right if question.kind == kind)
                    for kind in ("foreground", "background", "caption")
                },
                "questions": {
                    text: mean(ok for question, ok in right if question.text == text)
                    for text in dict.fromkeys(question.text for question, _ in right)
                },
                "prompt_tokens": mean(one.prompt_tokens for one in stats),
                "prompt_kv_bytes": mean(one.output_start * _bytes_of_a_token(one) for one in found),
                "ttft_ms": median(_ttft(captioner, plain, image, keep) for image in images[:TIMED]),
                "ttft_large_ms": median(
                    _ttft(captioner, plain, _enlarged(captioner, image), keep) for image in images[:TIMED]
                ),
                "acceptance_length": mean(one.acceptance_length for one in stats if one.acceptance_length),
                "outputs_equal": sum(a.output == b.output for a, b in zip(found, again, strict=True)),
                "outputs": len(everything),
            }


def _answers(
    captioner: Captioner,
    engine: Engine,
    embeds: Sequence[PromptEmbeds],
    everything: Sequence[tuple[int, Question]],
) -> list[Request]:
    """To questions about the images of these numbers."""
    sequences = [captioner.start(embeds[image], question.text, GREEDY, engine) for image, question in everything]
    for start in range(0, len(sequences), TOGETHER):
        for _ in engine.run(sequences[start : start + TOGETHER]):
            pass
    return sequences


def _bytes_of_a_token(sequence: Request) -> int:
    """Of the cache, in all layers."""
    return sum(tensor.nbytes for layer in range(sequence.cache.layers) for tensor in sequence.cache.read(layer, 0, 1))


def _enlarged(captioner: Captioner, image: Tensor) -> Tensor:
    """An image of ``LARGE`` tokens, whose positions are interpolated; what is answered about it counts for nothing."""
    return F.interpolate(image, 2 * [isqrt(LARGE) * captioner.vit.config.patch_size])


def _ttft(captioner: Captioner, engine: Engine, image: Tensor, keep: float) -> float:
    """Milliseconds from an image to the first token of an answer."""
    began = time.perf_counter()
    embeds = captioner.embeds(image, keep)
    sequence = captioner.start(embeds, "describe the picture", Sampling(max_tokens=1), engine)
    for _ in engine.run([sequence]):
        pass
    return 1e3 * (time.perf_counter() - began)
