"""Token ids on disk: memory-mapped shards with a header, which exist only once they are complete.

    folder/<key>/header.json, train-00000.bin, …, validation-00000.bin, …

A shard is token ids and nothing else, uint16 or uint32, little-endian. The key is a hash of the text, the
tokenizer and the split, so equal inputs find the tokens that are already there.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from clinometer.foreign_files import parse_json
from clinometer.messages import InputError

FORMAT = 2
HEADER_FILE = "header.json"


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file of token ids."""

    file: str
    tokens: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Header:
    """What the shards hold and what they were made from."""

    format: int
    dtype: str
    vocab_size: int
    tokenizer_hash: str
    content_hash: str
    corpus: str
    documents: int
    characters: int
    split_rule: str
    split_fraction: float
    train_tokens: int
    validation_tokens: int
    train: Sequence[Shard]
    validation: Sequence[Shard]

    def to_json(self) -> str:
        values = asdict(self)
        return json.dumps(values | {"sha256": digest(values)}, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Header:
        """Raises ValueError, TypeError or KeyError for anything `to_json` did not write."""
        values: dict[str, Any] = parse_json(text)
        if values["format"] != FORMAT:
            raise ValueError(f"format {values['format']}, this version reads {FORMAT}")
        if values.pop("sha256") != digest(values):
            raise ValueError("sha256")
        if values["dtype"] not in ("uint16", "uint32"):
            raise ValueError(f"dtype {values['dtype']}")
        for name, kind in _KINDS.items():
            if type(values[name]) not in kind:
                raise ValueError(name)
        for side in ("train", "validation"):
            values[side] = tuple(Shard(**shard) for shard in values[side])
            if not all(type(shard.tokens) is int and type(shard.file) is str for shard in values[side]):
                raise ValueError(side)
            if any(Path(shard.file).name != shard.file for shard in values[side]):
                raise ValueError("a shard outside the folder")
            if len({shard.file for shard in values[side]}) < len(values[side]):
                raise ValueError("one file as two shards")
        return cls(**values)


_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("vocab_size", "documents", "characters", "train_tokens", "validation_tokens"), (int,)),
    **dict.fromkeys(("tokenizer_hash", "content_hash", "corpus", "split_rule"), (str,)),
    "split_fraction": (int, float),
}


def digest(values: dict[str, Any]) -> str:
    """SHA-256 of a header's content, which has no other guard against a changed number."""
    return sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


class Tokens:
    """Token ids of one side, as one sequence over all its shards; slices are read from disk when asked."""

    def __init__(self, arrays: Sequence[np.ndarray], vocab_size: int, name: str, dtype: str) -> None:
        self._arrays = arrays
        self._ends = list(accumulate(len(array) for array in arrays))
        self._vocab_size = vocab_size
        self._name = name
        self._dtype = np.dtype(dtype)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, key: slice) -> np.ndarray:
        """Ids [start:stop] in the shards' own dtype; InputError if one is outside the vocabulary."""
        start, stop, stride = key.indices(len(self))
        if stride != 1:
            raise ValueError("tokens are read in order: a slice with a step is not offered")
        parts = []
        place = bisect_right(self._ends, start)
        while start < stop:
            begin = self._ends[place - 1] if place else 0
            until = min(stop, self._ends[place])
            parts.append(self._arrays[place][start - begin : until - begin])
            start, place = until, place + 1
        ids = np.concatenate(parts) if len(parts) > 1 else np.array(parts[0] if parts else [], self._dtype)
        if len(ids) and int(ids.max()) >= self._vocab_size:
            value, last = int(ids.max()), self._vocab_size - 1
            raise InputError("text.shard_id", path=self._name, value=value, vocab_size=last + 1, last=last)
        return ids


class TokenData:
    """The encoded corpus in one folder: `.train`, `.validation` and `.header`."""

    def __init__(self, folder: Path, header: Header) -> None:
        self.folder = folder
        self.header = header
        self.train = self._tokens("train")
        self.validation = self._tokens("validation")

    @classmethod
    def open(cls, folder: str | Path) -> TokenData:
        """Open finished shards; InputError if the header or a shard is missing, foreign or cut short."""
        folder = Path(folder)
        try:
            header = Header.from_json((folder / HEADER_FILE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError("text.shards_missing", path=folder) from None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError("text.shards_broken", path=folder / HEADER_FILE, reason=str(error)) from None
        width = np.dtype(header.dtype).itemsize
        for shard in (*header.train, *header.validation):
            path = folder / shard.file
            size = path.stat().st_size if os.path.isfile(path) else 0  # is_file() raises for a long name
            if size != shard.tokens * width:
                reason = f"{size} bytes / {shard.tokens * width} bytes"
                raise InputError("text.shards_broken", path=path, reason=reason)
        try:
            return cls(folder, header)
        except OSError as error:  # gone since, or more files than a process may map
            raise InputError("text.shards_broken", path=folder, reason=error.strerror or error) from None

    def verify(self) -> None:
        """Read every shard and compare its hash with the header's; InputError names the first to differ."""
        for shard in (*self.header.train, *self.header.validation):
            digest = sha256()
            with (self.folder / shard.file).open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
            if digest.hexdigest() != shard.sha256:
                raise InputError("text.shards_broken", path=self.folder / shard.file, reason="sha256")

    def _tokens(self, side: str) -> Tokens:
        shards: Sequence[Shard] = getattr(self.header, side)
        dtype = np.dtype(self.header.dtype).newbyteorder("<")
        arrays = [np.memmap(self.folder / shard.file, dtype=dtype, mode="r") for shard in shards]
        return Tokens(arrays, self.header.vocab_size, str(self.folder), self.header.dtype)


def find_tokens(folder: Path, content_hash: str, tokenizer_hash: str, fraction: float) -> TokenData | None:
    """Finished shards of that text, tokenizer and split among those in `folder`; the text is not read.

    Skips damaged ones (by hash).
    """
    for header in folder.glob(f"*/{HEADER_FILE}"):
        try:
            data = TokenData.open(header.parent)
            found = data.header
            if (found.content_hash, found.tokenizer_hash, found.split_fraction) == (
                content_hash,
                tokenizer_hash,
                fraction,
            ):
                data.verify()
                return data
        except InputError:
            continue
    return None
