"""Which pair comes when: a pure function of (seed, epoch, step, rank, world).

There is no shuffled list and no state.  A keyed permutation of 0 … size - 1 is computed for the few indices that a step
asks for, so that a step costs the same whatever the size of the set, and going on in the middle of an epoch needs one
integer.

A slot is one position of an epoch: an image when each image comes with one random caption, or a pair of image and
caption when every pair comes once.  Where neighbouring images are best read together (tar shards), slots are cut into
blocks, the blocks are permuted, and slots are permuted within a window of consecutive blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from tercet.errors import TercetError

ROUNDS = 8
SMALL = 1024  # sets up to this size are sorted by their hashes: a Feistel network over few bits mixes badly
WINDOW_BLOCKS = 16
MASK64 = (1 << 64) - 1

# Separate random streams of one seed.
_BLOCKS, _WITHIN, _TAIL, _CAPTION = range(4)


@dataclass(frozen=True)
class Pairs:
    """The pairs of one step on one rank.

    Attributes:
        images: int64 [pairs]; index of the image in the source.
        captions: int64 [pairs]; index of the caption among those of its image.
        slots: int64 [pairs]; number of the pair, from which the random choices of its augmentation follow.
    """

    images: np.ndarray
    captions: np.ndarray
    slots: np.ndarray

    def __len__(self) -> int:
        return len(self.slots)


class PairOrder:
    """The order of training pairs.

    Args:
        caption_counts: integers [images], at least 1 each.
        batch_size: pairs a step, over all ranks together; each takes an even share, so that any number of ranks sees
            together what one rank sees alone.
        seed: any non-negative integer.
        choice: 'random': each image once an epoch, with one of its captions; 'each': every pair once an epoch.
        rank, world: this process among all that train together.
        drop_last: skip the last batch of an epoch when it is smaller than the others (another few pairs each
            epoch).  A set smaller than one batch always gives one smaller batch.
        block_size: neighbouring images that are best read about the same time; 1: shuffle freely.

    Raises:
        TercetError: there are no images.
    """

    def __init__(
        self,
        caption_counts: np.ndarray,
        batch_size: int,
        seed: int,
        choice: Literal["random", "each"] = "random",
        *,
        rank: int = 0,
        world: int = 1,
        drop_last: bool = True,
        block_size: int = 1,
    ) -> None:
        if not len(caption_counts):
            raise TercetError("there are no images to order; name a source that holds some")
        if not 0 <= rank < world or batch_size < world:
            raise TercetError(
                f"rank {rank} of {world} has no part of a batch of {batch_size}; raise train.batch_size or start fewer "
                "processes"
            )
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world = world
        self._counts = np.asarray(caption_counts, np.int64)
        self._ends = np.cumsum(self._counts) if choice == "each" else None
        self.slot_count = len(self._counts) if self._ends is None else int(self._ends[-1])
        self._block_size = block_size
        whole, rest = divmod(self.slot_count, batch_size)
        self.steps_per_epoch = whole if whole and (drop_last or not rest) else whole + 1

    def step_indices(self, epoch: int, step: int) -> Pairs:
        """The pairs of this rank at `step` of `epoch`; over all steps and ranks each slot comes at most once.

        Without `drop_last` it comes exactly once.  A last batch with fewer pairs than ranks leaves some ranks empty.

        Raises:
            IndexError: the epoch has no such step.
        """
        if not 0 <= step < self.steps_per_epoch:
            raise IndexError(f"step {step} of an epoch of {self.steps_per_epoch} steps")
        start = step * self.batch_size
        size = min(self.batch_size, self.slot_count - start)
        own = np.arange(start + size * self.rank // self.world, start + size * (self.rank + 1) // self.world)
        slots = shuffled(own, self.slot_count, mix(self.seed, epoch), self._block_size)
        if self._ends is None:
            random = hash_each(slots, mix(self.seed, epoch, _CAPTION)) >> np.uint64(32)
            captions = (random * self._counts[slots].astype(np.uint64)) >> np.uint64(32)
            return Pairs(slots, captions.astype(np.int64), slots)
        images = np.searchsorted(self._ends, slots, side="right")
        return Pairs(images, slots - (self._ends[images] - self._counts[images]), slots)


def shuffled(positions: np.ndarray, size: int, key: int, block_size: int = 1) -> np.ndarray:
    """The slots at `positions` of a shuffled order of 0 … size - 1: int64, of the shape of `positions`.

    With `block_size` above 1 the slots at WINDOW_BLOCKS * block_size consecutive positions come from WINDOW_BLOCKS
    blocks of that many neighbouring slots.
    """
    window = block_size * WINDOW_BLOCKS
    if block_size == 1 or window >= size:
        return permute(positions, size, mix(key, _WITHIN))
    windows = positions // window
    inside = np.empty_like(positions)
    for number in np.unique(windows):
        here = windows == number
        start = int(number) * window
        length = min(window, size - start)
        inside[here] = start + permute(positions[here] - start, length, mix(key, _WITHIN, int(number)))
    return _permute_blocks(inside, size, key, block_size)


def _permute_blocks(positions: np.ndarray, size: int, key: int, block_size: int) -> np.ndarray:
    """Permute whole blocks; the shorter block that may be left at the end comes somewhere among them."""
    blocks, rest = divmod(size, block_size)
    tail_block = mix(key, _TAIL) % (blocks + 1)
    tail_start = tail_block * block_size
    in_tail = (positions >= tail_start) & (positions < tail_start + rest)
    among_whole = np.where(positions < tail_start, positions, positions - rest)
    among_whole = np.where(in_tail, 0, among_whole)
    moved = permute(among_whole // block_size, blocks, mix(key, _BLOCKS)) * block_size + among_whole % block_size
    return np.where(in_tail, blocks * block_size + positions - tail_start, moved)


def permute(indices: np.ndarray, size: int, key: int) -> np.ndarray:
    """Image of `indices` (each in 0 … size - 1) under the permutation of 0 … size - 1 that `key` names.

    A Feistel network permutes the numbers below the next power of two; a result of `size` or more goes through it again
    (Black and Rogaway's cycle walking), which takes fewer than two passes on average.
    """
    if size <= SMALL:
        return np.argsort(hash_each(np.arange(size), key), kind="stable")[indices]
    bits = (size - 1).bit_length()
    keys = [np.uint64(mix(key, number)) for number in range(ROUNDS)]
    values = _feistel(indices.astype(np.uint64), bits, keys)
    outside = np.flatnonzero(values >= size)
    while len(outside):
        values[outside] = _feistel(values[outside], bits, keys)
        outside = outside[values[outside] >= size]
    return values.astype(np.int64)


def _feistel(values: np.ndarray, bits: int, keys: list[np.uint64]) -> np.ndarray:
    """A permutation of the numbers of `bits` bits: the two halves, unequal when `bits` is odd, take turns."""
    low_bits, high_bits = np.uint64(bits // 2), np.uint64(bits - bits // 2)
    for key in keys:
        high, low = values >> low_bits, values & ((np.uint64(1) << low_bits) - np.uint64(1))
        high ^= hash_each(low, key) >> (np.uint64(64) - high_bits)
        # The halves change places, and with them their widths.
        values = (low << high_bits) | high
        low_bits, high_bits = high_bits, low_bits
    return values


def hash_each(values: np.ndarray, key: int | np.uint64) -> np.ndarray:
    """64 well-mixed bits of each of `values` uint64 or int64, by the finaliser of SplitMix64."""
    mixed = values.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def mix(*numbers: int) -> int:
    """64 bits that follow from the numbers and their order."""
    state = 0x243F6A8885A308D3
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK64
        state ^= state >> 31
    return state
