"""Which windows of the tokens make up the batch of a step: a pure function, so one integer is its state.

B batch, S sequence (context_length). Numbering windows in order of use, number i = step·B + j belongs to
epoch i // n at position i % n, where n windows make an epoch. A keyed permutation of [0, n) turns the
position into a window, so an epoch visits each window once, in an order that is never stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Protocol

import numpy as np

from clinometer.messages import InputError

_ROUNDS = 6


class TokenSequence(Protocol):
    """What can be sampled from: an array of token ids, or shards that behave like one."""

    def __len__(self) -> int: ...

    def __getitem__(self, key: slice, /) -> np.ndarray: ...


def windows_per_epoch(num_tokens: int, context_length: int) -> int:
    """n: how many windows an epoch visits, at any offset; a window needs its S tokens and one more.

    Raises InputError if not even one window fits.
    """
    if context_length < 1:
        raise InputError("text.context_positive", value=context_length)
    if num_tokens < context_length + 1:
        raise InputError(
            "text.short", tokens=num_tokens, context_length=context_length, largest=max(0, num_tokens - 1)
        )
    return max(1, (num_tokens - context_length) // context_length)


def sample_windows(num_tokens: int, context_length: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """First token of each window in the batch of `step`: int64, shape (B,).

    Each epoch shifts the grid of windows by its own offset in [0, S), so texts are not always cut in the
    same places. For several workers take `[rank::world]`: the global batch is the same for any number.
    """
    if batch_size < 1 or step < 0:
        raise InputError("text.batch", batch_size=batch_size, step=step)
    n = windows_per_epoch(num_tokens, context_length)
    largest_offset = min(context_length - 1, num_tokens - 1 - n * context_length)
    starts = np.empty(batch_size, dtype=np.int64)
    done = 0
    while done < batch_size:
        epoch, position = divmod(step * batch_size + done, n)
        count = min(batch_size - done, n - position)
        positions = np.arange(position, position + count, dtype=np.uint64)
        windows = permute(positions, n, seed, epoch).astype(np.int64)
        offset = _key(seed, epoch, "offset") % (largest_offset + 1)
        starts[done : done + count] = windows * context_length + offset
        done += count
    return starts


def validation_windows(num_tokens: int, context_length: int, count: int) -> np.ndarray:
    """First tokens of at most `count` windows, evenly spaced and without overlap: int64, always the same."""
    windows_per_epoch(num_tokens, context_length)
    available = (num_tokens - 1) // context_length
    count = max(1, min(count, available))
    return np.arange(count, dtype=np.int64) * available // count * context_length


def gather(
    tokens: TokenSequence, starts: Sequence[int] | np.ndarray, context_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """(token_ids, targets), both int64 of shape (B, S); targets are the token after each token."""
    windows = [tokens[int(start) : int(start) + context_length + 1] for start in starts]
    block = np.stack(windows).astype(np.int64)
    return block[:, :-1], block[:, 1:]


def batch(
    tokens: TokenSequence,
    *,
    context_length: int,
    batch_size: int,
    seed: int,
    step: int,
    rank: int = 0,
    world_size: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """(token_ids, targets) of `step`, or this rank's part of them; `batch_size` counts all ranks together."""
    starts = sample_windows(len(tokens), context_length, batch_size, seed, step)
    return gather(tokens, starts[rank::world_size], context_length)


def parts(count: int, size: int, rank: int = 0, world_size: int = 1) -> list[tuple[slice, bool]]:
    """How a rank cuts its own windows, `[rank::world_size]` of `count`, into parts of at most `size`.

    Every rank has the same number of parts: a rank with fewer windows takes one again, marked
    False, for its loss to be weighed with 0. All windows together are marked True exactly once.
    """
    mine = len(range(rank, count, world_size))
    most = -(-count // world_size)
    cut: list[tuple[slice, bool]] = []
    for first in range(0, most, size):
        if first < mine:
            cut.append((slice(first, min(first + size, mine)), True))
        else:
            cut.append((slice(max(0, mine - 1), max(1, mine)), False))
    return cut


def permute(positions: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of [0, n) keyed by (seed, epoch), at the given positions (uint64, any shape).

    A balanced Feistel network (Luby & Rackoff 1988) on the smallest even number of bits that holds n; what
    falls outside [0, n) is sent through again until it falls inside (Black & Rogaway 2002).
    """
    half = max(1, (max(1, n - 1).bit_length() + 1) // 2)
    keys = [np.uint64(_key(seed, epoch, f"round {number}")) for number in range(_ROUNDS)]
    values = _feistel(positions.astype(np.uint64), half, keys)
    while (outside := values >= np.uint64(n)).any():
        values[outside] = _feistel(values[outside], half, keys)
    return values


def _feistel(values: np.ndarray, half: int, keys: Sequence[np.uint64]) -> np.ndarray:
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mixed(right ^ key) & mask)
    return (left << shift) | right


def _mixed(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea & Flood 2014): every input bit reaches every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _key(seed: int, epoch: int, purpose: str) -> int:
    return int.from_bytes(blake2b(f"{seed} {epoch} {purpose}".encode(), digest_size=8).digest(), "little")
