"""A tokenizer from the two tables that define a BPE, and back: the bytes of tokens, and merges in order."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from clinometer.messages import InputError
from clinometer.text.tokenizer import Tokenizer, byte_characters, make_byte_level

BytePair = tuple[bytes, bytes]


def from_byte_pairs(
    vocab: Mapping[int, bytes], merges: Sequence[BytePair], special_tokens: Sequence[str] = ()
) -> Tokenizer:
    """The byte-level BPE with these tokens, which splits words as GPT-2 does; earlier merges go first.

    A special token keeps its id where `vocab` has its UTF-8 bytes, and else gets the next free one. Raises
    InputError for two ids with the same bytes, a byte without a token and a merge that makes none.
    """
    import tokenizers
    from tokenizers import AddedToken, models

    characters = byte_characters()
    special = {token.encode(): token for token in special_tokens}
    table: dict[str, int] = {}
    for token_id, token in vocab.items():
        spelled = special.get(token) or _spelled(token, characters)
        if spelled in table:
            reason = f"{token!r}: {table[spelled]}, {token_id}"
            raise InputError("text.tokenizer_foreign", path="vocab", reason=reason)
        table[spelled] = token_id
    pairs = [(_spelled(left, characters), _spelled(right, characters)) for left, right in merges]
    try:
        library = tokenizers.Tokenizer(models.BPE(vocab=table, merges=pairs))
    except Exception as error:  # the library raises plain Exception
        raise InputError("text.tokenizer_foreign", path="merges", reason=str(error)) from None
    make_byte_level(library)
    library.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special_tokens]
    )
    return Tokenizer(library, source="vocab")


def byte_pairs(tokenizer: Tokenizer) -> tuple[dict[int, bytes], list[BytePair]]:
    """(vocab, merges): the bytes of every id, special tokens' included, and the merges in their order."""
    bytes_of = {character: byte for byte, character in enumerate(byte_characters())}
    pairs = (
        pair.split(" ") if isinstance(pair, str) else pair
        for pair in json.loads(tokenizer.to_json())["model"]["merges"]
    )
    merges = [(bytes(bytes_of[c] for c in left), bytes(bytes_of[c] for c in right)) for left, right in pairs]
    return {i: tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)}, merges


def _spelled(token: bytes, characters: Sequence[str]) -> str:
    return "".join(characters[byte] for byte in token)
