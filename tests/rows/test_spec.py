"""What is read from a model's configuration."""

from __future__ import annotations

import pytest

from springtide.engine.engine import Engine
from springtide.rows.spec import ModelSpec
from tiny import random_tokens, tiny


@pytest.mark.parametrize(("window", "found"), [(511, 511), (512, None), (10**6, None)])
def test_a_window_that_holds_the_whole_context_is_none(window, found):
    assert ModelSpec.of(tiny("phi3", sliding_window=window).config).windows == (found,) * 4


def test_layers_with_such_a_window_may_select():
    """As those of Phi-3-mini-128k, whose window is twice its context."""
    engine = Engine(tiny("phi3", sliding_window=1024))
    prompt = random_tokens(40)
    expected = engine.generate(prompt, max_tokens=8).token_ids
    assert engine.using("tidal:budget=300,full=0,select=1").generate(prompt, max_tokens=8).token_ids == expected
