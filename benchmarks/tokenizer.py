"""Training and bulk encoding against plain `tokenizers`, `tiktoken` and `rustbpe`, interleaved in one run.

    python -m benchmarks.tokenizer --text FILE [--vocab-size 8192] [--rounds 3]
    python -m benchmarks.tokenizer --memory 5     peak memory and busy cores on a generated file of 5 GB

"in memory" peers encode text that is read already, and drop the ids. "File to file" are ours and a peer that
read the file and write the ids; ours also splits, checks a sample and hashes the shards.
`rustbpe` takes part where it is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import random
import statistics
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import rows
from clinometer.text.corpus import END_OF_TEXT, open_corpus
from clinometer.text.encoding import encode_corpus
from clinometer.text.tokenizer import train_bpe

_MEASURED = """
import json, resource, sys, time
from clinometer.text.corpus import open_corpus
from clinometer.text.encoding import encode_corpus
from clinometer.text.tokenizer import Tokenizer, train_bpe
from clinometer.training.run.run_tokens import TOKENIZER_CHARACTERS
def beginning(corpus):
    "As much of it as `clinometer train` trains a tokenizer on."
    held = 0
    for text in corpus.texts():
        held += len(text)
        if held > TOKENIZER_CHARACTERS:
            return
        yield text
start, start_cpu = time.perf_counter(), time.process_time()
task, file, folder, vocab_size = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
if task == "training":
    train_bpe(beginning(open_corpus(file)), vocab_size, progress=False).save(folder)
else:
    encode_corpus(open_corpus(file), Tokenizer.load(folder), folder + "/tokens")
seconds, used = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
cpu = time.process_time() - start_cpu
print(json.dumps({"gigabytes": used.ru_maxrss * 1024 / 1e9, "seconds": seconds, "cores": cpu / seconds}))
"""


def write_text(file: Path, gigabytes: float) -> None:
    """Lines of the standard library in random order; one in five ends in a word never seen before.

    So distinct words keep coming as the file grows, as they do in text of the web.
    """
    draw = random.Random(0)
    lines = [line for text in open_corpus("python").documents() for line in text.splitlines()]
    with file.open("w", encoding="utf-8") as stream:
        while stream.tell() < gigabytes * 1e9:
            for number in range(100):
                chosen = draw.choices(lines, k=100)
                for place in range(0, 100, 5):
                    word = "".join(draw.choices(string.ascii_lowercase, k=draw.randint(4, 10)))
                    chosen[place] = f"{chosen[place]} {word}"
                stream.write("\n".join(chosen) + ("\n" if number % 10 else END_OF_TEXT))


def measure_memory(gigabytes: float, vocab_size: int) -> list[rows.Row]:
    """Peak memory and busy cores of training and of encoding, each in a process of its own.

    Encoding a tenth of the file shows what of the memory grows with it.
    """
    found: dict[tuple[str, float], dict[str, float]] = {}
    print(f"generated text, vocabulary {vocab_size}")
    for size in (gigabytes / 10, gigabytes):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "text")
            write_text(file, size)
            for task in ("training", "encoding"):
                command = [sys.executable, "-c", _MEASURED, task, str(file), folder, str(vocab_size)]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                one = found[task, size] = json.loads(done.stdout.splitlines()[-1])
                print(
                    f"{size:5.2f} GB  {task:10} peak memory {one['gigabytes']:6.2f} GB  "
                    f"{one['seconds']:7.1f} s  {one['cores']:.2f} cores busy",
                    flush=True,
                )
    whole, tenth = found["encoding", gigabytes], found["encoding", gigabytes / 10]
    return [
        rows.paired(
            "tokenizer-cores", "the machine's cores", [whole["cores"]], [float(os.cpu_count() or 1)], "cores"
        ),
        rows.paired(
            "tokenizer-memory", "a tenth of the file", [whole["gigabytes"]], [tenth["gigabytes"]], "GB"
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    rows.options(parser)
    parser.add_argument(
        "--text", default="python", help="a file, folder or glob; default: the standard library"
    )
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", type=float, metavar="GB")
    options = parser.parse_args()
    if options.memory:
        rows.keep(options.json, measure_memory(options.memory, options.vocab_size))
        return
    with tempfile.TemporaryDirectory() as folder:
        compare(options, Path(folder))


def compare(options: argparse.Namespace, scratch: Path) -> None:
    import numpy as np
    import tiktoken
    import tokenizers
    from tiktoken_ext import openai_public

    documents = list(open_corpus(options.text).documents())
    file = scratch / "text"
    file.write_text("".join(f"{text}{END_OF_TEXT}" for text in documents), encoding="utf-8")
    corpus = open_corpus(file)
    megabytes = sum(len(text.encode()) for text in documents) / 1e6
    print(f"{options.text}: {megabytes:.1f} MB, {len(documents)} documents, vocabulary {options.vocab_size}")
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

    def tiktoken_file_to_file() -> None:
        encoding = tiktoken.Encoding("plain", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        texts = file.read_text(encoding="utf-8").split(END_OF_TEXT)[:-1]
        end = tokenizer.end_of_text_id
        encoded = encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1)
        whole = np.concatenate([np.array([*one, end], dtype=np.uint16) for one in encoded])
        with (scratch / "ids").open("wb") as stream:
            stream.write(whole.tobytes())
            stream.flush()
            os.fsync(stream.fileno())
        ids["tiktoken, file to file"] = len(whole) - len(texts)

    def encode_ours() -> None:
        with tempfile.TemporaryDirectory() as folder:
            data = encode_corpus(corpus, tokenizer, Path(folder))
            ends = len(documents) if len(documents) > 1 else 0
            ids["ours"] = len(data.train) + len(data.validation) - ends

    def train_rustbpe() -> None:
        import rustbpe  # pyright: ignore[reportMissingImports]

        rustbpe.Tokenizer().train_from_iterator(iter(documents), options.vocab_size - 1, pattern=pattern)

    runs: dict[str, Callable[[], object]] = {
        "training, plain tokenizers": train_plain,
        "training, ours": lambda: train_bpe(corpus.texts(), options.vocab_size, progress=False),
        "encoding, plain tokenizers, in memory": encode_plain_tokenizers,
        "encoding, plain tiktoken, in memory": encode_plain_tiktoken,
        "encoding, plain tiktoken, file to file": tiktoken_file_to_file,
        "encoding, ours, file to file": encode_ours,
    }
    if importlib.util.find_spec("rustbpe"):
        runs["training, rustbpe"] = train_rustbpe
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name, run in runs.items():
            begun = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begun)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    for name, value in median.items():
        ours = next(median[other] for other in median if other.startswith(f"{name.partition(',')[0]}, ours"))
        print(
            f"{name:40} {value:7.2f} s   {megabytes / value:6.2f} MB/s   ours: {value / ours:5.2f} × as fast"
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
