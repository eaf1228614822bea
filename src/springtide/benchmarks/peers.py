"""Other projects that decode the same weights, each behind the same few verbs. None is a dependency of Springtide."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel

from springtide.benchmarks.contenders import Contender
from springtide.benchmarks.exports import check_exported, once, write_gguf, write_openvino
from springtide.engine.request import Request
from springtide.errors import SpringtideError
from springtide.model.source import Source
from springtide.places import cache_home


@dataclass(frozen=True)
class Target:
    """The model that all decode.

    ``name`` tells its weights from other models'; exports lie in ``folder / name``. ``length``: most tokens of a
    sequence. ``threads``: that a peer may use.
    """

    model: PreTrainedModel
    name: str
    length: int
    threads: int
    folder: Path = field(default_factory=lambda: cache_home() / "peers")


class Peer(Contender):
    """What peers have in common. ``__init__`` exports the weights where that is needed, or raises SpringtideError."""

    packages: ClassVar[dict[str, str]] = {}
    """Modules that are imported, and what to install for them: those of OpenVINO must agree in their version."""
    policy = None
    budget = None

    @abstractmethod
    def __init__(self, target: Target) -> None: ...

    def resume(self, reader: Request) -> int:
        return self.read(reader.tokens[: reader.cache.length])

    def kv_bytes(self) -> None:
        return None


class Transformers(Peer):
    """The model itself, with scaled_dot_product_attention and a DynamicCache."""

    name = "transformers"

    def __init__(self, target: Target) -> None:
        self.model = target.model

    def read(self, tokens: list[int]) -> int:
        self.cache = DynamicCache(config=self.model.config)
        return self._run(tokens)

    def resume(self, reader: Request) -> int:
        self.cache = DynamicCache(config=self.model.config)
        last = reader.cache.length - 1
        for layer in range(self.model.config.num_hidden_layers if last else 0):
            keys, values = reader.cache.read(layer, 0, last)
            self.cache.update(keys[None], values[None], layer)
        return self._run(reader.tokens[last : last + 1])

    def step(self) -> int:
        return self._run([self.token])

    def forget(self) -> None:
        self.cache = None

    @torch.inference_mode()
    def _run(self, tokens: list[int]) -> int:
        ids = torch.tensor([tokens], device=self.model.device)
        output = self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.token = int(output.logits[0, -1].argmax())
        return self.token


class OpenVino(Peer):
    """OpenVINO GenAI's paged pipeline, with weights, cache and arithmetic in the model's dtype."""

    name = "openvino"
    packages: ClassVar = {"openvino": "openvino==2026.4.0", "openvino_genai": "openvino-genai==2026.4.0.0"}

    def __init__(self, target: Target) -> None:
        _on_cpu(target, self.name)
        check_exported(target.model, self.name)
        if target.threads == 1 and target.model.dtype == torch.bfloat16:
            raise SpringtideError(
                "--against openvino crashes on one thread in bfloat16 (OpenVINO 2026.4); use more --threads."
            )
        folder = once(target.folder / target.name / "openvino", partial(write_openvino, target.model))
        self.genai: Any = import_module("openvino_genai")
        scheduler = self.genai.SchedulerConfig()
        scheduler.num_kv_blocks = target.length // 32 + 8  # blocks of 32 tokens, with some to spare
        scheduler.max_num_batched_tokens = target.length  # a prompt in one pass, as in its LLMPipeline
        # By default the cache would be quantised to 8 bits.
        precision = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}[target.model.dtype]
        self.pipeline = self.genai.ContinuousBatchingPipeline(
            str(folder),
            scheduler,
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": precision,
                "KV_CACHE_PRECISION": precision,
                "INFERENCE_NUM_THREADS": target.threads,
            },
        )
        self.options = self.genai.GenerationConfig()
        self.options.max_new_tokens = target.length
        self.options.ignore_eos = True
        self.options.eos_token_id = target.model.config.vocab_size  # it wants one; this one never comes
        self.options.stop_token_ids = {target.model.config.vocab_size}
        self.handle: Any = None
        self.requests = 0

    def read(self, tokens: list[int]) -> int:
        prompt = import_module("openvino").Tensor(torch.tensor([tokens]).numpy())
        self.handle = self.pipeline.add_request(self.requests, prompt, self.options)
        self.requests += 1
        return self.step()

    def step(self) -> int:
        while True:
            self.pipeline.step()
            if self.handle.can_read():
                (output,) = self.handle.read().values()
                return int(output.generated_ids[-1])

    def forget(self) -> None:
        if self.handle is not None:
            self.handle.cancel()
            self.pipeline.step()  # which frees the blocks
            self.handle = None


class LlamaCpp(Peer):
    """llama.cpp by way of llama-cpp-python from a GGUF file in the model's dtype; its cache is float16, as usual."""

    name = "llama.cpp"
    packages: ClassVar = {"llama_cpp": "llama-cpp-python", "gguf": "gguf"}

    def __init__(self, target: Target) -> None:
        _on_cpu(target, self.name)
        check_exported(target.model, self.name)
        path = once(target.folder / target.name / "model.gguf", partial(write_gguf, target.model))
        self.library: Any = import_module("llama_cpp")
        self.llama = self.library.Llama(
            str(path),
            n_ctx=target.length,
            n_threads=target.threads,
            n_threads_batch=target.threads,
            verbose=False,
        )
        self.vocab = target.model.config.vocab_size

    def read(self, tokens: list[int]) -> int:
        return self._run(tokens)

    def step(self) -> int:
        return self._run([self.token])

    def forget(self) -> None:
        self.llama.reset()

    def _run(self, tokens: list[int]) -> int:
        self.llama.eval(tokens)
        logits = self.library.llama_get_logits_ith(self.llama.ctx, -1)
        self.token = int(np.ctypeslib.as_array(logits, (self.vocab,)).argmax())
        return self.token


PEERS: dict[str, type[Peer]] = {peer.name: peer for peer in (Transformers, OpenVino, LlamaCpp)}


def check_peers(names: Sequence[str]) -> None:
    """Raise SpringtideError for a name that is no peer's, or a peer that is not installed or does not work."""
    for name in names:
        if name not in PEERS:
            raise SpringtideError(f"Unknown peer '{name}': choose among {', '.join(PEERS)}.")
        packages = PEERS[name].packages
        try:
            for module in packages:
                import_module(module)
        except ImportError as error:
            raise SpringtideError(
                f"--against {name} needs other packages ({error}); run `pip install {' '.join(packages.values())}`."
            ) from None


def prepare(names: Sequence[str], target: Target) -> list[Peer]:
    """The peers by name, ready to read; raises SpringtideError for a model that one of them does not take."""
    return [PEERS[name](target) for name in tqdm(names, desc="preparing peers", leave=False, disable=None, delay=2)]


def weights_name(source: Source, dtype: str) -> str:
    """A name for the weights of a model, another one when the files change."""
    facts = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in source.files]
    return f"{source.path.resolve().name}-{dtype}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:12]}"


def _on_cpu(target: Target, name: str) -> None:
    if target.model.device.type != "cpu":
        raise SpringtideError(f"--against {name} runs on the CPU; add --device cpu, or leave it out.")
