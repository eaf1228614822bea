"""`springtide env` as a user meets it."""

from __future__ import annotations

import torch

import springtide


def test_env(run):
    result = run("env")
    assert (result.code, result.err) == (0, "")
    assert f"torch         {torch.__version__}" in result.out
    assert springtide.__version__ in result.out
