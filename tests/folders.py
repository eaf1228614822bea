"""Model folders as users have them: a tiny random model with a small tokenizer."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from springtide.drafting.medusa import Heads, Medusa
from springtide.model.stack import Stack
from springtide.training.data import Corpus
from springtide.training.data import train_tokenizer as train
from tiny import tiny

VOCAB = 400
BOOK = (resources.files("springtide") / "data" / "excerpt.txt").read_text(encoding="utf-8")[:20000]
PROMPT = "The ship left the harbour"


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, with a chat template."""
    return train(Corpus({"book": BOOK}, ""), VOCAB)


@cache
def spaced_tokenizer() -> PreTrainedTokenizerFast:
    """Llama's kind: spaces are part of the words after them, and unknown characters fall back to bytes."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "▁ab", "ab", "."]
    vocab = {word: i for i, word in enumerate(words)}
    bpe = models.BPE(vocab, [("a", "b"), ("▁", "a"), ("▁", "ab")], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    backend = Tokenizer(bpe)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def save_model(folder: Path, name: str = "qwen3", **overrides: Any) -> Path:
    """Save a tiny model, which never ends a sequence by itself, and the tokenizer."""
    logging.disable_progress_bar()
    settings = {"vocab_size": VOCAB, "max_position_embeddings": 1024, **overrides}
    tiny(name, **settings).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    logging.enable_progress_bar()
    return folder


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the content of a JSON file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def save_drafter(folder: Path, model: Path, adapter: bool = False) -> Path:
    """Save fresh Medusa heads for a model folder; with an adapter, they are Medusa-2's."""
    target = AutoModelForCausalLM.from_pretrained(model)
    stack = Stack(target)
    heads = Heads.fresh(3, 1, stack.spec.hidden_size)
    Medusa(heads, stack.spec.vocab_size, base=stack.fingerprint).save(folder)
    if adapter:
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = get_peft_model(target, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
        adapted.save_pretrained(folder / "adapter")
    return folder
