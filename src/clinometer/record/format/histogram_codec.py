"""Histograms in few bytes: most of a tensor's 64 buckets are empty, so a bit says which are not.

A blob is `<IB` (tensors, bytes a count: 4 or 8) and, compressed with zlib, T·3·64 bits and the counts of
those that are set.
At most MOST steps of histograms are kept: the newest NEWEST all, of the older ones each 2^k-th.
"""

from __future__ import annotations

import sqlite3
import struct
import zlib

import numpy as np

from clinometer.vocabulary import BUCKETS, HISTOGRAM_KINDS

MOST = 1024
NEWEST = 256

_HEADER = struct.Struct("<IB")
_PER_TENSOR = len(HISTOGRAM_KINDS) * BUCKETS
_ONES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1)
"""How many bits of a byte are set."""


def encode(counts: np.ndarray) -> bytes:
    """`counts` (T, 3, 64), not negative."""
    flat = np.ascontiguousarray(counts).reshape(-1)
    filled = flat != 0
    values = flat[filled]
    width = 4 if not values.size or int(values.max()) < 1 << 32 else 8
    body = np.packbits(filled, bitorder="little").tobytes() + values.astype(f"<u{width}").tobytes()
    return _HEADER.pack(len(counts), width) + zlib.compress(body, 1)


def decode(blob: bytes, tensor: int | None = None, known: int | None = None) -> np.ndarray:
    """int64 (T, 3, 64); of one tensor (3, 64), zeros where the file is older than the tensor.

    Raises ValueError or zlib.error if the blob is damaged, or of more tensors than the `known` ones: it
    would unfold to a thousand times its size.
    """
    tensors, width = _HEADER.unpack_from(blob)
    if known is not None and tensors > known:
        raise ValueError(f"a histogram of {tensors} tensors, where {known} are known")
    most = tensors * _PER_TENSOR
    body = zlib.decompressobj().decompress(blob[_HEADER.size :], most // 8 + most * width)
    bits = np.frombuffer(body, np.uint8, most // 8)
    values = np.frombuffer(body, f"<u{width}", offset=most // 8)
    if int(_ONES[bits].sum()) != len(values):
        raise ValueError("counts and bits of a histogram do not agree")
    if tensor is None:
        return _spread(bits, values).reshape(tensors, len(HISTOGRAM_KINDS), BUCKETS)
    begin, size = tensor * _PER_TENSOR // 8, _PER_TENSOR // 8
    if tensor >= tensors:
        return np.zeros((len(HISTOGRAM_KINDS), BUCKETS), dtype=np.int64)
    mine = bits[begin : begin + size]
    first = int(_ONES[bits[:begin]].sum())
    mine_values = values[first : first + int(_ONES[mine].sum())]
    return _spread(mine, mine_values).reshape(len(HISTOGRAM_KINDS), BUCKETS)


def _spread(bits: np.ndarray, values: np.ndarray) -> np.ndarray:
    counts = np.zeros(8 * len(bits), dtype=np.int64)
    counts[np.unpackbits(bits, bitorder="little").astype(bool)] = values
    return counts


def stride_of_older(count: int, most: int = MOST, newest: int = NEWEST) -> int:
    """Of `count` histograms so far, the stride at which those before the newest are kept."""
    older, stride = max(0, count - newest), 1
    while -(-older // stride) > most - newest:
        stride *= 2
    return stride


def thin(connection: sqlite3.Connection, count: int, most: int = MOST, newest: int = NEWEST) -> None:
    """Drop what is no longer kept once there have been `count` histograms; called after each of them."""
    stride, before = (stride_of_older(n, most, newest) for n in (count, count - 1))
    border = count - newest
    first = 0 if stride != before else border - 1
    if border > 0:
        connection.execute(
            "DELETE FROM histograms WHERE ordinal >= ? AND ordinal < ? AND ordinal % ?",
            (first, border, stride),
        )
