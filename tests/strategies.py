"""Random samples and forests, shared by the property tests."""

from hypothesis import strategies as st
from sample_cases import random_samples as random_samples

from flexmask import PrefixTree, Sample, Segment


@st.composite
def sample_lists(draw, max_samples=6, max_length=12, vocabulary=3):
    """Samples with much in common: forks everywhere, prefixes of others, identical ones."""
    samples = []
    for key in range(draw(st.integers(1, max_samples))):
        stem: list[int] = []
        if samples and draw(st.booleans()):
            other = draw(st.sampled_from(samples)).input_ids.tolist()
            stem = other[: draw(st.integers(0, len(other)))]
        token = st.integers(0, vocabulary - 1)
        room = max_length - len(stem)
        rest = draw(st.lists(token, min_size=0 if stem else 1, max_size=max(room, 1)))
        ids = stem + rest
        weights = draw(
            st.lists(st.sampled_from([0, 0, 1, 1, 0.5]), min_size=len(ids), max_size=len(ids))
        )
        samples.append(Sample(ids, weights, key))
    return samples


@st.composite
def segment_trees(draw, max_segments=12, max_length=9):
    """Trees without tokens: any shape from a chain to a star, several roots included."""
    segments = []
    for index in range(draw(st.integers(1, max_segments))):
        parent = draw(st.one_of(st.none(), st.integers(0, index - 1))) if index else None
        segments.append(Segment(draw(st.integers(1, max_length)), parent))
    return PrefixTree.from_segments(segments)


def forests(max_trees=3, **kwargs):
    """Lists of one or more trees, as one packed row holds them."""
    return st.lists(segment_trees(**kwargs), min_size=1, max_size=max_trees)
