"""Encoding many texts at once, as fast as this machine can, with the tokenizer's own ids.

tiktoken merges the pair that gives the lowest id, where `tokenizers` follows a list of merges, and the two
have Unicode tables of their own. For most vocabularies the ids are the same. So tiktoken is used only where
the vocabulary allows it, and its ids are compared with the tokenizer's on real text while it works.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from clinometer.text.tokenizer import Tokenizer

# tiktoken's own spelling of the GPT-2 pattern: possessive, so long runs of one kind cost no stack.
_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

# With no special token at all, tiktoken searches for an empty pattern at every character: half as fast again.
# This one is never allowed, so it is text like any other.
_NOT_SPECIAL = "\0"


class IdsDiffer(Exception):
    """The fast encoder gave other ids than the tokenizer: use the tokenizer itself."""


class BulkEncoder:
    """Encodes lists of texts; safe to call from several threads, which then run side by side.

    `fast` None: the fast encoder where the vocabulary allows it.
    """

    def __init__(self, tokenizer: Tokenizer, *, fast: bool | None = None) -> None:
        self.tokenizer = tokenizer
        self._special = re.compile(
            "|".join(re.escape(token) for token in sorted(tokenizer.special_tokens, key=len, reverse=True))
            or r"(?!)"
        )
        ranks = tokenizer.mergeable_ranks if tokenizer.splits_like_gpt2 and fast is not False else None
        self.fast = ranks is not None
        if ranks is not None:
            import tiktoken

            self._encoding = tiktoken.Encoding(
                "clinometer",
                pat_str=_PATTERN,
                mergeable_ranks=ranks,
                special_tokens={_NOT_SPECIAL: tokenizer.vocab_size},
            )

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text (uint32); special tokens in it become their ids."""
        if not self.fast:
            return [np.array(ids, dtype=np.uint32) for ids in self.tokenizer.encode_batch(texts)]
        return [self._encode_fast(text) for text in texts]

    def encode_checked(self, texts: Sequence[str], characters: int = 1 << 16) -> list[np.ndarray]:
        """The same; the first `characters` are compared with the tokenizer's own ids. Raises IdsDiffer.

        The tokenizer takes several times as long, and a hundred bytes of memory a character.
        """
        if self.fast:
            beginnings: list[str] = []
            room = characters
            for text in texts:
                beginnings.append(text[:room])
                room -= len(beginnings[-1])
                if not room:
                    break
            both = zip(self.encode(beginnings), self.tokenizer.encode_batch(beginnings), strict=True)
            if not all(np.array_equal(ids, np.array(right, dtype=np.uint32)) for ids, right in both):
                raise IdsDiffer
        return self.encode(texts)

    def _encode_fast(self, text: str) -> np.ndarray:
        if not self._special.search(text):
            return self._encoding.encode_to_numpy(text, disallowed_special=())
        parts: list[np.ndarray] = []
        position = 0
        for match in self._special.finditer(text):
            parts.append(
                self._encoding.encode_to_numpy(text[position : match.start()], disallowed_special=())
            )
            parts.append(np.array(self.tokenizer.encode(match.group()), dtype=np.uint32))
            position = match.end()
        parts.append(self._encoding.encode_to_numpy(text[position:], disallowed_special=()))
        return np.concatenate(parts)
