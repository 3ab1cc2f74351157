"""Samples like those of conversations."""

import numpy as np

from flexmask import Sample


def random_samples(seed, num_samples=5, stem=6, tail=5, vocabulary=50):
    """Samples like those of a conversation: each leaves a growing common history."""
    rng = np.random.default_rng(seed)
    history: list[int] = []
    samples = []
    for key in range(num_samples):
        history = history + rng.integers(0, vocabulary, stem).tolist()
        completion = rng.integers(0, vocabulary, tail).tolist()
        weights = [0.0] * len(history) + [1.0] * tail
        samples.append(Sample(history + completion, weights, key))
    return samples
