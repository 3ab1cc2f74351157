"""What is made of a mask once: when it is taken again, and when it is not."""

from unittest import mock

import numpy as np
import pytest
import torch

from flexmask.backends.cache import _KEPT, _cache, per_mask_cache


@pytest.fixture(autouse=True)
def _nothing_is_kept_yet():
    _cache.clear()


def scaled(x, factor=2):
    return x * factor


def halved(x):
    return x // 2


def test_views_functions_and_options_are_told_apart():
    x = torch.arange(12).view(2, 6)
    first = per_mask_cache(scaled, x[0])
    assert per_mask_cache(scaled, x[0]) is first
    for make, part, options in (
        *((halved, x[0], {}), (scaled, x[0], {"factor": 3})),
        *((scaled, x[1], {}), (scaled, x[:, 0], {})),
    ):
        assert torch.equal(per_mask_cache(make, part, **options), make(part, **options))


@pytest.mark.parametrize("device", ["cpu", "meta"])  # by values, and by place in memory
def test_a_written_tensor_is_a_new_one(device):
    x, y = torch.arange(4, device=device), torch.arange(4, device=device)
    first = per_mask_cache(torch.add, x, y)
    assert per_mask_cache(torch.add, x, y) is first
    y.add_(1)
    assert per_mask_cache(torch.add, x, y) is not first
    if device == "cpu":
        assert per_mask_cache(torch.add, x, y).tolist() == [1, 3, 5, 7]


def test_memory_that_others_write_to_is_looked_at_every_time():
    values = np.arange(4)
    x = torch.from_numpy(values)
    per_mask_cache(scaled, x)
    values += 1
    assert per_mask_cache(scaled, x).tolist() == [2, 4, 6, 8]


def test_equal_masks_share_what_is_made_of_them():
    assert per_mask_cache(scaled, torch.arange(4)) is per_mask_cache(scaled, torch.arange(4))


@pytest.mark.parametrize("made_inside", [True, False])
def test_what_inference_mode_made_can_be_trained_with(made_inside):
    x = torch.arange(4)
    with torch.inference_mode():
        per_mask_cache(torch.zeros_like, x.clone() if made_inside else x)
    assert not per_mask_cache(torch.zeros_like, x).is_inference()


def test_nothing_is_kept_for_a_captured_graph():
    with mock.patch("flexmask.backends.cache.is_capturing", return_value=True):
        per_mask_cache(scaled, torch.empty(4, device="meta"))
    assert not _cache


def test_what_is_made_of_a_mask_elsewhere_goes_with_its_memory():
    kept = torch.empty(4, device="meta")
    per_mask_cache(scaled, torch.empty(4, device="meta"))
    per_mask_cache(scaled, kept)
    assert len(_cache) == 1


def test_no_more_than_a_few_things_are_kept():
    x = torch.arange(4)
    first = per_mask_cache(scaled, x, factor=0)
    second = per_mask_cache(scaled, x, factor=1)
    assert per_mask_cache(scaled, x, factor=0) is first  # and now the newer one
    for factor in range(2, _KEPT + 1):
        per_mask_cache(scaled, x, factor=factor)
    assert len(_cache) == _KEPT
    assert per_mask_cache(scaled, x, factor=0) is first
    assert per_mask_cache(scaled, x, factor=1) is not second
