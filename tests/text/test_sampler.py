import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clinometer.messages import InputError
from clinometer.text.sampler import (
    batch,
    permute,
    sample_windows,
    validation_windows,
    windows_per_epoch,
)

lengths = st.integers(1, 40)
seeds = st.integers(0, 2**63)


@given(st.integers(1, 5000), seeds, st.integers(0, 10**6))
def test_permute_is_a_permutation(n, seed, epoch):
    image = permute(np.arange(n, dtype=np.uint64), n, seed, epoch)
    assert np.array_equal(np.sort(image), np.arange(n))


def test_permute_moves_about_everything_and_differs_by_seed_and_epoch():
    n = 10_000
    images = [permute(np.arange(n, dtype=np.uint64), n, *key) for key in ((0, 0), (0, 1), (1, 0))]
    for image in images:
        assert (image == np.arange(n)).sum() < 20, "a random permutation has one fixed point on average"
        steps = np.diff(image.astype(np.int64))
        assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) < 0.05
        assert np.unique(steps).size > n / 4
    assert (images[0] == images[1]).sum() < 20
    assert (images[0] == images[2]).sum() < 20


def test_a_million_million_windows_need_no_table():
    n = 10**12
    positions = np.arange(n - 1000, n, dtype=np.uint64)
    image = permute(positions, n, 7, 3)
    assert image.max() < n
    assert np.unique(image).size == 1000
    starts = sample_windows(256 * 10**12 + 256, 256, 64, 0, 10**10)
    assert starts.min() >= 0
    assert starts.max() + 257 <= 256 * 10**12 + 256


@settings(deadline=None)
@given(st.integers(0, 500), lengths, st.integers(1, 9), seeds)
def test_each_epoch_visits_each_window_once_without_overlap_and_in_range(extra, context, size, seed):
    tokens = context + 1 + extra
    n = windows_per_epoch(tokens, context)
    steps = -(-3 * n // size)
    starts = np.concatenate([sample_windows(tokens, context, size, seed, step) for step in range(steps)])
    assert starts.min() >= 0
    assert starts.max() + context + 1 <= tokens
    for epoch in range(3):
        visited = np.sort(starts[epoch * n : (epoch + 1) * n])
        assert (np.diff(visited) == context).all(), "every window of one grid, each once"


@given(st.integers(2, 3000), lengths)
def test_an_epoch_leaves_out_fewer_than_two_windows_of_tokens(tokens, context):
    if tokens > context:
        assert tokens - 1 - windows_per_epoch(tokens, context) * context < 2 * context


def test_epochs_use_different_grids():
    n = windows_per_epoch(10_000, 100)
    offsets = {int(sample_windows(10_000, 100, n, 0, epoch).min()) for epoch in range(50)}
    assert len(offsets) > 25
    assert max(offsets) < 100


@given(st.integers(20, 2000), st.integers(1, 10), st.integers(1, 16), seeds, st.integers(0, 10**9))
def test_a_batch_is_a_pure_function_of_seed_and_step(tokens, context, size, seed, step):
    first = sample_windows(tokens, context, size, seed, step)
    sample_windows(tokens, context, size, seed, step + 1)
    assert np.array_equal(first, sample_windows(tokens, context, size, seed, step))
    parts = np.concatenate([sample_windows(tokens, context, 1, seed, step * size + j) for j in range(size)])
    assert np.array_equal(first, parts), "a batch is its windows in the order of their numbers"


@pytest.mark.parametrize("world", [1, 2, 3, 4, 12])
def test_ranks_together_see_the_batch_of_one_rank(world):
    tokens = np.arange(5000, dtype=np.uint16)
    settings = {"context_length": 16, "batch_size": 12, "seed": 3, "step": 77}
    whole, whole_targets = batch(tokens, **settings)
    for rank in range(world):
        part, targets = batch(tokens, **settings, rank=rank, world_size=world)
        assert np.array_equal(part, whole[rank::world])
        assert np.array_equal(targets, whole_targets[rank::world])


def test_targets_are_the_next_tokens():
    tokens = np.arange(1000, dtype=np.uint16)
    ids, targets = batch(tokens, context_length=7, batch_size=5, seed=0, step=0)
    assert ids.shape == targets.shape == (5, 7)
    assert ids.dtype == targets.dtype == np.int64
    assert np.array_equal(targets, ids + 1)
    assert (np.diff(ids, axis=1) == 1).all()


def test_the_order_of_windows_is_fixed_for_all_time():
    assert sample_windows(10_000, 64, 4, seed=1337, step=5).tolist() == [4476, 7932, 2556, 6204]


@given(st.integers(2, 5000), lengths, st.integers(1, 50))
def test_validation_windows_are_spread_evenly_without_overlap(tokens, context, count):
    if tokens <= context:
        return
    starts = validation_windows(tokens, context, count)
    available = (tokens - 1) // context
    assert len(starts) == min(count, available)
    assert starts[0] == 0
    assert starts[-1] + context + 1 <= tokens
    gaps = np.diff(starts) // context
    assert (gaps >= 1).all()
    assert gaps.size == 0 or gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize(("tokens", "largest"), [(0, 0), (1, 0), (256, 255)])
def test_a_text_shorter_than_a_context_says_which_context_fits(tokens, largest):
    for sample in (
        lambda: sample_windows(tokens, 256, 4, 0, 0),
        lambda: validation_windows(tokens, 256, 4),
    ):
        with pytest.raises(InputError) as caught:
            sample()
        assert caught.value.key == "text.short"
        assert caught.value.values == {"tokens": tokens, "context_length": 256, "largest": largest}


def test_the_smallest_text_gives_its_one_window_every_time():
    assert [sample_windows(257, 256, 2, seed, seed).tolist() for seed in range(3)] == [[0, 0]] * 3


def test_a_batch_that_cannot_be_is_refused():
    for size, step, context in ((0, 0, 8), (4, -1, 8), (4, 0, 0)):
        with pytest.raises(InputError):
            sample_windows(100, context, size, 0, step)
