"""Which part of a corpus is kept for validation: fixed by the text alone, the same on every machine.

With enough documents each one's own hash decides, so neither order nor neighbours matter and a document that
occurs twice is on one side. With few, the last characters of the whole text are taken, as nanoGPT does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal

from clinometer.messages import InputError
from clinometer.text.corpus import Corpus

ENOUGH_DOCUMENTS = 20

Side = Literal["train", "validation"]


@dataclass(frozen=True, kw_only=True)
class Split:
    """The decision for each document, and what one pass over the corpus learned on the way.

    rule "hash": document d is for validation where `held_out[d]` is 1.
    rule "tail": characters from number `cut` on are, counted over all documents joined together.
    """

    rule: Literal["hash", "tail"]
    fraction: float
    documents: int
    characters: int
    content_hash: str
    held_out: bytes = b""
    cut: int = 0

    def parts(self, corpus: Corpus) -> Iterator[tuple[Side, str, bool]]:
        """(side, text, whether the document ends here) in the order of the corpus, as a stream.

        At a tail cut inside a document the training part does not end: what follows is merely held out.
        """
        document = position = 0
        for text, ends in corpus.pieces():
            if self.rule == "hash":
                if document >= len(self.held_out):
                    raise InputError("text.changed", path=corpus.name)
                yield ("validation" if self.held_out[document] else "train"), text, ends
            else:
                before = max(0, min(len(text), self.cut - position))
                position += len(text)
                if before == len(text) and (text or position <= self.cut):
                    yield "train", text, ends
                else:
                    if before:
                        yield "train", text[:before], False
                    yield "validation", text[before:], ends
            document += ends


def split(corpus: Corpus, fraction: float = 0.1) -> Split:
    """Read the corpus once and decide; raises InputError if it is empty or `fraction` is not in (0, 1).

    A document is held out if the first 64 bits of its blake2b, as a number in [0, 1), are below `fraction`.
    """
    if not 0 < fraction < 1:
        raise InputError("text.fraction", value=fraction)
    whole = blake2b(digest_size=32)
    digest = blake2b(digest_size=16)
    held_out = bytearray()
    characters = 0
    for text, ends in corpus.pieces():
        digest.update(text.encode("utf-8"))
        characters += len(text)
        if ends:
            value = digest.digest()
            whole.update(value)
            held_out.append(int.from_bytes(value[:8], "big") < fraction * 2**64)
            digest = blake2b(digest_size=16)
    if not characters:
        raise InputError("text.empty", path=corpus.name)
    by_hash = len(held_out) >= ENOUGH_DOCUMENTS and 0 < sum(held_out) < len(held_out)
    return Split(
        rule="hash" if by_hash else "tail",
        fraction=fraction,
        documents=len(held_out),
        characters=characters,
        content_hash=whole.hexdigest(),
        held_out=bytes(held_out) if by_hash else b"",
        cut=0 if by_hash else int(characters * (1 - fraction)),
    )
