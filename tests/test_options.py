"""Values of options, from text and back."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from springtide.errors import SpringtideError
from springtide.options import KVHead, Share, Size, read, spelled


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (int, "12", 12),
        (float, "0.5", 0.5),
        (bool, "true", True),
        (bool, "false", False),
        (int | Share, "12", 12),
        (int | Share, "2.5%", Share(2.5)),
        (int | None, "none", None),
        (int | None, "3", 3),
        (Literal["max", "mean"], "mean", "mean"),
        (Literal[16, 32], "32", 32),
        (tuple[int, ...], "1", (1,)),
        (tuple[int, ...] | None, "1+2+3", (1, 2, 3)),
        (tuple[KVHead, ...] | None, "8.2+14.0", (KVHead(8, 2), KVHead(14, 0))),
        (tuple[Literal["a", "b"], ...], "a+b+a", ("a", "b", "a")),
        (Size, "100MB", 100_000_000),
        (Size | None, "1.5KiB", 1536),
    ],
)
def test_a_value_of_every_kind_is_read(kind, text, value):
    got = read(kind, text, "here")
    assert got == value and type(got) is (Size if isinstance(got, Size) else type(value))
    assert read(kind, spelled(got), "here") == value


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        (int, "a whole number"),
        (float, "a number"),
        (bool, "true or false"),
        (int | None, "a whole number"),
        (int | Share | None, "a whole number, or a share such as 5%"),
        (Literal["max", "mean"], "one of max, mean"),
        (tuple[int, ...], "whole numbers joined by +"),
        (tuple[KVHead, ...] | None, "heads as layer.head joined by +"),
        (Size, "a size such as 512MiB or 2GiB"),
    ],
)
@pytest.mark.parametrize("text", ["many", "1+", "1e999x", "nan", "inf", "True", "2 GB 3", "-1GB", "(1)", "%", "5%%"])
def test_anything_else_is_refused_in_a_sentence(kind, wanted, text):
    with pytest.raises(SpringtideError) as caught:
        read(kind, text, "tidal: budget")
    assert str(caught.value) == f"tidal: budget is '{text}', but it must be {wanted}."


@given(
    st.integers(0, 2**60) | st.builds(lambda n, unit: n * unit, st.integers(0, 999), st.sampled_from([2**20, 10**9]))
)
def test_sizes_are_spelled_as_they_are_read(size):
    assert Size.parse(str(Size(size))) == size or size > 2**53, "fp64 holds no more"


def test_sizes_are_spelled_in_the_largest_unit_that_fits():
    sizes = (2**31, 512 * 2**20, 100_000_000, 1000, 1001, 0)
    assert [str(Size(size)) for size in sizes] == ["2GiB", "512MiB", "100MB", "1kB", "1001B", "0B"]


def test_an_annotation_may_read_a_value():
    class Twice:
        def parse(self, text):
            return text * 2

    assert read(Annotated[Any, Twice()], "ab", "here") == "abab"
    assert read(Annotated[Any, Twice()] | None, "none", "here") is None
