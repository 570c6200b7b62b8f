"""Byte-level BPE (Sennrich et al. 2016; on bytes: Radford et al. 2019), on top of the `tokenizers` library.

Every byte is a token, so every text has ids and `decode(encode(text)) == text`.
"""

from __future__ import annotations

import codecs
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clinometer.foreign_files import parse_json
from clinometer.messages import InputError
from clinometer.text.corpus import END_OF_TEXT
from clinometer.text.safe_cuts import last_safe_cut, safe_pieces
from clinometer.whole_files import write_whole

if TYPE_CHECKING:
    import tokenizers

TOKENIZER_FILE = "tokenizer.json"
NUM_BYTES = 256
_LONGEST_WORD = 1 << 12


class Tokenizer:
    """Text to token ids and back, exactly; special tokens are never split and the longest one wins."""

    def __init__(self, library: tokenizers.Tokenizer, *, source: str = "tokenizer") -> None:
        """Wrap a byte-level BPE of the `tokenizers` library; InputError if it is of another kind."""
        self._library = _copy(library)
        self._state = json.loads(self._library.to_str())
        _require_byte_level(self._state, source)
        self._plain = _copy(library)
        self._plain.encode_special_tokens = True
        self._bytes = _token_bytes(library)
        self.special_tokens: tuple[str, ...] = tuple(
            entry["content"] for entry in self._state["added_tokens"]
        )
        self.vocab_size = len(self._bytes)
        self.end_of_text_id: int | None = library.token_to_id(END_OF_TEXT)

    def encode(self, text: str, *, allow_special: bool = True) -> list[int]:
        """Ids of `text`; with allow_special=False, special tokens in it are plain text.

        Raises InputError for lone surrogates, which no UTF-8 text can hold.
        """
        library = self._library if allow_special else self._plain
        return library.encode(_well_formed(text), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, on all cores."""
        well_formed = [_well_formed(text) for text in texts]
        encodings = self._library.encode_batch_fast(well_formed, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_iterable(self, texts: Iterable[str]) -> Iterator[int]:
        """Ids of the texts joined together, as a stream; for the lines of a file bigger than memory."""
        for piece in self.pieces(texts, characters=1 << 16):
            yield from self.encode(piece)

    def pieces(self, texts: Iterable[str], *, characters: int = 1 << 20) -> Iterator[str]:
        """The joined texts, in pieces whose ids, one after another, are the ids of the whole."""
        if self.splits_like_gpt2:
            return safe_pieces(texts, self.special_tokens, characters=characters)
        whole = "".join(texts)
        return iter([whole] if whole else [])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are no UTF-8, as half a character has them, show as U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def decode_stream(self) -> DecodeStream:
        """A decoder to feed one id at a time, which never gives half a character."""
        return DecodeStream(self)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one id; InputError outside the vocabulary."""
        if not 0 <= token_id < self.vocab_size:
            last = self.vocab_size - 1
            raise InputError("text.id_range", value=int(token_id), vocab_size=self.vocab_size, last=last)
        return self._bytes[token_id]

    @cached_property
    def hash(self) -> str:
        """sha256 of the tokenizer's canonical JSON: equal exactly when it gives equal ids by equal rules."""
        canonical = json.dumps(self._state, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return sha256(canonical.encode()).hexdigest()

    @cached_property
    def splits_like_gpt2(self) -> bool:
        """Whether words are split by the GPT-2 pattern, for which safe cuts and the bulk encoder are made."""
        kind = self._state["pre_tokenizer"]
        return kind["type"] == "ByteLevel" and kind.get("use_regex", True)

    @cached_property
    def mergeable_ranks(self) -> dict[bytes, int] | None:
        """Bytes → id, where "merge the pair with the lowest id" is this tokenizer's rule, else None.

        That holds when the merges come in the order of the ids they make, each id made once, and all
        longer tokens are made by some merge.
        """
        model = self._state["model"]
        merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        made = [model["vocab"].get(left + right, -1) for left, right in merges]
        added = {entry["id"] for entry in self._state["added_tokens"]}
        ranks = {self._bytes[i]: i for i in sorted(model["vocab"].values()) if i not in added}
        in_order = all(earlier < later for earlier, later in pairwise(made))
        singles = all(value < min(made, default=value + 1) for key, value in ranks.items() if len(key) == 1)
        if not in_order or not singles or len(ranks) != NUM_BYTES + len(made):
            return None
        return ranks

    def to_json(self) -> str:
        """The text of tokenizer.json."""
        return self._library.to_str(pretty=True)

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and what transformers' AutoTokenizer needs to open the folder."""
        folder = Path(folder)
        end = {"eos_token": END_OF_TEXT, "bos_token": END_OF_TEXT} if self.end_of_text_id is not None else {}
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "add_prefix_space": False,
            **end,
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / TOKENIZER_FILE, self.to_json() + "\n")
            write_whole(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
            write_whole(folder / "special_tokens_map.json", json.dumps(end, indent=2) + "\n")
        except OSError as error:
            raise InputError("text.cannot_write", path=folder, reason=error.strerror or error) from error

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Open a tokenizer.json, the folder that holds one, or one with GPT-2's vocab.json and merges.txt."""
        import tokenizers

        path = Path(path)
        file = path / TOKENIZER_FILE if os.path.isdir(path) else path  # is_dir() may raise
        pair = path / "vocab.json", path / "merges.txt"
        if not os.path.isfile(file) and all(map(os.path.isfile, pair)):
            return from_gpt2_files(*pair)
        text = _read(file)
        try:
            _require_ids(_ids_of(parse_json(text)))
        except ValueError as error:
            raise InputError("text.tokenizer_broken", path=file, reason=str(error)) from None
        try:
            library = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises plain Exception
            raise InputError("text.tokenizer_foreign", path=file, reason=str(error)) from None
        return cls(library, source=str(file))


class DecodeStream:
    """Decodes ids one by one; a character comes out when its last byte is there."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that this id completes, which may be empty."""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        """What is left when no id follows: U+FFFD for a character that was never completed."""
        return self._decoder.decode(b"", final=True)


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    *,
    special_tokens: Sequence[str] = (END_OF_TEXT,),
    progress: bool | None = None,
) -> Tokenizer:
    """Train a byte-level BPE of `vocab_size` tokens: the special ones first, then the 256 bytes, then merges.

    The same texts give the same tokenizer, byte for byte. `progress` None shows a bar on a terminal only.
    Raises InputError when vocab_size has no room for the bytes, or is more than the text can give.
    """
    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers

    special = tuple(dict.fromkeys(special_tokens))
    smallest = NUM_BYTES + len(special)
    if vocab_size < smallest:
        raise InputError("text.vocab_small", vocab_size=vocab_size, smallest=smallest, special=len(special))
    library = tokenizers.Tokenizer(models.BPE())
    make_byte_level(library)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty() if progress is None else progress,
    )
    try:
        library.train_from_iterator(_training_pieces(texts, special), trainer)
    except UnicodeEncodeError as error:
        raise InputError("text.surrogate", index=error.start) from None
    given = library.get_vocab_size()
    if given < vocab_size:
        raise InputError("text.vocab_large", vocab_size=vocab_size, largest=given)
    return Tokenizer(library)


def byte_tokenizer() -> Tokenizer:
    """No merges: the id of byte b is b, and `<|endoftext|>` is 256."""
    import tokenizers
    from tokenizers import AddedToken, models

    vocab = {character: byte for byte, character in enumerate(byte_characters())}
    library = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    make_byte_level(library)
    library.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return Tokenizer(library)


def from_gpt2_files(vocab: str | Path, merges: str | Path) -> Tokenizer:
    """A tokenizer from GPT-2's two files: vocab.json (token → id) and merges.txt (one pair a line)."""
    import tokenizers
    from tokenizers import AddedToken, models

    try:
        table = parse_json(_read(Path(vocab)))
        if not isinstance(table, dict) or not all(isinstance(value, int) for value in table.values()):
            raise ValueError("not a table of tokens and ids")
        _require_ids(list(table.values()))
    except ValueError as error:
        raise InputError("text.tokenizer_broken", path=vocab, reason=str(error)) from None
    first, *lines = _read(Path(merges)).split("\n")
    lines = lines if first.startswith("#version") else [first, *lines]
    try:
        splits = (line.rstrip("\r").split(" ") for line in lines if line.strip())
        pairs = [(left, right) for left, right in splits]
        library = tokenizers.Tokenizer(models.BPE(vocab=table, merges=pairs))
    except Exception as error:  # the library raises plain Exception, ValueError or TypeError
        raise InputError("text.tokenizer_foreign", path=merges, reason=str(error)) from None
    make_byte_level(library)
    if END_OF_TEXT in table:
        library.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return Tokenizer(library, source=str(vocab))


def _training_pieces(texts: Iterable[str], special_tokens: Sequence[str]) -> Iterator[str]:
    """Pieces of training text without special tokens, small enough that words without end stay affordable.

    The trainer rescans a word at each merge, so one word of megabytes would take hours; only counts
    across the cuts are lost.
    """
    boundary = re.compile("|".join(map(re.escape, special_tokens)) or r"(?!)")
    for text in texts:
        for part in boundary.split(_well_formed(text)):
            start = 0
            while len(part) - start > 1 << 17:
                window = part[start : start + (1 << 17)]
                cut = last_safe_cut(window)
                if cut:
                    yield window[:cut]
                else:
                    yield from (window[at : at + _LONGEST_WORD] for at in range(0, 1 << 17, _LONGEST_WORD))
                start += cut or 1 << 17
            yield part[start:]


def make_byte_level(library: Any) -> None:
    from tokenizers import decoders, pre_tokenizers

    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    library.decoder = decoders.ByteLevel()


def _copy(library: Any) -> Any:
    import tokenizers

    copy = tokenizers.Tokenizer.from_str(library.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy


def byte_characters() -> list[str]:
    """GPT-2's printable stand-in for each byte (`bytes_to_unicode` in its encoder.py)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(NUM_BYTES, 2 * NUM_BYTES))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(NUM_BYTES)]


def _token_bytes(library: Any) -> list[bytes]:
    byte_of = {character: byte for byte, character in enumerate(byte_characters())}
    vocab: dict[str, int] = library.get_vocab(with_added_tokens=True)
    added = {token.content for token in library.get_added_tokens_decoder().values()}
    table = [b""] * (max(vocab.values()) + 1)
    for token, token_id in vocab.items():
        spelled = token not in added and all(character in byte_of for character in token)
        table[token_id] = bytes(byte_of[character] for character in token) if spelled else token.encode()
    return table


def _ids_of(state: Any) -> list[int]:
    """The ids that a tokenizer.json gives to its tokens; what it has elsewhere is the library's to judge."""
    state = state if isinstance(state, dict) else {}
    model = state.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    ids = list(vocab.values()) if isinstance(vocab, dict) else []
    added = state.get("added_tokens")
    more = (
        {e.get("id") for e in added if isinstance(e, dict) and isinstance(e.get("id"), int)}
        if isinstance(added, list)
        else set()
    )
    return [i for i in [*ids, *more.difference(i for i in ids if isinstance(i, int))] if isinstance(i, int)]


def _require_ids(ids: list[int]) -> None:
    """Every token has an id of its own, and they leave few gaps: tables are as long as the largest id."""
    if ids and max(ids) >= 2 * len(ids) + (1 << 16):
        raise ValueError(f"id {max(ids)} in a vocabulary of {len(ids)}")
    if len(set(ids)) < len(ids):
        again = next(i for i, count in Counter(ids).items() if count > 1)
        raise ValueError(f"two tokens with the id {again}")


def _require_byte_level(state: dict[str, Any], source: str) -> None:
    """Raise if a text may not come back: other models, normalizers, prefix spaces, missing bytes."""

    def refuse(reason: str) -> InputError:
        return InputError("text.tokenizer_kind", path=source, reason=reason)

    model, before = state["model"], state["pre_tokenizer"] or {}
    steps = before.get("pretokenizers", [before])
    if model.get("type") != "BPE" or not any(step.get("type") == "ByteLevel" for step in steps):
        raise refuse(f"model {model.get('type')}, pre-tokenizer {before.get('type')}")
    if state["normalizer"] or any(step.get("add_prefix_space") for step in steps):
        raise refuse("normalizer" if state["normalizer"] else "add_prefix_space")
    if any(entry["lstrip"] or entry["rstrip"] for entry in state["added_tokens"]):
        raise refuse("lstrip, rstrip")
    missing = sum(character not in model["vocab"] for character in byte_characters())
    if missing:
        raise refuse(f"{missing} / {NUM_BYTES} bytes missing")


def _well_formed(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError("text.surrogate", index=error.start) from None
    return text


def _read(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError("text.tokenizer_missing", path=file) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("text.tokenizer_broken", path=file, reason=str(error)) from None
    if not text.strip():
        raise InputError("text.tokenizer_broken", path=file, reason="0 bytes")
    return text
