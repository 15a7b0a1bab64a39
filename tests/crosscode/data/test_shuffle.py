"""The shuffle buffer hands out every row once, at random."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crosscode.data import shuffle
from crosscode.data.shuffle import ShuffleBuffer


def make(capacity, seed=0):
    return ShuffleBuffer(capacity, (2,), generator=torch.Generator().manual_seed(seed), dtype=torch.int64)


def numbered(first, n):
    return torch.arange(first, first + n)[:, None].expand(n, 2)


@given(
    capacity=st.integers(1, 40),
    steps=st.lists(st.tuples(st.booleans(), st.integers(1, 30)), max_size=30),
    seed=st.integers(0, 3),
)
@settings(max_examples=150, deadline=None)
def test_no_row_is_lost_or_repeated(capacity, steps, seed):
    buffer, offered, inside, taken = make(capacity, seed), 0, set(), []
    for is_put, n in steps:
        if is_put:
            n_put = buffer.put(numbered(offered, n))
            assert n_put == min(n, capacity - len(inside))
            inside |= set(range(offered, offered + n_put))
            offered += n_put
        else:
            rows = buffer.take(n)
            assert torch.equal(rows[:, 0], rows[:, 1])
            batch = rows[:, 0].tolist()
            assert len(batch) == len(set(batch)) == min(n, len(inside))
            assert set(batch) <= inside
            inside -= set(batch)
            taken += batch
        assert buffer.n_rows == len(inside)
    assert len(taken) == len(set(taken))


def test_draws_are_uniform():
    counts = torch.zeros(20)
    for seed in range(2000):
        buffer = make(20, seed)
        buffer.put(numbered(0, 20))
        counts[buffer.take(4)[:, 0]] += 1
    assert abs(counts - 400).max() < 100


def test_saving_changes_nothing_and_restores_everything():
    plain, saved = make(16), make(16)
    restored = make(16)
    for buffer in (plain, saved):
        buffer.put(numbered(0, 16))
        buffer.take(5)
        buffer.put(numbered(16, 2))
    restored.load_state_dict(saved.state_dict())
    for step in range(4):
        batches = []
        for buffer in (plain, saved, restored):
            batches.append(buffer.take(3))
            buffer.put(numbered(100 + step, 2))
        saved.state_dict()
        assert torch.equal(batches[0], batches[1])
        assert torch.equal(batches[0], batches[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_buffer_deals_like_a_small_one(monkeypatch, dtype):
    """From 64 MiB on the rows lie in memory of another kind."""
    dealt = []
    for huge_from in (1, 1 << 60):
        monkeypatch.setattr(shuffle, "_HUGE_FROM_BYTES", huge_from)
        buffer = ShuffleBuffer(500, (2, 3), generator=torch.Generator().manual_seed(0), dtype=dtype)
        rows = torch.randn(800, 2, 3, generator=torch.Generator().manual_seed(1)).to(dtype)
        buffer.put(rows[:500])
        first = buffer.take(100)
        buffer.put(rows[500:600])
        dealt.append(torch.cat([first, buffer.take(500)]))
    assert torch.equal(*dealt)
    assert torch.equal(dealt[0].flatten(1).sort(dim=0).values, rows[:600].flatten(1).sort(dim=0).values)
