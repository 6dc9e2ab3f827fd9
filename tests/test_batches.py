"""lib/batches.py: each epoch reads every block once, in an order that is computed and looks random."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.batches import get_blocks, mix, permute


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
@settings(max_examples=40, deadline=None)
def test_permute_is_a_permutation(n, key):
    assert sorted(permute(i, n, key) for i in range(n)) == list(range(n))


def test_permute_looks_random():
    """
    Over many keys, each number lands at each place equally often (chi-square test). A trillion numbers need no table.
    """
    n, keys = 13, 2_600
    counts = np.zeros((n, n))
    for key in range(keys):
        for i in range(n):
            counts[i, permute(i, n, mix(key))] += 1
    expected = keys / n
    assert ((counts - expected) ** 2 / expected).sum() < 250  # 144 degrees of freedom, so 5 sigma is 229
    assert 0 <= permute(123_456_789_012, 10**12, 7) < 10**12


def test_blocks_cover_each_epoch_once():
    data = np.arange(1000, dtype="<u2")
    starts = []
    for epoch in range(3):
        n = (1000 - 16) // 16
        x, y = get_blocks(data, epoch * n, n, 16, seed=5)
        assert torch.equal(y, x + 1)
        first = sorted(x[:, 0].tolist())
        assert [b - a for a, b in zip(first, first[1:], strict=False)] == [16] * (n - 1)
        assert x[:, 0].tolist() != first
        starts.append(first[0])
    assert len(set(starts)) > 1  # the offset changes from epoch to epoch


@pytest.mark.parametrize("length", [17, 18, 31, 32, 33, 47, 48, 49])
def test_short_data(length):
    data = np.arange(length, dtype="<u2")
    x, y = get_blocks(data, 0, 200, 16, seed=3)
    assert x.min() == 0 and y.max() == length - 1  # the first and the last token are read too
    assert torch.equal(y, x + 1)


def test_ranks_together_read_the_global_batch():
    data = np.arange(5000, dtype="<u2")
    x, _ = get_blocks(data, 24, 8, 16, seed=1)
    assert torch.equal(x, torch.cat([get_blocks(data, 24 + 2 * rank, 2, 16, seed=1)[0] for rank in range(4)]))


def test_conversations_are_read_row_by_row_and_their_mask_hides_targets():
    data, mask = np.arange(7 * 9, dtype=np.uint16), np.arange(7 * 9, dtype=np.uint8) % 3 == 0
    for epoch in range(2):
        x, y = get_blocks(data, 7 * epoch, 7, 8, seed=5, mask=mask)
        assert sorted(x[:, 0].tolist()) == list(range(0, 63, 9))  # each row once, from its first id
        target = x + 1
        assert torch.equal(y, torch.where(target % 3 == 0, target, -1))
