"""Recurrent and convolutional layers on trees: the plan, and each kind of layer by itself."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_cases import MIXER_KINDS, doubled, fp64_model, mixers, supported
from strategies import forests

from flexmask import FlexmaskError, PrefixTree, compile_mask, patch
from flexmask.model.mixers.forest import find_forest
from flexmask.model.mixers.forward import MixerForward
from flexmask.model.mixers.plan import MAX_PADDING, Plan, plan_of
from flexmask.model.tree_attention import STATE, to_mask
from flexmask.tree.layout import concatenate, lay_out
from flexmask.tree.oracle import ancestry

MASK = to_mask(torch.tensor([[3, 2, 3]]), torch.tensor([[0, 1, 1]]))  # a root with two leaves

KINDS = (*MIXER_KINDS, "nemotron_h")  # which has a lower limit for its step sizes


@st.composite
def batches(draw):
    """Subtree ends and depths [B, L] of one or two rows, with padding; and the dense oracle."""
    rows = [draw(forests(max_segments=8, max_length=5)) for _ in range(draw(st.integers(1, 2)))]
    length = max(sum(tree.num_tokens for tree in trees) for trees in rows) + draw(st.integers(0, 2))
    ends = np.tile(np.arange(1, length + 1), (len(rows), 1))
    depths = np.zeros_like(ends)
    dense = np.eye(len(rows) * length, dtype=bool)
    for b, trees in enumerate(rows):
        layout = concatenate([lay_out(tree) for tree in trees])
        ends[b, : layout.subtree_end.size] = layout.subtree_end
        depths[b, : layout.subtree_end.size] = layout.position_ids
        start = b * length
        for tree in trees:
            part = slice(start, start + tree.num_tokens)
            dense[part, part] = ancestry(tree)
            start = part.stop
    return ends, depths, dense


@given(batches())
def test_parents_are_the_nearest_ancestors(batch):
    ends, _, dense = batch
    for token, parent in enumerate(find_forest(ends).parents):
        assert parent == max(np.flatnonzero(dense[token, :token]), default=-1)


@given(batches())
def test_the_pieces_above_a_piece_are_the_ancestors_of_its_tokens(batch):
    ends, _, dense = batch
    forest = find_forest(ends)
    assert forest.lengths.sum() == ends.size
    for piece, (start, length) in enumerate(zip(forest.starts, forest.lengths, strict=True)):
        above, seen = forest.piece_parents[piece], set(range(start, start + length))
        while above >= 0:
            first = forest.starts[above]
            seen |= set(range(first, first + forest.lengths[above]))
            above = forest.piece_parents[above]
        assert seen == set(np.flatnonzero(dense[start + length - 1]))


@given(batches())
def test_the_paths_are_the_ancestors_of_the_leaves(batch):
    ends, _, dense = batch
    leaves = np.flatnonzero(dense.sum(0) == 1)
    paths = find_forest(ends).paths()
    assert [path.tolist() for path in paths] == [np.flatnonzero(dense[x]).tolist() for x in leaves]


@given(batches(), st.integers(0, 4))
def test_each_token_of_a_chain_follows_its_ancestors(batch, num):
    ends, _, dense = batch
    tokens, places = find_forest(ends).chains_after_ancestors(num)
    assert tokens[places].tolist() == list(range(ends.size))
    for token, place in enumerate(places):
        ancestors = [-1] * num + np.flatnonzero(dense[token, :token]).tolist()
        assert tokens[place - num : place].tolist() == ancestors[len(ancestors) - num :]


@given(batches())
def test_groups_hold_every_token_once_and_parents_first(batch):
    ends, _, _ = batch
    plan = Plan(torch.from_numpy(ends))
    groups, places = plan.pieces
    flat = torch.cat([group.tokens.flatten() for group in groups])
    assert flat[places].tolist() == list(range(ends.size))
    assert plan.pieces.num_tokens == ends.size
    assert plan.paths.num_tokens == sum(path.size for path in plan.forest.paths())
    done = {-1}
    for group in groups:
        above = {int(plan.forest.piece_parents[piece]) for piece in group.members}
        assert above <= done
        assert above == {-1} or -1 not in above
        done |= set(group.members)
    for group in (*groups, *plan.paths.groups):
        full = group.tokens.numel() if group.tokens.shape[1] > 2 else len(group.members)
        assert group.num_tokens >= (1 - MAX_PADDING) * full


def test_a_plan_is_made_once_a_mask():
    plan = plan_of(MASK)
    assert plan_of(MASK.clone()) is plan
    changed = MASK.clone()
    changed[:, 0, 0, 0] = 1
    assert plan_of(changed) is not plan


def mixer_of(family):
    """A layer of a patched fp64 model of `family`, and how many channels it takes."""
    model = patch(fp64_model(family))
    return mixers(model)[0].mixer, model.config.hidden_size


def outcome(mixer, hidden, mask=None):
    """What a layer gives for each token [B, L, C]: of several tensors, all side by side."""
    if type(mixer).__name__ == "MiniMaxLightningAttention":
        return mixer(hidden_states=hidden, position_embeddings=None, attention_mask=mask)[0]
    if type(mixer).__name__ == "ZayaCCAProjection":
        return torch.cat([part.flatten(2) for part in mixer(hidden, None, mask)], dim=-1)
    return mixer(hidden_states=hidden, attention_mask=mask)


def values_and_gradients(mixer, hidden, weights, run):
    """Outputs [B * L, C] of `run`, and the gradients of their weighted sum."""
    mixer.zero_grad()
    hidden = hidden.clone().requires_grad_()
    output = run(hidden)
    (output * weights[:, : output.shape[-1]]).sum().backward()
    return [output.detach(), hidden.grad, *(p.grad.clone() for p in mixer.parameters())]


@pytest.mark.parametrize(
    ("family", "is_unrolled"),
    [*((family, False) for family in supported(KINDS)), ("qwen3_5_text", True)],
)
def test_a_layer_runs_along_every_path(family, is_unrolled):
    mixer, width = mixer_of(family)
    mixer.__dict__[STATE].is_unrolled |= is_unrolled

    @settings(max_examples=10, deadline=None)
    @given(batches(), st.integers(0, 99))
    def check(batch, seed):
        ends, depths, dense = batch
        generator = torch.Generator().manual_seed(seed)
        shape = (*ends.shape, width)
        hidden = torch.randn(shape, generator=generator, dtype=torch.float64)
        weights = torch.randn(ends.size, 64, generator=generator, dtype=torch.float64)
        mask = to_mask(torch.from_numpy(ends), torch.from_numpy(depths))

        def on_the_tree(x):
            return outcome(mixer, x, mask).flatten(0, 1)

        def path_by_path(x):
            flat, values = x.flatten(0, 1), {}
            for leaf in np.flatnonzero(dense.sum(0) == 1):
                path = np.flatnonzero(dense[leaf])
                values.update(zip(path, outcome(mixer, flat[None, path])[0], strict=True))
            return torch.stack([values[token] for token in range(ends.size)])

        ours = values_and_gradients(mixer, hidden, weights, on_the_tree)
        theirs = values_and_gradients(mixer, hidden, weights, path_by_path)
        scale = max(float(t.abs().max()) for t in theirs[1:])
        for a, b in zip(ours, theirs, strict=True):
            assert (a - b).abs().max() <= 1e-10 * max(1.0, scale)

    with doubled():
        check()


@pytest.mark.parametrize(
    ("turns", "through"),
    [([(60, 300, 120)] * 16, 9480), ([(60, 300, 120)] * 6, 3480)],
)
def test_states_and_convolutions_cost_unique_tokens(turns, through):
    tree = PrefixTree.from_turns(turns)
    plan = Plan(compile_mask(tree).subtree_end)
    assert tree.num_tokens == plan.pieces.num_tokens == plan.pieces.num_padded == through
    assert plan.paths.num_tokens == tree.num_sample_tokens
    assert len(plan.pieces.groups) == len(turns) + 1  # calls of the scan
    assert plan.chains(3)[0].numel() == through + 3 * len(turns)


def causal_conv1d_fn(*_, **__):
    """What `Careless` ought to call."""


class Careless(torch.nn.Module):
    def forward(self, hidden_states, attention_mask=None, is_careful=False, **options):
        return causal_conv1d_fn(hidden_states, **options) if is_careful else hidden_states


def test_a_layer_that_looks_along_the_sequence_in_another_way_is_refused():
    layer = MixerForward(Careless(), ("causal_conv1d_fn",))
    assert not layer.is_unrolled
    with pytest.raises(FlexmaskError, match="Careless did not call causal_conv1d_fn"):
        layer(torch.zeros(1, 3, 2), attention_mask=MASK)


def test_sequences_packed_inside_a_tree_batch_are_refused():
    layer = MixerForward(Careless(), ("causal_conv1d_fn",))
    with pytest.raises(FlexmaskError, match="causal_conv1d_fn with seq_idx is not exact"):
        layer(torch.zeros(1, 3, 2), attention_mask=MASK, is_careful=True, seq_idx=MASK)


def test_a_layer_whose_forward_another_library_replaced_runs_that_on_unrolled_paths():
    module = Careless()
    module.forward = lambda hidden_states, **_: hidden_states.cumsum(1)
    layer = MixerForward(module, ("causal_conv1d_fn",))
    assert layer.is_unrolled
    output = layer(torch.ones(1, 3, 1), attention_mask=MASK)
    assert output.flatten().tolist() == [1, 2, 2]
