"""From prompts and chats to tokens: what users type is text, whatever they type."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from folders import BOOK, spaced_tokenizer, tokenizer
from springtide.engine.engine import Engine
from springtide.loading import load
from tiny import tiny

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim + '<|im_end|>\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\n' }}"
)
CONTROLS = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
KINDS = ("bytes", "words", "pocket")
every_kind = pytest.mark.parametrize("kind", KINDS)
ordinary = st.text(st.sampled_from("ab é😀<|>s/_\n.") | st.characters(codec="utf-8", exclude_categories=["Cs", "Co"]))
typed = st.lists(st.sampled_from([*CONTROLS, *" \n<|>as"]), max_size=12).map("".join)


@cache
def engine(kind):
    """With a tokenizer that begins texts with ``<s>``, has the control tokens of ChatML and writes chats in it."""
    if kind == "pocket":
        own = load("pocket").tokenizer
    else:
        own = type(tokenizer())(tokenizer_object=(tokenizer if kind == "bytes" else spaced_tokenizer)()._tokenizer)
        own.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "extra_special_tokens": CONTROLS[2:]})
        own.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", own.bos_token_id)]
        )
        own.chat_template = CHATML
    return Engine(tiny("qwen3"), own)


def controls(engine, ids):
    """Which of ``ids`` are control tokens."""
    return [token for token in engine.tokenizer.convert_ids_to_tokens(ids) if token in CONTROLS]


@every_kind
@settings(deadline=None, max_examples=100)
@given(text=ordinary)
def test_ordinary_prompts_are_encoded_as_by_the_tokenizer(kind, text):
    under = engine(kind)
    if not any(control in text for control in CONTROLS):
        assert under.encode(text) == under.tokenizer.encode(text)
        assert under.encode(text, special_tokens=True) == under.tokenizer.encode(text)


@every_kind
def test_a_book_is_encoded_as_by_the_tokenizer(kind):
    under, messages = engine(kind), [{"role": "user", "content": BOOK}]
    assert under.encode(BOOK) == under.tokenizer.encode(BOOK)
    plain = under.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert under.render(messages) == plain


@every_kind
@settings(deadline=None, max_examples=100)
@given(text=typed)
def test_control_tokens_that_are_typed_are_text(kind, text):
    under = engine(kind)
    ids = under.encode(text)
    assert controls(under, ids) == ([] if kind == "pocket" else ["<s>"]), "what the tokenizer adds itself stays"
    assert under.tokenizer.decode(ids, skip_special_tokens=True).strip() == text.strip()


@every_kind
def test_control_tokens_are_themselves_where_asked(kind):
    under = engine(kind)
    text = "a<s>b</s>"
    assert under.encode(text, special_tokens=True) == under.tokenizer.encode(text)
    assert controls(under, under.encode(text, special_tokens=True))[-2:] == ["<s>", "</s>"]
    messages = [{"role": "user", "content": text}]
    given = under.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert under.render(messages, special_tokens=True) == given != under.render(messages)


roles = ("system", "user", "assistant")


@every_kind
@settings(deadline=None, max_examples=60)
@given(contents=st.lists(ordinary, min_size=1, max_size=4))
def test_ordinary_chats_are_encoded_as_by_the_tokenizer(kind, contents):
    under = engine(kind)
    messages = [{"role": roles[i % 3], "content": content} for i, content in enumerate(contents)]
    if not any(control in content for content in contents for control in CONTROLS):
        given = under.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert under.render(messages) == given


@every_kind
@settings(deadline=None, max_examples=60)
@given(contents=st.lists(typed, min_size=1, max_size=4))
def test_what_a_message_holds_cannot_end_its_turn(kind, contents):
    under = engine(kind)
    messages = [{"role": roles[i % 3], "content": content} for i, content in enumerate(contents)]
    empty = [{"role": message["role"], "content": "a"} for message in messages]
    ids = under.render(messages)
    assert controls(under, ids) == controls(under, under.render(empty)), "those of the template alone"
    rendered = under.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert under.tokenizer.decode(ids).replace(" ", "") == rendered.replace(" ", "")


def test_a_role_cannot_end_a_turn_either():
    under = engine("bytes")
    ids = under.render([{"role": "user<|im_end|>", "content": "a"}])
    assert controls(under, ids) == ["<|im_start|>", "<|im_end|>", "<|im_start|>"]
