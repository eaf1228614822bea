"""What the C++ kernels must not trust: each wrong argument is refused with a sentence, before memory is touched."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from springtide.kernels import native

pytestmark = pytest.mark.skipif(not native.levels(), reason="the C++ kernels were not built")

ROWS, HEADS, KV_HEADS, LENGTH, HEAD_DIM, BUDGET = 3, 4, 2, 50, 32, 5


@pytest.fixture
def level():
    return native._cpu.level(native.levels()[0])


def attend(**changes):
    """Arguments of a dense call that is right."""
    right = {
        "q": torch.randn(ROWS, HEADS, HEAD_DIM),
        "k": torch.randn(KV_HEADS, LENGTH, HEAD_DIM),
        "v": torch.randn(KV_HEADS, LENGTH, HEAD_DIM),
        "out": torch.empty(ROWS, HEADS, HEAD_DIM),
        "scale": 0.2,
        "softcap": 0.0,
        "prefix": LENGTH - ROWS,
        "low": torch.zeros(ROWS, dtype=torch.int32),
        "tail": torch.ones(ROWS, ROWS, dtype=torch.bool),
        "index": None,
        "mask": None,
        "mean_k": None,
        "mean_v": None,
        "weight": 1.0,
        "threads": 1,
    }
    return right | changes


def gather(**changes):
    """Arguments of a gathered call that is right."""
    return (
        attend(
            low=None,
            tail=None,
            index=torch.arange(BUDGET).expand(ROWS, KV_HEADS, -1).contiguous(),
            mask=torch.ones(ROWS, KV_HEADS, BUDGET, dtype=torch.bool),
            mean_k=torch.randn(KV_HEADS, 2, HEAD_DIM),
            mean_v=torch.randn(KV_HEADS, 2, HEAD_DIM),
            weight=64.0,
        )
        | changes
    )


def select(**changes):
    right = {
        "q": torch.randn(ROWS, HEADS, HEAD_DIM),
        "k": torch.randn(KV_HEADS, LENGTH, HEAD_DIM),
        "index": torch.empty(ROWS, KV_HEADS, BUDGET, dtype=torch.int64),
        "sinks": 1,
        "recent": 1,
        "scale": 0.2,
        "softcap": 0.0,
        "prefix": LENGTH - ROWS,
        "tail": None,
        "positions": torch.arange(LENGTH - ROWS, LENGTH, dtype=torch.int32),
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


def ones(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype)


def named(at):
    """An index with one slot at ``at``."""
    index = torch.zeros(ROWS, KV_HEADS, BUDGET, dtype=torch.int64)
    index[1, 1, 3] = at
    return index


WRONG = {
    "no tensor": (attend(q=[1.0]), TypeError, "q must be a torch tensor, but it is a list"),
    "an array": (attend(k=np.ones((KV_HEADS, LENGTH, HEAD_DIM), np.float32)), TypeError, "k must be a torch tensor"),
    "another device": (attend(q=torch.ones(ROWS, HEADS, HEAD_DIM, device="meta")), ValueError, "q must be on the CPU"),
    "another dtype": (attend(q=ones(ROWS, HEADS, HEAD_DIM, dtype=torch.bfloat16)), TypeError, "q must be float32"),
    "no kernels": (attend(k=ones(KV_HEADS, LENGTH, HEAD_DIM, dtype=torch.float64)), TypeError, "k must be float32 or"),
    "few values": (attend(v=ones(KV_HEADS, LENGTH - 1, HEAD_DIM)), ValueError, "v must have shape"),
    "another head size": (attend(q=ones(ROWS, HEADS, HEAD_DIM // 2)), ValueError, "q must have shape"),
    "too few dimensions": (attend(q=ones(HEADS, HEAD_DIM)), ValueError, "q must have shape"),
    "heads that share none": (attend(q=ones(ROWS, 3, HEAD_DIM), out=ones(ROWS, 3, HEAD_DIM)), ValueError, "multiple"),
    "turned queries": (attend(q=ones(ROWS, HEAD_DIM, HEADS).transpose(1, 2)), ValueError, "q must be contiguous"),
    "turned keys": (attend(k=ones(KV_HEADS, HEAD_DIM, LENGTH).transpose(1, 2)), ValueError, "k must be contiguous"),
    "slots apart": (attend(k=ones(KV_HEADS, 2 * LENGTH, HEAD_DIM)[:, ::2]), ValueError, "k must be contiguous"),
    "nothing to see": (attend(k=ones(KV_HEADS, 0, HEAD_DIM)), ValueError, "k is empty"),
    "short output": (attend(out=ones(ROWS - 1, HEADS, HEAD_DIM)), ValueError, "out must have shape"),
    "spread output": (attend(out=ones(1, HEADS, HEAD_DIM).expand(ROWS, -1, -1)), ValueError, "out must be contiguous"),
    "prefix too long": (attend(prefix=LENGTH + 1), ValueError, "prefix must be between"),
    "prefix below 0": (attend(prefix=-1), ValueError, "prefix must be between"),
    "wide low": (attend(low=torch.zeros(ROWS, dtype=torch.int64)), TypeError, "low must be int32, but it is int64"),
    "short low": (attend(low=torch.zeros(1, dtype=torch.int32)), ValueError, "low must have shape"),
    "narrow tail": (attend(tail=ones(ROWS, ROWS - 1, dtype=torch.bool)), ValueError, "tail must have shape"),
    "tail of numbers": (attend(tail=ones(ROWS, ROWS)), TypeError, "tail must be bool"),
    "turned tail": (attend(tail=ones(ROWS, ROWS, dtype=torch.bool).tril().T), ValueError, "tail must be contiguous"),
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
    "means of another dtype": (gather(mean_k=ones(KV_HEADS, 2, HEAD_DIM).bfloat16()), TypeError, "mean_k must be"),
    "means that weigh nothing": (gather(weight=0.0), ValueError, "weight must be at least 1"),
    "mask without index": (attend(mask=ones(ROWS, KV_HEADS, 1, dtype=torch.bool)), ValueError, "go with an index"),
    "select: more than there are": (
        select(index=torch.empty(ROWS, KV_HEADS, LENGTH + 1, dtype=torch.int64)), ValueError, "room for more slots"),
    "select: index of 32 bits": (
        select(index=torch.empty(ROWS, KV_HEADS, 1, dtype=torch.int32)), TypeError, "index must be int64"),
    "select: rows beyond": (select(prefix=LENGTH), ValueError, "prefix and rows are more than the slots"),
    "select: short positions": (select(positions=torch.zeros(1, dtype=torch.int32)), ValueError, "positions must have"),
    "linear: another width": (linear(x=ones(ROWS, 31)), ValueError, "x must have shape"),
    "linear: another dtype": (linear(x=ones(ROWS, 32).bfloat16()), TypeError, "x must be float32"),
    "linear: turned weight": (linear(weight=ones(32, 16).T), ValueError, "weight must be contiguous"),
    "linear: long bias": (linear(bias=ones(17)), ValueError, "bias must have shape"),
    "linear: short output": (linear(out=ones(ROWS, 15)), ValueError, "out must have shape"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_refused_in_a_sentence(level, case):
    arguments, error, sentence = WRONG[case]
    call = level.linear if "weight" in arguments and "x" in arguments else level.attend
    call = level.select if "sinks" in arguments else call
    with pytest.raises(error, match=sentence) as raised:
        call(**arguments)
    assert str(raised.value).endswith(".") and "\n" not in str(raised.value)


def test_what_is_right_is_taken(level):
    level.attend(**attend())
    level.attend(**gather())
    level.select(**select())
    level.linear(**linear())
    level.attend(**attend(q=ones(0, HEADS, HEAD_DIM), out=ones(0, HEADS, HEAD_DIM), low=None, tail=None))


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
from springtide.kernels import Visible, native

torch.set_num_threads(2)
level = native._cpu.level(native.levels()[0])
rows, length = 64, 1 << 19
q, k = torch.ones(rows, 1, 8), torch.ones(1, length, 8)
x, weight = torch.ones(1 << 15, 512), torch.ones(1, 512)
how = dict(sinks=1, recent=1, pool="mean", softcap=None)

def choose(rows, length, heads):
    seen = Visible(length - rows, length, torch.arange(length - rows, length, dtype=torch.int32))
    return native.choose(level, q[:rows], k[:, :length], 1.0, seen, 4, heads=heads, **how)[0].tolist()

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
def test_a_call_without_memory_raises():
    result = subprocess.run([sys.executable, "-c", HUNGRY], capture_output=True, text=True)
    assert result.stdout.splitlines() == ["no memory [[0, 1, 2, 15]]"] * 3, result.stderr
