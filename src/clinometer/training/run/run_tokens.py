"""A run's tokenizer and tokens: made once, kept with the run or in the cache, and found there again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from clinometer.messages import InputError
from clinometer.text.corpus import Corpus, open_corpus
from clinometer.text.encoding import Progress, encode_corpus
from clinometer.text.token_shards import TokenData
from clinometer.text.tokenizer import Tokenizer, byte_tokenizer, train_bpe
from clinometer.text.validation_split import split
from clinometer.training.run.run_folder import RunFolder
from clinometer.training.settings.config import RunConfig

DEFAULT_VOCABULARY = 4096

TOKENIZER_CHARACTERS = 200_000_000
"""A tokenizer is trained on at most so much text; more changes the merges little and takes minutes."""


class Notices(Protocol):
    """Receives what the preparation reports (see display.py)."""

    def notice(self, key: str, /, **values: Any) -> None: ...
    def progress(self, key: str, done: int, total: int) -> None: ...


def open_tokens(path: Path, tokenizer: Tokenizer, notices: Notices) -> tuple[TokenData, RunConfig]:
    """The tokens of the run in `path`, from the cache or encoded again; the run itself is not touched."""
    folder = RunFolder.open(path)
    config = folder.config
    return encode_saying(config, folder, open_corpus(config.data.corpus), tokenizer, notices), config


def encode_saying(
    config: RunConfig, folder: RunFolder, corpus: Corpus, tokenizer: Tokenizer, notices: Notices
) -> TokenData:
    notices.notice("train.encoding", corpus=corpus.name)
    return encode(
        config,
        folder,
        tokenizer,
        lambda done, total: notices.progress("train.encoding_bar", done, total),
        corpus,
    )


def encode(
    config: RunConfig,
    folder: RunFolder,
    tokenizer: Tokenizer,
    progress: Progress,
    corpus: Corpus | None = None,
) -> TokenData:
    """The run's text (`corpus`, if it is open already) as tokens, made now or found in the cache."""
    return encode_corpus(
        corpus or open_corpus(config.data.corpus),
        tokenizer,
        cache_folder(folder) / "tokens",
        fraction=config.data.validation_fraction,
        progress=progress,
    )


def tokenizer_of(config: RunConfig, folder: RunFolder, corpus: Corpus, notices: Notices) -> Tokenizer:
    """The run's own if it has one already; else the one the configuration asks for, saved with the run."""
    if (folder.tokenizer / "tokenizer.json").exists():
        return Tokenizer.load(folder.tokenizer)
    match config.data.tokenizer:
        case "bytes":
            tokenizer = byte_tokenizer()
        case "bpe":
            tokenizer = _train_tokenizer(config, corpus, notices)
        case path:
            tokenizer = Tokenizer.load(path)
    tokenizer.save(folder.tokenizer)
    return tokenizer


def _train_tokenizer(config: RunConfig, corpus: Corpus, notices: Notices) -> Tokenizer:
    """Of the requested size; without one, DEFAULT_VOCABULARY or as many tokens as the text can give."""
    size = config.data.vocab_size or DEFAULT_VOCABULARY
    notices.notice("train.tokenizer", vocab_size=size)
    try:
        return train_bpe(_training_text(config, corpus, notices), size, progress=False)
    except InputError as error:
        if config.data.vocab_size is not None or error.key != "text.vocab_large":
            raise
        return train_bpe(_training_text(config, corpus, notices), error.values["largest"], progress=False)


def _training_text(config: RunConfig, corpus: Corpus, notices: Notices) -> Iterator[str]:
    """The training side in pieces, so that nothing of the validation text shapes the vocabulary.

    Not in documents: a file of gigabytes may be one.
    """
    left = TOKENIZER_CHARACTERS
    chosen = split(corpus, config.data.validation_fraction)
    seen, total = 0, min(chosen.characters, left)  # the library counts words it has not met yet: "0 of 0"
    for side, text, _ in chosen.parts(corpus):
        seen += len(text)
        notices.progress("train.tokenizer_bar", min(seen, total), total)
        if side == "train":
            yield text[:left]
            left -= len(text)
            if left <= 0:
                return


def cache_folder(folder: RunFolder) -> Path:
    """Where encoded corpora are kept between runs: CLINOMETER_CACHE, else the user's cache folder.

    Where that cannot be written, the run's own folder.
    """
    given = os.environ.get("CLINOMETER_CACHE")
    base = (
        Path(given)
        if given
        else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clinometer"
    )
    try:
        base.mkdir(parents=True, exist_ok=True)
        if os.access(base, os.W_OK):
            return base
    except OSError:
        pass
    return folder.path / "cache"


def begin_with(tokenizer: Tokenizer, separated: bool, prompt: str) -> list[int]:
    """Token ids a text starts from: the prompt, else end-of-text if the model has seen it, else a newline."""
    if prompt:
        return tokenizer.encode(prompt)
    if separated and tokenizer.end_of_text_id is not None:
        return [tokenizer.end_of_text_id]
    return tokenizer.encode("\n")
