"""Reversed attention against its definition, written out token by token, and its two forms against each other."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from springtide.vision.reversed_attention import dependency_mask, forward_attention, reversed_attention


def tensors(batch, heads, tokens, size, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    query, key, value = torch.randn(3, batch, heads, tokens, size, generator=generator, dtype=dtype).unbind()
    weights = torch.rand(batch, heads, tokens, generator=generator, dtype=dtype)
    return query, key, value, weights


shapes = st.tuples(
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 17), st.integers(1, 8), st.integers(0, 2**31 - 1)
)


def by_definition(query, key, value, weights):
    """``R_h[i, j] = A_h[j, i] w_h[j]`` in loops: what comes out, and the mask."""
    batch, heads, tokens, size = query.shape
    out, mask = torch.zeros_like(value), query.new_zeros(batch, tokens, tokens)
    for b in range(batch):
        for h in range(heads):
            for child in range(tokens):
                scores = [float(query[b, h, child] @ key[b, h, parent]) / size**0.5 for parent in range(tokens)]
                spread = torch.tensor(scores, dtype=query.dtype).softmax(0)
                for parent in range(tokens):
                    given = spread[parent] * weights[b, h, child]
                    out[b, h, parent] += given * value[b, h, child]
                    mask[b, parent, child] += given
    return out, mask


def test_it_is_its_definition():
    query, key, value, weights = tensors(2, 3, 5, 4, seed=0)
    out, mass = reversed_attention(query, key, value, weights)
    wanted, mask = by_definition(query, key, value, weights)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(dependency_mask(query, key, weights), mask)
    torch.testing.assert_close(mass.sum(1), mask.sum(2))


@settings(deadline=None, max_examples=40)
@given(shapes)
def test_what_is_sent_is_received(shape):
    query, key, value, weights = tensors(*shape)
    _, mass = reversed_attention(query, key, value, weights)
    mask = dependency_mask(query, key, weights)
    torch.testing.assert_close(mask.sum(1), weights.sum(1))
    torch.testing.assert_close(mass.sum(-1), weights.sum(-1))


def test_a_silent_child_changes_nobody():
    """What it asks for and what it would say do not count; its key still draws what others send."""
    query, key, value, weights = tensors(1, 2, 6, 4, seed=0)
    weights[:, :, 3] = 0
    out, mass = reversed_attention(query, key, value, weights)
    query[:, :, 3] += 1
    value[:, :, 3] += 1
    assert torch.equal(reversed_attention(query, key, value, weights)[0], out)
    key[:, :, 3] += 1
    assert not torch.allclose(reversed_attention(query, key, value, weights)[1], mass)


@settings(deadline=None, max_examples=40)
@given(shapes, st.integers(1, 20))
def test_two_passes_are_one(shape, chunk):
    leaves = [tensor.requires_grad_() for tensor in tensors(*shape)]
    whole = reversed_attention(*leaves)
    chunked = reversed_attention(*leaves, chunk=chunk)
    for one, two in zip(whole, chunked, strict=True):
        torch.testing.assert_close(two, one, rtol=0, atol=1e-10)
    pull = torch.linspace(-1, 1, whole[0].numel(), dtype=torch.float64).view_as(whole[0])
    for one, two in zip(
        torch.autograd.grad((whole[0] * pull).sum() + whole[1].square().sum(), leaves),
        torch.autograd.grad((chunked[0] * pull).sum() + chunked[1].square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(two, one, rtol=0, atol=1e-10)


@pytest.mark.parametrize("tokens", [64, 256])
def test_two_passes_keep_no_square(tokens):
    """No tensor of N x N elements is kept for the gradients."""
    leaves = [tensor.requires_grad_() for tensor in tensors(1, 2, tokens, 4, seed=0)]
    kept = []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        reversed_attention(*leaves, chunk=8)
    assert max(kept) <= 2 * tokens * 8


def test_two_passes_cost_one_product_more():
    inputs = tensors(1, 2, 32, 8, seed=0)
    with FlopCounterMode(display=False) as once:
        reversed_attention(*inputs)
    with FlopCounterMode(display=False) as twice:
        reversed_attention(*inputs, chunk=8)
    assert twice.get_total_flops() - once.get_total_flops() == 2 * 2 * 32 * 32 * 8


@settings(deadline=None, max_examples=20)
@given(shapes)
def test_forward_attention_with_weights_of_one_is_softmax_attention(shape):
    query, key, value, weights = tensors(*shape)
    out, mass = forward_attention(query, key, value, torch.ones_like(weights))
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(query, key, value))
    torch.testing.assert_close(mass, torch.ones_like(mass))
    mask = dependency_mask(query, key, torch.ones_like(weights), reverse=False)
    torch.testing.assert_close(mask.sum(2), torch.full_like(mask[..., 0], weights.shape[1]))


def test_low_precision_is_near():
    query, key, value, weights = tensors(2, 3, 33, 16, seed=1)
    out, mass = reversed_attention(query, key, value, weights)
    low, low_mass = reversed_attention(query.bfloat16(), key.bfloat16(), value.bfloat16(), weights.float())
    assert low.dtype == torch.bfloat16 and low_mass.dtype == torch.float32
    torch.testing.assert_close(low.double(), out, rtol=0.05, atol=0.05)
    torch.testing.assert_close(low_mass.sum(-1).double(), mass.sum(-1), rtol=1e-5, atol=1e-5)
