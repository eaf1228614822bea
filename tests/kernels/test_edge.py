"""What the C++ kernels must not trust: each wrong argument is refused with a sentence, before memory is touched."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from springtide.kernels import PAGE, native

pytestmark = pytest.mark.skipif(not native.levels(), reason="the C++ kernels were not built")

ROWS, HEADS, KV_HEADS, LENGTH, HEAD_DIM, BUDGET = 3, 4, 2, 200, 32, 5


@pytest.fixture
def level():
    return native._cpu.level(native.levels()[0])


def ones(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype)


def paged(shape=(4, 2, KV_HEADS, PAGE, HEAD_DIM), dtype=torch.float32):
    return native._cpu.Pages(ones(*shape, dtype=dtype))


def request(**changes):
    right = {
        "table": [3, 1],
        "prefix": LENGTH - ROWS,
        "length": LENGTH,
        "positions": torch.arange(LENGTH - ROWS, LENGTH, dtype=torch.int32),
        "low": torch.zeros(ROWS, dtype=torch.int32),
        "tail": ones(ROWS, ROWS, dtype=torch.bool),
    }
    return native._cpu.Request(**right | changes)


def reads(*more, **changes):
    return native._cpu.Reads([request(**changes), *more])


def attend(**changes):
    """Arguments of a dense call that is right."""
    right = {
        "q": torch.randn(ROWS, HEADS, HEAD_DIM),
        "pages": paged(),
        "reads": reads(),
        "out": torch.empty(ROWS, HEADS, HEAD_DIM),
        "lse": torch.empty(ROWS, HEADS),
        "scale": 0.2,
        "softcap": 0.0,
        "threads": 1,
    }
    return right | changes


def gather(**changes):
    """Arguments of a gathered call that is right."""
    right = attend(
        index=torch.arange(BUDGET).expand(ROWS, KV_HEADS, -1).contiguous(),
        mask=ones(ROWS, KV_HEADS, BUDGET, dtype=torch.bool),
        mean_k=torch.randn(KV_HEADS, 2, HEAD_DIM),
        mean_v=torch.randn(KV_HEADS, 2, HEAD_DIM),
        weight=64.0,
    )
    return right | changes


def select(**changes):
    right = {
        "q": torch.randn(ROWS, HEADS, HEAD_DIM),
        "pages": paged(),
        "reads": reads(),
        "index": torch.empty(ROWS, KV_HEADS, BUDGET, dtype=torch.int64),
        "sinks": 1,
        "recent": 1,
        "scale": 0.2,
        "softcap": 0.0,
        "largest": True,
        "joined": True,
        "threads": 1,
    }
    return right | changes


def linear(**changes):
    right = {
        "weight": torch.randn(16, 32),
        "bias": torch.randn(16),
        "x": torch.randn(ROWS, 32),
        "out": torch.empty(ROWS, 16),
        "threads": 1,
    }
    return right | changes


def named(at):
    """An index with one slot at ``at``."""
    index = torch.zeros(ROWS, KV_HEADS, BUDGET, dtype=torch.int64)
    index[1, 1, 3] = at
    return index


TURNED = ones(ROWS, HEAD_DIM, HEADS).transpose(1, 2)
BF16 = torch.bfloat16

WRONG = {
    "no tensor": (attend(q=[1.0]), TypeError, "q must be a torch tensor, but it is a list"),
    "an array": (attend(q=np.ones((ROWS, HEADS, HEAD_DIM), np.float32)), TypeError, "q must be a torch tensor"),
    "another device": (attend(q=torch.ones(ROWS, HEADS, HEAD_DIM, device="meta")), ValueError, "q must be on the CPU"),
    "another dtype": (attend(q=ones(ROWS, HEADS, HEAD_DIM, dtype=BF16)), TypeError, "q must be float32"),
    "pages of another": (attend(pages=paged(dtype=BF16)), TypeError, "q must be bfloat16, but it is float32"),
    "another head size": (attend(q=ones(ROWS, HEADS, HEAD_DIM // 2)), ValueError, "q must have shape"),
    "too few rows": (attend(q=ones(ROWS - 1, HEADS, HEAD_DIM)), ValueError, "q must have shape"),
    "too few dimensions": (attend(q=ones(HEADS, HEAD_DIM)), ValueError, "q must have shape"),
    "heads that share none": (attend(q=ones(ROWS, 3, HEAD_DIM), out=ones(ROWS, 3, HEAD_DIM)), ValueError, "multiple"),
    "turned queries": (attend(q=TURNED), ValueError, "q must be contiguous"),
    "pages that are not there": (attend(reads=reads(table=[0, 4])), ValueError, "a table names pages that are not"),
    "of another request": (attend(reads=reads(request(table=[9, 1]))), ValueError, "a table names pages"),
    "short output": (attend(out=ones(ROWS - 1, HEADS, HEAD_DIM)), ValueError, "out must have shape"),
    "spread output": (attend(out=ones(1, HEADS, HEAD_DIM).expand(ROWS, -1, -1)), ValueError, "out must be contiguous"),
    "another mass": (attend(lse=ones(ROWS, KV_HEADS)), ValueError, "lse must have shape"),
    "narrow mass": (attend(lse=ones(ROWS, HEADS, dtype=BF16)), TypeError, "lse must be float32"),
    "no threads": (attend(threads=0), ValueError, "threads must be positive"),
    "index of 32 bits": (gather(index=named(0).int()), TypeError, "index must be int64, but it is int32"),
    "slot beyond": (gather(index=named(LENGTH)), ValueError, "index names slots that are not there"),
    "slot below": (gather(index=named(-1)), ValueError, "index names slots that are not there"),
    "index of other rows": (gather(index=named(0)[:2]), ValueError, "index must have shape"),
    "spread index": (gather(index=named(0)[:1].expand(ROWS, -1, -1)), ValueError, "index must be contiguous"),
    "short mask": (gather(mask=ones(ROWS, KV_HEADS, 2, dtype=torch.bool)), ValueError, "mask must have shape"),
    "mask of numbers": (gather(mask=ones(ROWS, KV_HEADS, BUDGET)), TypeError, "mask must be bool"),
    "keys' means alone": (gather(mean_v=None), ValueError, "mean_k and mean_v come together"),
    "other means": (gather(mean_k=ones(KV_HEADS, 3, HEAD_DIM)), ValueError, "mean_v must have shape"),
    "means of another dtype": (gather(mean_k=ones(KV_HEADS, 2, HEAD_DIM, dtype=BF16)), TypeError, "mean_k must be"),
    "means that weigh nothing": (gather(weight=0.0), ValueError, "weight must be at least 1"),
    "select: more than there are": (
        select(index=torch.empty(ROWS, KV_HEADS, LENGTH + 1, dtype=torch.int64)), ValueError, "room for more slots"),
    "select: index of 32 bits": (
        select(index=torch.empty(ROWS, KV_HEADS, 1, dtype=torch.int32)), TypeError, "index must be int64"),
    "select: two requests": (
        select(reads=reads(request()), q=ones(2 * ROWS, HEADS, HEAD_DIM)), ValueError, "one request at a time"),
    "linear: another width": (linear(x=ones(ROWS, 31)), ValueError, "x must have shape"),
    "linear: another dtype": (linear(x=ones(ROWS, 32, dtype=BF16)), TypeError, "x must be float32"),
    "linear: turned weight": (linear(weight=ones(32, 16).T), ValueError, "weight must be contiguous"),
    "linear: long bias": (linear(bias=ones(17)), ValueError, "bias must have shape"),
    "linear: short output": (linear(out=ones(ROWS, 15)), ValueError, "out must have shape"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_refused_in_a_sentence(level, case):
    arguments, error, sentence = WRONG[case]
    kinds = {"bias": level.linear, "sinks": level.select, "index": level.gather, "lse": level.attend}
    call = next(call for name, call in kinds.items() if name in arguments)
    with pytest.raises(error, match=sentence) as raised:
        call(**arguments)
    assert str(raised.value).endswith(".") and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        ({"table": [-1, 0]}, ValueError, "page numbers must not be negative"),
        ({"table": [0]}, ValueError, "the table must have a page for every slot"),
        ({"length": 513}, ValueError, "the table must have a page for every slot"),
        ({"length": 0}, ValueError, "length must be positive"),
        ({"length": 2**63 - 1}, ValueError, "the table must have a page for every slot"),
        ({"prefix": LENGTH + 1}, ValueError, "prefix must be between"),
        ({"prefix": -1}, ValueError, "prefix must be between"),
        ({"prefix": LENGTH, "tail": None}, ValueError, "prefix and rows are more than the slots"),
        ({"positions": torch.arange(ROWS)}, TypeError, "positions must be int32, but it is int64"),
        ({"positions": torch.zeros(4, dtype=torch.int32)}, ValueError, "low must have shape"),
        ({"low": torch.zeros(ROWS, dtype=torch.int64)}, TypeError, "low must be int32, but it is int64"),
        ({"low": torch.zeros(1, dtype=torch.int32)}, ValueError, "low must have shape"),
        ({"tail": ones(ROWS, ROWS - 1, dtype=torch.bool)}, ValueError, "tail must have shape"),
        ({"tail": ones(ROWS, ROWS)}, TypeError, "tail must be bool"),
        ({"tail": ones(ROWS, ROWS, dtype=torch.bool).T.expand(ROWS, ROWS).tril().T}, ValueError, "tail must be contig"),
    ],
)
def test_a_request_that_does_not_fit_is_refused(changes, error, sentence):
    with pytest.raises(error, match=sentence):
        request(**changes)


@pytest.mark.parametrize(
    ("tensor", "error", "sentence"),
    [
        (ones(4, 2, 2, PAGE, 8, dtype=torch.float64), TypeError, "pages must be float32 or bfloat16"),
        (ones(4, 2, 2, PAGE - 1, 8), ValueError, "pages must have shape"),
        (ones(4, 3, 2, PAGE, 8), ValueError, "pages must have shape"),
        (ones(0, 2, 2, PAGE, 8), ValueError, "pages are empty"),
        (ones(4, 2, 2, 2 * PAGE, 8)[:, :, :, ::2], ValueError, "pages must be contiguous"),
        (ones(4, 2, 2, 8, PAGE).transpose(3, 4), ValueError, "pages must be contiguous"),
    ],
)
def test_pages_that_do_not_fit_are_refused(tensor, error, sentence):
    with pytest.raises(error, match=sentence):
        native._cpu.Pages(tensor)


def test_rows_that_do_not_fit_the_pages_are_not_written():
    rows, write = ones(KV_HEADS, ROWS, HEAD_DIM), native._cpu.write
    write(paged(), reads(), rows, rows)
    for pages, own, keys, sentence in (
        (paged(), reads(table=[0, 7]), rows, "a table names pages"),
        (paged(), reads(), rows[:, :2], "keys must have shape"),
        (paged(), reads(prefix=LENGTH, tail=ones(ROWS, 0, dtype=torch.bool)), rows, "more than the slots"),
        (paged(), reads(), rows.transpose(1, 2).contiguous().transpose(1, 2), "keys must be contiguous"),
    ):
        with pytest.raises(ValueError, match=sentence):
            write(pages, own, keys, rows)


def test_no_request_is_no_reads():
    for given in ([], [None]):
        with pytest.raises((TypeError, ValueError)):
            native._cpu.Reads(given)


def test_what_is_right_is_taken(level):
    level.attend(**attend())
    level.gather(**gather())
    level.select(**select())
    level.linear(**linear())


def layer(**changes):
    """A layer of 2 heads of 8 that is right: hidden 16, MLP 24."""
    shapes = [(16, 16), (8, 16), (8, 16), (16, 16), (24, 16), (24, 16), (16, 24)]
    right = {
        "norms": [ones(16), ones(16), ones(8), None],
        "projections": [(ones(*shape), ones(shape[0])) for shape in shapes],
        "head_dim": 8,
        "rotary": 8,
        "epsilon": 1e-5,
    }
    return native.layer(**right | changes)


def projections(place, weight, bias=None):
    """Of a layer that is right but for one projection."""
    shapes = [(16, 16), (8, 16), (8, 16), (16, 16), (24, 16), (24, 16), (16, 24)]
    found = [(ones(*shape), None) for shape in shapes]
    found[place] = (weight, bias)
    return found


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        ({"projections": projections(3, ones(16, 15))}, ValueError, "o must have shape"),
        ({"projections": projections(6, ones(16, 23))}, ValueError, "down must have shape"),
        ({"projections": projections(1, ones(9, 16))}, ValueError, "whole heads"),
        ({"projections": projections(4, ones(16, 24).T)}, ValueError, "gate must be contiguous"),
        ({"projections": projections(2, ones(8, 16).bfloat16())}, TypeError, "v must be float32"),
        ({"projections": projections(0, ones(16, 16), ones(15))}, ValueError, "bias must have shape"),
        ({"projections": projections(0, ones(16, 16))[:6]}, ValueError, "seven projections"),
        ({"norms": [ones(15), ones(16), None, None]}, ValueError, "input_norm must have shape"),
        ({"norms": [ones(16), ones(16), ones(16), None]}, ValueError, "q_norm must have shape"),
        ({"rotary": 10}, ValueError, "rotary must be even"),
        ({"head_dim": 0}, ValueError, "whole heads"),
    ],
)
def test_a_layer_whose_parts_do_not_fit_is_refused(changes, error, sentence):
    with pytest.raises(error, match=sentence):
        layer(**changes)


def test_rows_that_do_not_fit_a_layer_are_refused(level):
    own = layer()
    x, angles, q, k = ones(3, 16), ones(3, 8), ones(3, 2, 8), ones(1, 3, 8)
    native.before(level, own, x, angles, angles, q, k, torch.empty_like(k))
    native.after(level, own, x, q)
    for wrong, sentence in (
        ((ones(3, 15), angles, angles, q, k, k), "x must have shape"),
        ((x, ones(3, 6), angles, q, k, k), "cos must have shape"),
        ((x, angles, ones(1, 8).expand(2, -1), q, k, k), "sin must have shape"),
        ((x, angles, angles, ones(2, 2, 8), k, k), "q must have shape"),
        ((x, angles, angles, q, ones(3, 1, 8).transpose(0, 1)[:, :2], k), "k must have shape"),
        ((x, angles, angles, q, ones(1, 8, 3).transpose(1, 2), k), "k must be contiguous"),
    ):
        with pytest.raises(ValueError, match=sentence):
            native.before(level, own, *wrong)
    with pytest.raises(ValueError, match="attention must have shape"):
        native.after(level, own, x, ones(3, 2, 9))
    with pytest.raises(TypeError, match="x must be float32"):
        native.after(level, own, x.bfloat16(), q)


HUNGRY = """
import resource, torch
from springtide.kernels import KV, Reads, Visible, native

torch.set_num_threads(2)
level = native._cpu.level(native.levels()[0])
rows, length = 64, 1 << 19
q, kv = torch.ones(rows, 1, 8), KV.of(*torch.ones(2, 1, length, 8))
x, weight = torch.ones(1 << 15, 512), torch.ones(1, 512)
how = dict(sinks=1, recent=1, pool="mean", softcap=None)

def choose(rows, length, heads):
    seen = Visible(length - rows, length, torch.arange(length - rows, length, dtype=torch.int32))
    own = KV(kv.pages, Reads(kv.reads.tables, (seen,)))
    return native.choose(level, q[:rows], own, 1.0, 4, heads=heads, **how)[0].tolist()

choose(1, 16, "all")
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (16 << 20),) * 2)
# What the whole call shares; what each thread has for itself; a projection's packed rows.
for call in (
    lambda: choose(64, length, "all"), lambda: choose(1, length, "kv"), lambda: native.linear(level, x, weight)
):
    try:
        call()
    except MemoryError:
        print("no memory", choose(1, 16, "all"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="address space is limited on Linux alone")
@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer ends where memory does")
def test_a_call_without_memory_raises():
    result = subprocess.run([sys.executable, "-c", HUNGRY], capture_output=True, text=True)
    assert result.stdout.splitlines() == ["no memory [[0, 1, 2, 15]]"] * 3, result.stderr
