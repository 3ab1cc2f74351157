"""Random masks, and how far back queries see, for Hypothesis."""

import numpy as np
from backend_cases import mask_from_depths, stack
from hypothesis import strategies as st


@st.composite
def depth_lists(draw, max_tokens=40):
    """Depths of a random forest in any preorder: chains, stars, caterpillars, lone tokens."""
    drop = draw(st.sampled_from([0.02, 0.2, 0.5, 0.9]))  # how often a token ends its branch
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    depths = [0]
    for _ in range(draw(st.integers(0, max_tokens - 1))):
        depth = depths[-1] + 1
        depths.append(int(rng.integers(0, depth + 1)) if rng.random() < drop else depth)
    return depths


def masks(max_rows=3, max_tokens=40):
    """Masks of one or more rows, padded where they differ in length."""
    rows = st.lists(depth_lists(max_tokens), min_size=1, max_size=max_rows)
    return rows.map(lambda lists: stack([mask_from_depths(depths) for depths in lists]))


def windows(max_positions=30):
    """Options that limit how far back a query sees: none, a window, a chunk, or both."""
    positions = st.integers(1, max_positions)
    return st.one_of(
        st.just({}),
        st.fixed_dictionaries({"window": positions}),
        st.fixed_dictionaries({"chunk": positions}),
        st.fixed_dictionaries({"window": positions, "chunk": positions}),
    )
