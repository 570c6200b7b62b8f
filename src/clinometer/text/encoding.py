"""Encode a corpus into shards: once, on all cores, and whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import sha256
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import IO

import numpy as np

from clinometer.messages import InputError
from clinometer.text.bulk_encoder import BulkEncoder, IdsDiffer
from clinometer.text.corpus import Corpus
from clinometer.text.token_shards import FORMAT, HEADER_FILE, Header, Shard, TokenData
from clinometer.text.tokenizer import Tokenizer
from clinometer.text.validation_split import Side, Split, split
from clinometer.whole_files import commit_folder, write_whole

# Called with (characters done, characters in all).
Progress = Callable[[int, int], None]
# (side, text, whether end-of-text follows)
Part = tuple[Side, str, bool]

SHARD_TOKENS = 1 << 27
# Small enough that the last batches end at about the same time on all cores.
_BATCH_CHARACTERS = 1 << 18
# Compared with the tokenizer's own ids: the beginning of the first batch, and less of each that follows.
_CHECKED_FIRST, _CHECKED = 1 << 16, 1 << 11


def encode_corpus(
    corpus: Corpus,
    tokenizer: Tokenizer,
    folder: str | Path,
    *,
    fraction: float = 0.1,
    workers: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
    progress: Progress | None = None,
) -> TokenData:
    """The corpus as memory-mapped token ids below `folder`, encoded now or found finished.

    Every document is followed by end-of-text, unless it is the only one. Raises InputError if the corpus
    cannot be used, has fewer than two tokens on a side, or `folder` cannot be written; then nothing is left.
    Several processes may ask for the same corpus at once: one encodes, the others wait for it.
    """
    folder = Path(folder)
    chosen = split(corpus, fraction)
    if chosen.documents > 1 and tokenizer.end_of_text_id is None:
        raise InputError("text.no_end_of_text", documents=chosen.documents)
    key = _key(chosen, tokenizer)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        with _locked(folder / f".{key}.lock"):
            if (finished := _finished(folder / key)) is not None:
                return finished
            workers = max(1, workers or os.cpu_count() or 1)
            sizes = {"workers": workers, "shard_tokens": shard_tokens}
            _build(corpus, chosen, tokenizer, folder / key, progress, **sizes)
    except OSError as error:
        raise InputError("text.cannot_write", path=folder, reason=error.strerror or error) from error
    return TokenData.open(folder / key)


def _key(chosen: Split, tokenizer: Tokenizer) -> str:
    parts = (FORMAT, chosen.content_hash, tokenizer.hash, chosen.rule, chosen.fraction)
    return sha256(repr(parts).encode()).hexdigest()[:16]


def _finished(target: Path) -> TokenData | None:
    """The tokens if they are there and whole, by hash; what is damaged is taken away, to be made again."""
    if not target.exists():
        return None
    try:
        data = TokenData.open(target)
        data.verify()
        return data
    except InputError:
        shutil.rmtree(target)
        return None


def _build(
    corpus: Corpus,
    chosen: Split,
    tokenizer: Tokenizer,
    target: Path,
    progress: Progress | None,
    **sizes: int,
) -> None:
    """Encode under a temporary name and rename: the rename is what makes the tokens exist."""
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.building-", dir=target.parent))
    try:
        try:
            encoder = BulkEncoder(tokenizer)
            header = _write(corpus, chosen, encoder, temporary, progress, **sizes)
        except IdsDiffer:
            encoder = BulkEncoder(tokenizer, fast=False)
            header = _write(corpus, chosen, encoder, temporary, progress, **sizes)
        write_whole(temporary / HEADER_FILE, header.to_json())
        temporary.chmod(0o755)  # mkdtemp's folders are private
        try:
            commit_folder(temporary, target, replace=False)
        except OSError:
            # Without locks (some network file systems) another process may have been faster.
            if _finished(target) is None:
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(
    corpus: Corpus,
    chosen: Split,
    encoder: BulkEncoder,
    folder: Path,
    progress: Progress | None,
    *,
    workers: int,
    shard_tokens: int,
) -> Header:
    tokenizer = encoder.tokenizer
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    end = tokenizer.end_of_text_id if chosen.documents > 1 else None
    writers: dict[Side, _Writer] = {
        side: _Writer(folder, side, dtype, shard_tokens) for side in ("train", "validation")
    }
    done = 0
    with contextlib.ExitStack() as stack:
        for writer in writers.values():
            stack.callback(writer.close)
        for batch, encoded in _encoded(_batches(_parts(corpus, chosen, tokenizer)), encoder, workers):
            for (side, text, ends), ids in zip(batch, encoded, strict=True):
                writers[side].add(ids)
                if ends and end is not None:
                    writers[side].add(np.array([end]))
                done += len(text)
            if progress:
                progress(done, chosen.characters)
    train, validation = writers["train"], writers["validation"]
    if done != chosen.characters:
        raise InputError("text.changed", path=corpus.name)
    if train.tokens < 2 or validation.tokens < 2:
        raise InputError(
            "text.few_tokens", path=corpus.name, train=train.tokens, validation=validation.tokens
        )
    return Header(
        format=FORMAT,
        dtype=f"uint{8 * dtype.itemsize}",
        vocab_size=tokenizer.vocab_size,
        tokenizer_hash=tokenizer.hash,
        content_hash=chosen.content_hash,
        corpus=Path(corpus.name).name,
        documents=chosen.documents,
        characters=chosen.characters,
        split_rule=chosen.rule,
        split_fraction=chosen.fraction,
        train_tokens=train.tokens,
        validation_tokens=validation.tokens,
        train=train.shards,
        validation=validation.shards,
    )


def _parts(corpus: Corpus, chosen: Split, tokenizer: Tokenizer) -> Iterator[Part]:
    """The corpus in parts that may be encoded one by one, none much longer than a batch."""
    for _, run in groupby(_runs(chosen.parts(corpus)), key=itemgetter(0)):
        yield from _cut(map(itemgetter(1), run), tokenizer)


def _cut(run: Iterable[Part], tokenizer: Tokenizer) -> Iterator[Part]:
    """One run in other pieces, cut where ids do not change."""
    last: Part = ("train", "", False)

    def texts() -> Iterator[str]:
        nonlocal last
        for last in run:
            yield last[1]

    waiting = ""
    for piece in tokenizer.pieces(texts(), characters=_BATCH_CHARACTERS):
        if waiting:
            yield last[0], waiting, False
        waiting = piece
    yield last[0], waiting, last[2]


def _runs(parts: Iterable[Part]) -> Iterator[tuple[int, Part]]:
    """Number the stretches that are encoded as one text: a document, or its share of one side."""
    run = 0
    before: Side | None = None
    for part in parts:
        side, _, ends = part
        run += before is not None and side != before
        yield run, part
        before = None if ends else side
        run += ends


def _batches(parts: Iterable[Part]) -> Iterator[list[Part]]:
    batch: list[Part] = []
    characters = 0
    for part in parts:
        batch.append(part)
        characters += len(part[1])
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encoded(
    batches: Iterable[list[Part]], encoder: BulkEncoder, workers: int
) -> Iterator[tuple[list[Part], list[np.ndarray]]]:
    """Batches with their ids, in order; at most a few at a time are in memory."""
    waiting: deque[tuple[list[Part], Future[list[np.ndarray]]]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="encode")
    try:
        for number, batch in enumerate(batches):
            checked = _CHECKED if number else _CHECKED_FIRST
            texts = [text for _, text, _ in batch]
            waiting.append((batch, pool.submit(encoder.encode_checked, texts, checked)))
            if len(waiting) > 2 * workers:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class _Writer:
    """Ids of one side, appended to shards of at most `shard_tokens`."""

    def __init__(self, folder: Path, side: Side, dtype: np.dtype, shard_tokens: int) -> None:
        self._folder, self._side, self._dtype, self._limit = folder, side, dtype, shard_tokens
        self._stream: IO[bytes] | None = None
        self._in_shard = 0
        self._hash = sha256()
        self.tokens = 0
        self.shards: list[Shard] = []

    def add(self, ids: np.ndarray) -> None:
        while len(ids):
            if self._stream is None:
                path = self._folder / f"{self._side}-{len(self.shards):05d}.bin"
                self._stream, self._in_shard, self._hash = path.open("wb"), 0, sha256()
            now, ids = ids[: self._limit - self._in_shard], ids[self._limit - self._in_shard :]
            raw = now.astype(self._dtype).tobytes()
            self._stream.write(raw)
            self._hash.update(raw)
            self._in_shard += len(now)
            self.tokens += len(now)
            if self._in_shard == self._limit:
                self.close()

    def close(self) -> None:
        if self._stream is None:
            return
        stream, self._stream = self._stream, None
        with stream:
            stream.flush()
            os.fsync(stream.fileno())
        name = f"{self._side}-{len(self.shards):05d}.bin"
        self.shards.append(Shard(file=name, tokens=self._in_shard, sha256=self._hash.hexdigest()))


def _sweep(folder: Path) -> None:
    """Remove what a killed process left: temporary folders whose key no process has locked."""
    for orphan in folder.glob(".*.building-*"):
        key = orphan.name[1:].partition(".")[0]
        with _locked(folder / f".{key}.lock", wait=False) as mine:
            if mine:
                shutil.rmtree(orphan, ignore_errors=True)


@contextlib.contextmanager
def _locked(file: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold `file`'s lock, which the system releases when a process dies; yields False if it is taken."""
    try:
        import fcntl
    except ImportError:  # Windows: no waiting, and the rename decides
        yield False
        return
    with file.open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        except OSError:
            held = False
        yield held
