"""Trees have one root and no cycle; saliency and parts are what they are said to be."""

from __future__ import annotations

from itertools import pairwise

import networkx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from springtide.errors import SpringtideError
from springtide.vision import tree as trees
from springtide.vision.dependency_vit import (
    DependencyViTForMaskedImageModeling,
    DependencyViTOutput,
    create_model,
)
from springtide.vision.tree import Grid, Parts, Saliency, align, cluster, cut, decode, dependency, layers, otsu

POCKET = "dependency_vit_pocket_patch8_64"


def output_of(batch=2, left=(9, 9, 9, 9), seed=0):
    """What a model might have found that ran on ``left[l]`` tokens in layer l, and had ``left[-1]`` at the end."""
    generator = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.rand(*shape, generator=generator)  # noqa: E731
    indices, sent = torch.arange(left[0]).expand(batch, -1), torch.ones(batch, left[0])
    kept, messages, masks = [], [], []
    for count, after in zip(left, (*left[1:], left[-1]), strict=True):
        sent = sent * (0.5 + 0.5 * rand(batch, count))
        spread = rand(batch, count, count) ** 4
        kept.append(indices)
        messages.append(sent)
        masks.append(spread / spread.sum(1, keepdim=True) * sent[:, None])
        chosen = rand(batch, count).topk(after).indices.sort().values
        indices, sent = indices.gather(1, chosen), sent.gather(1, chosen)
    return DependencyViTOutput(
        last_hidden_state=rand(batch, left[-1], 5),
        messages=sent,
        indices=indices,
        kept=tuple(kept),
        layer_messages=tuple(messages),
        received=tuple(mask.sum(2) for mask in masks),
        attentions=tuple(masks),
    )


def images(count=1, seed=0):
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def random_dependency(tokens, seed=0, zeros=0.0):
    generator = torch.Generator().manual_seed(seed)
    found = torch.rand(tokens, tokens, generator=generator, dtype=torch.float64).fill_diagonal_(0)
    found[:, torch.rand(tokens, generator=generator) < zeros] = 0
    return found / found.sum(0).clamp(min=1e-9)


def best_weight(found):
    """Of the maximum spanning arborescence, by Chu-Liu/Edmonds."""
    graph = networkx.DiGraph()
    for parent, child in (found > 0).nonzero().tolist():
        graph.add_edge(parent, child, weight=found[parent, child].item())
    edges = networkx.maximum_spanning_arborescence(graph).edges(data="weight")
    return sum(weight for _, _, weight in edges)


tokens_and_seeds = {"tokens": st.integers(1, 40), "seed": st.integers(0, 2**32)}

# -- the masks of all layers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [(9, 9, 9), (9, 6, 6, 2), (9, 1)])
def test_parents_of_a_child_sum_to_one(left):
    found = dependency(output_of(left=left), 9)
    torch.testing.assert_close(found.sum(1), torch.ones(2, 9))
    assert not found.diagonal(dim1=1, dim2=2).any()


def test_a_child_that_gave_nothing_has_no_parents():
    output = output_of()
    for mask in output.attentions:
        mask[1, :, 4] = 0
    found = dependency(output, 9)
    assert not found[1, :, 4].any()
    assert found.isfinite().all()
    tree = trees.trees(output, 9)[1]
    assert (tree.weights[4], tree.parents[4] in (-1, tree.root)) == (0, True)


def test_masks_of_pruned_layers_are_put_where_their_tokens_are():
    output = output_of(batch=3, left=(9, 7, 4, 4))
    expected = torch.zeros(3, 9, 9)
    for mask, kept in zip(output.attentions, output.kept, strict=True):
        for image in range(3):
            for row, parent in enumerate(kept[image].tolist()):
                for column, child in enumerate(kept[image].tolist()):
                    expected[image, parent, child] += mask[image, row, column] * (parent != child)
    torch.testing.assert_close(dependency(output, 9), expected / expected.sum(1, keepdim=True))


def test_what_is_found_in_an_image_does_not_depend_on_its_batch():
    output, order = output_of(batch=4, left=(9, 7, 5)), torch.tensor([2, 0, 3, 1])
    shuffled = DependencyViTOutput(
        **{
            name: tuple(one[order] for one in value) if isinstance(value, tuple) else value[order]
            for name, value in output.items()
        }
    )
    grid = Grid(3, 3, 2)
    for find in (
        lambda one: [tree.parents for tree in trees.trees(one, 9)],
        lambda one: [saliency.values for saliency in trees.saliencies(one, grid)],
        lambda one: [parts.labels for parts in trees.partitions(one, trees.saliencies(one, grid), 3)],
    ):
        before, after = find(output), find(shuffled)
        assert all(torch.equal(before[image], found) for image, found in zip(order, after, strict=True))


def test_masks_must_be_asked_for():
    output = create_model(POCKET)(images())
    with pytest.raises(SpringtideError, match="output_attentions=True"):
        dependency(output, 64)


def test_layers_that_a_token_went_through():
    output = output_of(left=(9, 7, 4))
    found = layers(output, 9)
    for number, kept in enumerate(output.kept, start=1):
        assert torch.stack([(row >= number).nonzero().squeeze(1) for row in found]).equal(kept)
    assert ((found == 4).sum(1) == 4).all()


def test_messages_of_pruned_tokens_fade_as_the_others_do():
    output = output_of(left=(4, 2))
    found = trees.messages(output, 4)
    torch.testing.assert_close(found.gather(1, output.indices), output.messages)
    first, last, stayed = output.layer_messages[0], output.layer_messages[1], output.kept[1]
    faded = first * last.sum(1, keepdim=True) / first.gather(1, stayed).sum(1, keepdim=True)
    gone = layers(output, 4) == 1
    torch.testing.assert_close(found[gone], faded[gone])


def test_without_pruning_messages_are_those_of_the_end():
    output = output_of()
    torch.testing.assert_close(trees.messages(output, 9), output.messages)
    torch.testing.assert_close(trees.received(output, 9), torch.stack(output.attentions).sum(3).mean(0))


# -- trees ----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(zeros=st.sampled_from([0.0, 0.5, 1.0]), ties=st.booleans(), stages=st.integers(1, 4), **tokens_and_seeds)
def test_one_root_and_no_cycle(tokens, seed, zeros, ties, stages):
    generator = torch.Generator().manual_seed(seed)
    found = random_dependency(tokens, seed, zeros)
    messages = torch.ones(tokens) if ties else torch.rand(tokens, generator=generator)
    through = torch.randint(stages, (tokens,), generator=generator)
    tree = decode(found, messages, through)

    assert (tree.parents == -1).nonzero().flatten().tolist() == [tree.root]
    assert sorted(tree.rank.tolist()) == list(range(tokens))
    for token in range(tokens):
        steps = 0
        while token != tree.root:
            assert tree.rank[tree.parents[token]] < tree.rank[token]
            token, steps = int(tree.parents[token]), steps + 1
        assert steps < tokens
    for token in tree.order[1:]:
        above = tree.rank < tree.rank[token]
        assert tree.weights[token] == found[tree.parents[token], token] == found[above, token].max()
    below = sorted(range(tokens), key=lambda token: (-through[token], -messages[token], -found[token].sum()))
    assert tree.order == below


@settings(deadline=None, max_examples=40)
@given(**tokens_and_seeds)
def test_depths_children_and_subtrees_agree(tokens, seed):
    tree = decode(random_dependency(tokens, seed), torch.rand(tokens, generator=torch.Generator().manual_seed(seed)))
    assert tree.depths[tree.root] == 0
    assert tree.depth == max(tree.depths)
    assert sorted(tree.subtree(tree.root)) == list(range(tokens))
    for token in range(tokens):
        subtree = tree.subtree(token)
        assert len(set(subtree)) == len(subtree) == tree.sizes[token]
        assert tree.sizes[token] == 1 + sum(tree.sizes[child] for child in tree.children[token])
        assert all(tree.depths[child] == tree.depths[token] + 1 for child in tree.children[token])
        assert all(tree.parents[child] == token for child in tree.children[token])
    assert sum(map(len, tree.children)) == tokens - 1


@settings(deadline=None, max_examples=30)
@given(tokens=st.integers(2, 10), seed=st.integers(0, 2**32))
def test_no_tree_outweighs_that_of_edmonds(tokens, seed):
    found, messages = random_dependency(tokens, seed), torch.rand(tokens, generator=torch.Generator().manual_seed(seed))
    tree, best = decode(found, messages), best_weight(found)
    assert tree.weights.sum() <= best + 1e-12
    order = torch.tensor(tree.order)
    ordered = torch.zeros_like(found)
    ordered[order[:, None], order] = found[order][:, order].triu(1)  # nothing is sent to tokens of lower rank
    assert decode(ordered, messages).weights.sum().item() == pytest.approx(best_weight(ordered))


def test_where_favourites_rank_higher_the_tree_is_that_of_edmonds():
    found = torch.full((6, 6), 0.02, dtype=torch.float64).fill_diagonal_(0)
    for child, parent in enumerate([0, 0, 1, 1, 2, 4][1:], start=1):
        found[parent, child] = 0.9
    tree = decode(found, torch.linspace(1, 0.5, 6))
    assert tree.parents.tolist() == [-1, 0, 1, 1, 2, 4]
    assert tree.weights.sum().item() == pytest.approx(best_weight(found))


def test_pruned_tokens_rank_below_kept_ones():
    output = output_of(left=(9, 7, 4, 4))
    for tree, through, sent in zip(trees.trees(output, 9), layers(output, 9), trees.messages(output, 9), strict=True):
        order = tree.order
        assert through[order].tolist() == sorted(through.tolist(), reverse=True)
        for upper, lower in pairwise(order):
            assert through[upper] > through[lower] or sent[upper] >= sent[lower]


# -- saliency -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "threshold"),
    [
        # weights and means by hand: cuts after 0, 1, 9 give 3 * 24.1, 4 * 64, 3 * 28.4 (times a constant)
        ([0, 1, 9, 10], 1),
        ([10, 0, 9, 1], 1),
        ([1, 2, 3, 10], 3),
        ([0, 0, 0, 0, 5], 0),
        ([0, 5, 5, 5, 5], 0),
        ([0, 0, 4, 4, 100, 100], 4),
        ([1, 2, 3], 1),  # both cuts are as good: the lower one
        ([7, 7, 7], 7),
        ([3], 3),
    ],
)
def test_otsu(values, threshold):
    assert otsu(torch.tensor(values, dtype=torch.float64)) == threshold


@settings(deadline=None, max_examples=50)
@given(values=st.lists(st.integers(0, 12), min_size=2, max_size=30).filter(lambda values: len(set(values)) > 1))
def test_otsu_splits_where_the_variance_between_classes_is_highest(values):
    """As in scikit-image, whose histogram has a bin for each integer."""

    def between(threshold):
        low, high = ([value for value in values if (value > threshold) == upper] for upper in (False, True))
        return len(low) * len(high) * (sum(low) / len(low) - sum(high) / len(high)) ** 2

    found = otsu(torch.tensor(values).float())
    assert between(found) == pytest.approx(max(between(threshold) for threshold in sorted(set(values))[:-1]))


def test_saliency_in_pixels():
    grid = Grid(2, 3, 4)
    saliency = trees.salient(torch.tensor([2.0, 2.0, 2.0, 4.0, 2.0, 3.6]), grid)
    torch.testing.assert_close(saliency.values, torch.tensor([0, 0, 0, 1, 0, 0.8]))
    assert saliency.foreground.tolist() == [False, False, False, True, False, True]
    assert saliency.mask.shape == saliency.map.shape == (8, 12)
    assert saliency.mask.sum() == 2 * 16
    assert saliency.mask[4:, :4].all() and saliency.mask[4:, 8:].all()
    assert saliency.map[7, 0] == 1 and saliency.map[0, 0] == 0
    assert 0 < saliency.map[5, 5] < 1  # between two tokens


def test_where_all_tokens_are_alike_there_is_no_foreground():
    saliency = trees.salient(torch.full((6,), 0.3), Grid(2, 3, 4))
    assert not saliency.foreground.any() and not saliency.map.any()
    output = output_of(left=(9,))
    output.layer_messages[0].fill_(1)
    (parts, _) = trees.partitions(output, trees.saliencies(output, Grid(3, 3, 4), "messages"), 3)
    assert not parts.labels.any() and parts.features.shape == (0, 5)
    assert not align([parts], 2)[0].any()


def test_saliency_by_each_reading():
    output = output_of(left=(9, 6))
    for by, values in (("rollout", trees.rollout), ("messages", trees.messages), ("received", trees.received)):
        found = trees.saliencies(output, Grid(3, 3, 1), by)[0]
        assert found.values.argsort().equal(values(output, 9)[0].argsort())


@pytest.mark.parametrize("left", [(9, 9, 9), (9, 6, 6, 2)])
def test_rollout_is_what_each_token_would_bring_were_messages_all_there_is(left):
    output = output_of(left=left)
    held = torch.eye(9).expand(2, -1, -1)  # of each token, how much came from which
    for number, mask in enumerate(output.attentions):
        held = held + mask @ held
        if number + 1 < len(left):  # those that go on
            held = held[(output.kept[number][:, None] == output.kept[number + 1][:, :, None]).any(1)].view(2, -1, 9)
    feature = (output.messages[:, None] @ held)[:, 0]
    torch.testing.assert_close(trees.rollout(output, 9), feature / feature.sum(1, keepdim=True))


def test_rollout_of_a_plain_vit_is_attention_rollout():
    plain = {"attention": "forward", "head_selector": False, "controller": False}
    model = create_model(POCKET, **plain).eval()
    output = trees.look(model, images(2))
    joint = torch.eye(64)
    for attention in output.attentions:  # as Abnar and Zuidema give it
        joint = (0.5 * torch.eye(64) + 0.5 * attention) @ joint
    torch.testing.assert_close(trees.rollout(output, 64), joint.mean(1))


# -- parts ----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(k=st.integers(1, 45), **tokens_and_seeds)
def test_parts_are_subtrees(tokens, seed, k):
    tree = decode(random_dependency(tokens, seed), torch.rand(tokens, generator=torch.Generator().manual_seed(seed)))
    labels = cut(tree, k)
    assert labels.unique().tolist() == list(range(min(k, tokens)))
    joins = [token for token in tree.order[1:] if labels[token] == labels[tree.parents[token]]]
    assert len(joins) == tokens - min(k, tokens)  # so each part hangs together


@settings(deadline=None, max_examples=40)
@given(k=st.integers(2, 6), **tokens_and_seeds)
def test_edges_are_cut_by_weight_and_by_the_sizes_they_leave(tokens, seed, k):
    tree = decode(random_dependency(tokens, seed), torch.rand(tokens, generator=torch.Generator().manual_seed(seed)))
    graph = networkx.Graph((token, int(tree.parents[token])) for token in tree.order[1:])
    graph.add_nodes_from(tree.order)

    def cost(token):
        rest = graph.copy()
        rest.remove_edge(token, int(tree.parents[token]))
        sides = (len(networkx.node_connected_component(rest, end)) for end in (token, int(tree.parents[token])))
        return float(tree.weights[token]) * sum(1 / side for side in sides)

    for _ in range(min(k, tokens) - 1):
        worst = min((child for child in tree.order[1:] if graph.has_edge(child, int(tree.parents[child]))), key=cost)
        graph.remove_edge(worst, int(tree.parents[worst]))
    labels = cut(tree, k)
    expected = {frozenset(part) for part in networkx.connected_components(graph)}
    assert {frozenset((labels == label).nonzero()[:, 0].tolist()) for label in labels.unique()} == expected


def test_parts_of_an_image():
    output, grid = output_of(left=(36, 36, 36)), Grid(6, 6, 2)
    for parts, saliency, tree in zip(
        trees.partitions(output, trees.saliencies(output, grid, "messages"), 3),
        trees.saliencies(output, grid, "messages"),
        trees.trees(output, 36),
        strict=True,
    ):
        assert (parts.labels > 0).equal(saliency.foreground)
        assert parts.labels.max() == 3 and parts.map.shape == (12, 12)
        inside = [token for token in tree.order[1:] if saliency.foreground[token]]
        assert all(saliency.foreground[tree.parents[token]] for token in inside)
        cuts = [token for token in inside if parts.labels[token] != parts.labels[tree.parents[token]]]
        assert len(cuts) == 2


def test_features_of_parts_are_means_of_tokens_that_were_left():
    output, grid = output_of(left=(16, 16, 12)), Grid(4, 4, 2)
    for image, parts in enumerate(trees.partitions(output, trees.saliencies(output, grid), 4)):
        hidden = dict(zip(output.indices[image].tolist(), output.last_hidden_state[image], strict=True))
        whole = torch.stack([hidden[token] for token in hidden if parts.labels[token]]).mean(0)
        for label, feature in enumerate(parts.features, start=1):
            own = [hidden[token] for token in hidden if parts.labels[token] == label]
            expected = torch.stack(own).mean(0) - whole if own else torch.zeros(5)
            torch.testing.assert_close(feature, expected)


def test_no_parts_are_refused():
    with pytest.raises(SpringtideError, match="cannot be cut into 0 parts"):
        trees.partitions(output_of(), trees.saliencies(output_of(), Grid(3, 3, 1)), 0)


def blobs(count=20, seed=0):
    """Points around three corners of a square, in a random order, and which corner they are from."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]])
    which = torch.randint(3, (3 * count,), generator=generator)
    return corners[which] + torch.rand(3 * count, 2, generator=generator), which


def test_clusters():
    points, which = blobs()
    labels = cluster(points, 3)
    assert len(set(zip(labels.tolist(), which.tolist(), strict=True))) == 3
    assert labels.equal(cluster(points, 3))
    assert cluster(points[:2].repeat(5, 1), 4).unique().tolist() == [0, 1]
    assert cluster(points, 1).eq(0).all()


def test_parts_alike_are_named_alike_in_all_images():
    points, which = blobs()
    partitions, start = [], 0
    for count in (3, 1, 0, 4, 2) * 6:
        labels = torch.arange(6) * (torch.arange(6) <= count)
        partitions.append(Parts(labels, points[start : start + count], Grid(2, 3, 1)))
        start += count
    found = align(partitions, 3)
    names, start = set(), 0
    for parts, labels in zip(partitions, found, strict=True):
        assert (labels > 0).equal(parts.labels > 0)
        names |= {(int(labels[parts.labels == 1 + own]), int(which[start + own])) for own in range(len(parts.features))}
        start += len(parts.features)
    assert len(names) == 3 and {name for name, _ in names} == {1, 2, 3}


# -- a model and an image -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1.0, 0.36])
def test_a_model_and_an_image(keep):
    torch.manual_seed(0)
    model, pixels = create_model(POCKET, keep=keep), images()
    output, grid = trees.look(model, pixels), Grid(8, 8, 8)
    found, whole = trees.tree(model, pixels), trees.trees(output, 64)[0]
    assert found.parents.equal(whole.parents) and found.sizes[found.root] == 64
    saliency: Saliency = trees.saliency(model, pixels)
    assert saliency.map.shape == saliency.mask.shape == (64, 64)
    assert saliency.threshold == trees.saliencies(output, grid)[0].threshold
    parts = trees.parts(model, pixels, 4)
    assert (parts.map > 0).equal(saliency.mask) and parts.map.unique().tolist() == [0, 1, 2, 3, 4]
    assert trees.parts(model, pixels, 2, by="received").map.shape == (64, 64)


def test_images_that_are_not_square():
    model, pixels = create_model(POCKET), torch.randn(1, 3, 16, 40)
    assert Grid.of(pixels, 8) == (2, 5, 8)
    assert len(trees.tree(model, pixels).parents) == 10
    assert trees.saliency(model, pixels).map.shape == (16, 40)


def test_models_of_every_task_and_precision():
    config = create_model(POCKET).config
    model = DependencyViTForMaskedImageModeling(config).bfloat16()
    assert trees.tree(model, images()).sizes.max() == 64
    assert trees.parts(model, images(), 3).features.dtype == torch.float32


def test_a_batch_is_refused_where_one_image_is_meant():
    with pytest.raises(SpringtideError, match="one image, but pixel_values holds 2"):
        trees.tree(create_model(POCKET), images(2))
