"""Where text comes from: files, folders, globs, standard input, Python's own source, Hugging Face datasets.

A corpus is a sequence of documents. It is read as a stream of bounded pieces, as often as wanted, so a file
bigger than memory is no special case.
"""

from __future__ import annotations

import codecs
import glob
import os
import re
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from clinometer.foreign_files import parse_json
from clinometer.messages import InputError
from clinometer.text.safe_cuts import last_safe_cut

END_OF_TEXT = "<|endoftext|>"

# (text, whether its document ends here)
Piece = tuple[str, bool]

_BLOCK = 1 << 20
_BOM = codecs.BOM_UTF8
_NOT_SOURCE = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_DATASET = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Documents in a fixed order; `name` for people, `size` in bytes where known.

    `skipped` counts, by reason, the files of a folder or glob that are not text:
    "binary", "not-utf-8", "empty", "unreadable", "not-a-file".
    """

    name: str
    pieces: Callable[[], Iterator[Piece]]
    size: int | None = None
    files: int = 1
    skipped: Mapping[str, int] = field(default_factory=dict)

    def documents(self) -> Iterator[str]:
        """Each document whole, without its `<|endoftext|>`; empty ones are left out. Repeatable."""
        parts: list[str] = []
        for text, ends in self.pieces():
            parts.append(text)
            if ends:
                yield "".join(parts)
                parts = []

    def json_fields(self) -> list[str]:
        """The field names if the text is JSON Lines, which reads as JSON and not as what it says; or []."""
        first = next(iter(self.texts()), "").partition("\n")[0]
        if not first.startswith("{"):
            return []
        try:
            return list(parse_json(first))
        except ValueError:
            return []

    def texts(self) -> Iterator[str]:
        """The same text in pieces of bounded size, for callers that do not need the ends of documents."""
        return (text for text, _ in self.pieces() if text)


def corpus_of(texts: Iterable[str], name: str = "memory") -> Corpus:
    """A corpus of documents that are already in memory; InputError for lone surrogates."""
    kept = list(texts)
    try:
        size = sum(len(text.encode()) for text in kept)
    except UnicodeEncodeError as error:
        raise InputError("text.surrogate", index=error.start) from None
    return Corpus(name=name, pieces=lambda: _documents_of([text] for text in kept), size=size, files=0)


def open_corpus(spec: str | Path) -> Corpus:
    """The corpus that `spec` names: a file, folder or glob, "-", "python", or a Hugging Face dataset.

    "-" is standard input. "python" is the standard library's source on this machine, tests left out; a
    folder of that name is "./python". Raises InputError when there is no such thing, or no text in it.
    """
    spec = str(spec)
    if spec == "-":
        return _spooled(sys.stdin.buffer, "standard input")
    if spec == "python":
        return _python_source()
    path = Path(spec).expanduser()
    try:
        if path.is_dir():
            return _of_files(spec, _walk(path))
        if path.is_file():
            return _single_file(path, spec)
        if path.exists():
            with _opened(path) as stream:  # a pipe, such as the shell's <(command), can be read only once
                return _spooled(stream, spec)
    except InputError:
        raise
    except (OSError, ValueError) as error:  # a name too long, a NUL in it, a loop of links, no permission
        raise InputError("text.unreadable", path=spec, reason=_reason(error)) from error
    if any(sign in spec for sign in "*?["):
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
        # ** follows links to folders, which may lead in a circle: each file counts once.
        once = {os.path.realpath(name): name for name in reversed(found) if not name.is_dir()}
        files = sorted(once.values())
        if not files:
            raise InputError("text.no_match", pattern=spec)
        return _of_files(spec, files)
    return _dataset(spec)


def _single_file(path: Path, spec: str) -> Corpus:
    size = path.stat().st_size
    with _opened(path) as stream:
        _refuse_unusable(stream.read(_BLOCK), spec)
    return Corpus(name=spec, pieces=lambda: _documents_of([_decoded(_blocks(path), spec)]), size=size)


def _of_files(spec: str, candidates: Iterable[Path]) -> Corpus:
    """Several files, each at least one document; those that are not text are counted and left out."""
    skipped: Counter[str] = Counter()
    files: list[Path] = []
    size = 0
    for path in candidates:
        why_not = _why_not_text(path)
        if why_not:
            skipped[why_not] += 1
        else:
            files.append(path)
            size += path.stat().st_size
    if not files:
        raise InputError("text.no_files", path=spec, skipped=sum(skipped.values()))
    return Corpus(
        name=spec,
        pieces=lambda: _documents_of(_decoded(_blocks(path), str(path)) for path in files),
        size=size,
        files=len(files),
        skipped=dict(skipped),
    )


def _walk(folder: Path, suffix: str = "", leave_out: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Files below `folder`, hidden ones left out, in an order that is the same on every machine.

    Links to folders are not followed: they may lead in a circle.
    """
    for where, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in leave_out)
        yield from (
            Path(where, name) for name in sorted(files) if not name.startswith(".") and name.endswith(suffix)
        )


def _python_source() -> Corpus:
    folder = Path(sysconfig.get_path("stdlib") or os.path.dirname(os.__file__))
    return _of_files("python", _walk(folder, ".py", frozenset(_NOT_SOURCE)))


def _spooled(stream: IO[bytes], name: str) -> Corpus:
    """Copy a stream that can be read once into a temporary file, which has no name to be left behind."""
    spool = tempfile.TemporaryFile()  # noqa: SIM115 it lives as long as the corpus
    size = 0
    while block := stream.read(_BLOCK):
        if size == 0 or b"\0" in block:
            _refuse_unusable(block, name, size)
        spool.write(block)
        size += len(block)
    if size == 0:
        raise InputError("text.empty", path=name)

    def blocks() -> Iterator[bytes]:
        position = 0
        while True:
            spool.seek(position)  # each reader keeps its own place, so two may take turns
            block = spool.read(_BLOCK)
            if not block:
                return
            position += len(block)
            yield block

    return Corpus(name=name, pieces=lambda: _documents_of([_decoded(blocks(), name)]), size=size)


def _dataset(spec: str) -> Corpus:
    """The first text column of a Hugging Face dataset's training split."""
    looks_like_one = _DATASET.fullmatch(spec) and not spec.endswith((".txt", ".md", ".py", ".json", ".jsonl"))
    if not looks_like_one:
        raise InputError("text.missing", path=spec)
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError("text.missing_or_dataset", name=spec) from None
    try:
        rows: Any = datasets.load_dataset(spec, split="train")
    except Exception as error:  # the library raises a dozen kinds, for network, names and formats
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise InputError("text.dataset_failed", name=spec, reason=reason) from error
    columns = [name for name, kind in rows.features.items() if getattr(kind, "dtype", None) == "string"]
    if not columns:
        raise InputError("text.dataset_no_text", name=spec, columns=", ".join(rows.features))
    column = "text" if "text" in columns else columns[0]

    def pieces() -> Iterator[Piece]:
        return _documents_of([row[column] or ""] for row in rows)

    return Corpus(name=spec, pieces=pieces, files=0)


def _documents_of(sources: Iterable[Iterable[str]]) -> Iterator[Piece]:
    """Split each source at `<|endoftext|>`; the end of a source ends one too. None is empty."""
    hold = len(END_OF_TEXT) - 1
    for chunks in sources:
        rest, begun = "", False
        for chunk in chunks:
            *ended, rest = (rest + chunk).split(END_OF_TEXT)
            for text in ended:
                if text or begun:
                    yield text, True
                begun = False
            if len(rest) > hold:
                # What is held back may begin a marker. A safe cut spares the trainer words in two halves.
                end = len(rest) - hold
                cut = last_safe_cut(rest, (), end) or end
                yield rest[:cut], False
                rest, begun = rest[cut:], True
        if rest or begun:
            yield rest, True


def _decoded(blocks: Iterable[bytes], name: str) -> Iterator[str]:
    """UTF-8 text of the blocks, newlines as they are, a leading byte order mark dropped."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    before = 0
    for block in blocks:
        if b"\0" in block:
            raise InputError("text.binary", path=name, offset=before + block.index(b"\0"))
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(block)
        except UnicodeDecodeError as error:
            raise InputError("text.not_utf8", path=name, offset=before - pending + error.start) from None
        if before == 0 and block.startswith(_BOM):
            text = text[1:]
        before += len(block)
        yield text
    pending = len(decoder.getstate()[0])
    if pending:
        raise InputError("text.not_utf8", path=name, offset=before - pending)


def _blocks(path: Path) -> Iterator[bytes]:
    with _opened(path) as stream:
        while block := stream.read(_BLOCK):
            yield block


def _opened(path: Path) -> IO[bytes]:
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise InputError("text.missing", path=path) from None
    except OSError as error:
        raise InputError("text.unreadable", path=path, reason=_reason(error)) from error


def _refuse_unusable(first: bytes, name: str, offset: int = 0) -> None:
    if not first.removeprefix(_BOM):
        raise InputError("text.empty", path=name)
    if b"\0" in first:
        raise InputError("text.binary", path=name, offset=offset + first.index(b"\0"))


def _why_not_text(path: Path) -> str | None:
    try:
        if not path.is_file():
            return "not-a-file"
        characters = sum(len(text) for text in _decoded(_blocks(path), str(path)))
    except InputError as error:
        return {"text.binary": "binary", "text.not_utf8": "not-utf-8"}.get(error.key, "unreadable")
    except OSError:
        return "unreadable"
    return None if characters else "empty"


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
