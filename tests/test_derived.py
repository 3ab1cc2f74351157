"""What is made of a mask once: when it is taken again, and when it is not."""

from unittest import mock

import numpy as np
import pytest
import torch

from flexmask.backends.cache import _KEPT, _cache, derived


def doubled(x):
    return x * 2


def halved(x):
    return x // 2


def test_views_and_functions_are_told_apart():
    x = torch.arange(12).view(2, 6)
    first = derived(doubled, x[0], key="doubled")
    assert derived(doubled, x[0], key="doubled") is first
    assert derived(halved, x[0], key="halved").tolist() == halved(x[0]).tolist()
    assert derived(doubled, x[1], key="doubled").tolist() == doubled(x[1]).tolist()
    assert derived(doubled, x[:, 0], key="doubled").tolist() == doubled(x[:, 0]).tolist()


def test_a_written_tensor_is_a_new_one():
    x, y = torch.arange(4), torch.arange(4)
    assert derived(torch.add, x, y).tolist() == [0, 2, 4, 6]
    y.add_(1)
    assert derived(torch.add, x, y).tolist() == [1, 3, 5, 7]


def test_memory_that_others_write_to_is_looked_at_every_time():
    values = np.arange(4)
    x = torch.from_numpy(values)
    derived(doubled, x)
    values += 1
    assert derived(doubled, x).tolist() == [2, 4, 6, 8]


@pytest.mark.parametrize("made_inside", [True, False])
def test_what_inference_mode_made_can_be_trained_with(made_inside):
    x = torch.arange(4)
    with torch.inference_mode():
        inside = derived(doubled, x.clone() if made_inside else x)
    assert inside.is_inference() == made_inside
    assert not derived(doubled, x).is_inference()


def test_nothing_is_kept_for_a_captured_graph():
    x = mock.Mock(wraps=torch.arange(4), is_cuda=True, is_inference=lambda: False)
    with mock.patch("torch.cuda.is_current_stream_capturing", return_value=True):
        assert derived(id, x) == id(x)
    assert x.untyped_storage().resizable()
    assert not any(place[0] is id for known in _cache.values() for place in known)


def test_no_more_than_a_few_things_of_a_mask_are_kept():
    x = torch.arange(4)
    first = derived(doubled, x, key=0)
    for number in range(1, _KEPT + 1):
        derived(doubled, x, key=number)
    assert derived(doubled, x, key=_KEPT) is derived(doubled, x, key=_KEPT)
    assert derived(doubled, x, key=0) is not first
