"""The order of pairs: every pair once, whatever the ranks, and the same again from any step on."""

from __future__ import annotations

import time
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tercet.data.order import WINDOW_BLOCKS, PairOrder, mix, permute, shuffled
from tercet.data.table import BLOCKS_REMEMBERED
from tercet.errors import TercetError

sizes = st.integers(1, 1100) | st.integers(1100, 9000)
keys = st.integers(0, 2**64 - 1)
counts = st.lists(st.integers(1, 6), min_size=1, max_size=200)
choices = st.sampled_from(["random", "each"])


def epoch_pairs(
    caption_counts: list[int], batch_size: int, world: int, choice: Literal["random", "each"], epoch: int = 0, **options
) -> list[list[tuple[int, int]]]:
    """The (image, caption) pairs of each step, those of rank 0 first; `batch_size` of them over all ranks."""
    steps: list[list[tuple[int, int]]] = []
    orders = [
        PairOrder(np.array(caption_counts), batch_size, 7, choice, rank=rank, world=world, **options)
        for rank in range(world)
    ]
    assert len({order.steps_per_epoch for order in orders}) == 1  # no rank waits for another at the end of an epoch
    for step in range(orders[0].steps_per_epoch):
        parts = [order.step_indices(epoch, step) for order in orders]
        steps.append(
            [pair for part in parts for pair in zip(part.images.tolist(), part.captions.tolist(), strict=True)]
        )
    return steps


@given(sizes, keys)
def test_permute_is_a_permutation(size: int, key: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(size), size, key)), np.arange(size))


@given(sizes, keys, st.integers(1, 400))
def test_shuffled_is_a_permutation_for_every_block_size(size: int, key: int, block: int) -> None:
    assert np.array_equal(np.sort(shuffled(np.arange(size), size, key, block)), np.arange(size))


@given(sizes, keys, st.integers(1, 50), st.data())
def test_a_part_of_the_order_equals_that_part_of_the_whole(
    size: int, key: int, block: int, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, size - 1))
    part = np.arange(start, min(start + 40, size))
    assert np.array_equal(shuffled(part, size, key, block), shuffled(np.arange(size), size, key, block)[part])


def test_permute_of_a_small_set_is_close_to_uniform() -> None:
    draws = np.stack([permute(np.arange(5), 5, mix(key)) for key in range(10_000)])
    for position in range(5):
        share = np.bincount(draws[:, position], minlength=5) / len(draws)
        assert np.abs(share - 0.2).max() < 0.02  # five standard deviations
    orders = np.unique(draws, axis=0, return_counts=True)[1]
    assert len(orders) == 120
    assert orders.max() < 2 * 10_000 / 120


def test_neighbours_of_a_shuffle_are_unrelated() -> None:
    order = shuffled(np.arange(50_000), 50_000, 3)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(order, np.arange(50_000))[0, 1]) < 0.02


def test_a_window_reads_few_blocks() -> None:
    size, block = 100_000, 100
    order = shuffled(np.arange(size), size, 3, block)
    windows = [order[start : start + block * WINDOW_BLOCKS] // block for start in range(0, size, block * WINDOW_BLOCKS)]
    assert max(len(np.unique(window)) for window in windows) <= WINDOW_BLOCKS + 1
    # Yet a batch mixes blocks from all over the set.
    assert len(np.unique(order[:64] // block)) > WINDOW_BLOCKS // 2
    assert np.ptp(order[:64]) > size / 2


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 9000), keys, st.integers(2, 200), st.integers(1, 7))
def test_every_block_is_begun_once_an_epoch(size: int, key: int, block: int, batch: int) -> None:
    """What makes reading tar shards nearly sequential: a block is read ahead once, and found there until it is done."""
    order = shuffled(np.arange(size), size, key, block)
    open_blocks: dict[int, None] = {}
    begun: list[int] = []
    for number in (order // block).tolist():
        if number not in open_blocks:
            begun.append(number)
        open_blocks.pop(number, None)
        open_blocks[number] = None
        if len(open_blocks) > BLOCKS_REMEMBERED:
            del open_blocks[next(iter(open_blocks))]
    assert sorted(begun) == list(range(-(-size // block)))
    # Of any stretch of a window, whoever reads it, samples come from two windows of blocks at most.
    window = block * WINDOW_BLOCKS
    for start in range(0, size, window):
        assert len(np.unique(order[start : start + window] // block)) <= WINDOW_BLOCKS + 2


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 400), st.integers(5, 64), st.integers(2, 30), st.integers(0, 5), st.integers(1, 6), st.data())
def test_an_epoch_goes_on_from_any_step_by_that_number_alone(
    images: int, batch_size: int, block: int, epoch: int, workers: int, data: st.DataObject
) -> None:
    caption_counts = np.ones(images, np.int64)
    whole = PairOrder(caption_counts, batch_size, 5, "each", drop_last=False, block_size=block)
    step = data.draw(st.integers(0, whole.steps_per_epoch - 1))
    before = np.concatenate([np.zeros(0, np.int64), *(whole.step_indices(epoch, s).images for s in range(step))])
    # Another process begins there, and hands the steps to its workers in turn, each with an order of its own.
    orders = [
        PairOrder(caption_counts, batch_size, 5, "each", drop_last=False, block_size=block) for _ in range(workers)
    ]
    after = [orders[s % workers].step_indices(epoch, s).images for s in range(step, whole.steps_per_epoch)]
    assert sorted(np.concatenate([before, *after]).tolist()) == list(range(images))


@given(counts, st.integers(1, 40), st.integers(1, 5), st.integers(0, 3), st.sampled_from([1, 4]))
def test_every_pair_once_over_all_ranks(
    caption_counts: list[int], batch_size: int, world: int, epoch: int, block: int
) -> None:
    steps = epoch_pairs(caption_counts, batch_size * world, world, "each", epoch, drop_last=False, block_size=block)
    seen = sorted(pair for step in steps for pair in step)
    assert seen == [(image, caption) for image, count in enumerate(caption_counts) for caption in range(count)]


@given(counts, st.integers(1, 40), st.integers(1, 5), st.integers(0, 3))
def test_random_choice_gives_every_image_once_with_a_caption_of_its_own(
    caption_counts: list[int], batch_size: int, world: int, epoch: int
) -> None:
    steps = epoch_pairs(caption_counts, batch_size * world, world, "random", epoch, drop_last=False)
    seen = [pair for step in steps for pair in step]
    assert sorted(image for image, _ in seen) == list(range(len(caption_counts)))
    assert all(0 <= caption < caption_counts[image] for image, caption in seen)


@given(counts, st.integers(12, 40), st.integers(1, 12), st.integers(1, 12), choices, st.booleans())
def test_a_run_that_continues_on_other_ranks_sees_the_same_batches(
    caption_counts: list[int],
    global_batch: int,
    before: int,
    after: int,
    choice: Literal["random", "each"],
    drop_last: bool,
) -> None:
    alone, first, later = (
        epoch_pairs(caption_counts, global_batch, world, choice, 2, drop_last=drop_last) for world in (1, before, after)
    )
    assert first == later == alone  # so that it may change the ranks after any step
    seen = [pair for step in alone for pair in step]
    assert len(set(seen)) == len(seen)
    if not drop_last:
        assert len({image for image, _ in seen}) == len(caption_counts)


@given(counts, st.integers(12, 60), st.integers(1, 12))
def test_shares_of_a_batch_differ_by_one_pair_at_most(caption_counts: list[int], batch_size: int, world: int) -> None:
    sizes = np.array(caption_counts)
    orders = [PairOrder(sizes, batch_size, 7, "each", rank=rank, world=world) for rank in range(world)]
    for step in range(orders[0].steps_per_epoch):
        shares = [len(order.step_indices(0, step)) for order in orders]
        assert max(shares) - min(shares) <= 1


@given(counts, st.integers(1, 40), st.integers(1, 4), choices)
def test_dropping_the_last_batch_leaves_full_batches(
    caption_counts: list[int], batch_size: int, world: int, choice: Literal["random", "each"]
) -> None:
    steps = epoch_pairs(caption_counts, batch_size * world, world, choice, drop_last=True)
    slots = len(caption_counts) if choice == "random" else sum(caption_counts)
    if slots < batch_size * world:
        assert [len(step) for step in steps] == [slots]
    else:
        assert [len(step) for step in steps] == [batch_size * world] * (slots // (batch_size * world))


@settings(max_examples=20)
@given(st.integers(0, 2**63), st.integers(0, 50))
def test_seeds_and_epochs_give_other_orders_and_the_same_again(seed: int, epoch: int) -> None:
    def slots(seed: int, epoch: int) -> list[int]:
        order = PairOrder(np.full(500, 5), 500, seed)
        return order.step_indices(epoch, 0).slots.tolist()

    assert slots(seed, epoch) == slots(seed, epoch)
    assert slots(seed, epoch) != slots(seed + 1, epoch)
    assert slots(seed, epoch) != slots(seed, epoch + 1)


def test_captions_are_drawn_evenly_over_epochs() -> None:
    order = PairOrder(np.full(400, 5), 400, 0)
    drawn = np.zeros((400, 5), np.int64)
    for epoch in range(50):
        pairs = order.step_indices(epoch, 0)
        drawn[pairs.images, pairs.captions] += 1
    assert np.abs(drawn.sum(0) / drawn.sum() - 0.2).max() < 0.015
    assert (drawn > 0).mean() > 0.99


def test_a_step_costs_the_same_in_a_large_set() -> None:
    order = PairOrder(np.ones(10_000_000, np.int64), 256, 0, block_size=1024)
    start = time.perf_counter()
    for step in range(20):
        assert len(order.step_indices(1, step * 1000)) == 256
    assert (time.perf_counter() - start) / 20 < 0.05


def test_refusals() -> None:
    with pytest.raises(TercetError, match="no images"):
        PairOrder(np.zeros(0, np.int64), 4, 0)
    with pytest.raises(TercetError, match="rank 2 of 2"):
        PairOrder(np.ones(3, np.int64), 4, 0, rank=2, world=2)
    with pytest.raises(IndexError, match="step 1 of an epoch of 1"):
        PairOrder(np.ones(3, np.int64), 4, 0).step_indices(0, 1)
