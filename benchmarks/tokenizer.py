"""Training and bulk encoding against plain `tokenizers` and plain `tiktoken`, interleaved in one run.

    python -m benchmarks.tokenizer --text FILE [--vocab-size 8192] [--rounds 3]

The peers only encode text that is in memory. Ours reads the file, splits off the validation part, checks a
sample of the ids, and writes and syncs shards: what a user waits for.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import rows
from clinometer.text.corpus import END_OF_TEXT, open_corpus
from clinometer.text.encoding import encode_corpus
from clinometer.text.tokenizer import train_bpe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    rows.options(parser)
    parser.add_argument(
        "--text", default="python", help="a file, folder or glob; default: the standard library"
    )
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()

    import tiktoken
    import tokenizers
    from tiktoken_ext import openai_public

    corpus = open_corpus(options.text)
    documents = list(corpus.documents())
    megabytes = sum(len(text.encode()) for text in documents) / 1e6
    print(f"{corpus.name}: {megabytes:.1f} MB, {len(documents)} documents, vocabulary {options.vocab_size}")
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    )

    tokenizer = train_bpe(corpus.texts(), options.vocab_size, progress=False)
    ranks = tokenizer.mergeable_ranks
    assert ranks is not None, "a vocabulary that was just trained is in the order of its merges"
    pattern = openai_public.r50k_pat_str
    ids: dict[str, Any] = {}

    def train_plain() -> None:
        library = tokenizers.Tokenizer(tokenizers.models.BPE())
        library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=options.vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        library.train_from_iterator(documents, trainer)

    def encode_plain_tokenizers() -> None:
        library = tokenizers.Tokenizer.from_str(tokenizer.to_json())
        ids["tokenizers"] = sum(
            len(one.ids) for one in library.encode_batch(documents, add_special_tokens=False)
        )

    def encode_plain_tiktoken() -> None:
        encoding = tiktoken.Encoding("plain", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        ids["tiktoken"] = sum(
            map(len, encoding.encode_ordinary_batch(documents, num_threads=os.cpu_count() or 1))
        )

    def encode_ours() -> None:
        with tempfile.TemporaryDirectory() as folder:
            data = encode_corpus(corpus, tokenizer, Path(folder))
            ends = len(documents) if len(documents) > 1 else 0
            ids["ours"] = len(data.train) + len(data.validation) - ends

    runs: dict[str, Callable[[], object]] = {
        "training, plain tokenizers": train_plain,
        "training, ours": lambda: train_bpe(corpus.texts(), options.vocab_size, progress=False),
        "encoding, plain tokenizers": encode_plain_tokenizers,
        "encoding, plain tiktoken": encode_plain_tiktoken,
        "encoding, ours": encode_ours,
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name, run in runs.items():
            begun = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begun)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    for name, value in median.items():
        ours = median[f"{name.partition(',')[0]}, ours"]
        print(
            f"{name:28} {value:7.2f} s   {megabytes / value:6.2f} MB/s   ours: {value / ours:5.2f} × as fast"
        )
    # A document cut in two by the split, or a word by it, may cost ours a token more.
    print("tokens:", ", ".join(f"{name} {count:,}" for name, count in ids.items()))
    kept = []
    for work in ("training", "encoding"):
        own = next(name for name in seconds if name.startswith(f"{work}, ours"))
        peers = [name for name in seconds if name.startswith(work) and name != own]
        best = min(peers, key=lambda name: median[name])
        kept.append(
            rows.paired(f"tokenizer-{work}", best.split(", ", 1)[1], seconds[own], seconds[best], "s")
        )
    rows.keep(options.json, kept)


if __name__ == "__main__":
    main()
