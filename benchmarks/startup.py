"""How long it takes until something happens: `python -m benchmarks.startup [--rounds 5]`.

import       `import clinometer`, timed inside a fresh Python
help         `clinometer --help`, the whole process
first step   `clinometer train` on bytes with empty caches, from its start to the first line of metrics.jsonl,
             in turns with a Python that only imports torch
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import rows

_IMPORT = "import time; s = time.perf_counter(); import clinometer; print(time.perf_counter() - s)"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    rows.options(parser)
    given = parser.parse_args()
    imported, helped, first, torch_alone = [], [], [], []
    for _ in range(given.rounds):
        done = subprocess.run([sys.executable, "-c", _IMPORT], check=True, capture_output=True, text=True)
        imported.append(1e3 * float(done.stdout))
        helped.append(1e3 * seconds_of([sys.executable, "-m", "clinometer", "--help"]))
        torch_alone.append(seconds_of([sys.executable, "-c", "import torch"]))
        first.append(first_step())
    kept = [
        rows.alone("import", imported, "ms"),
        rows.alone("help", helped, "ms"),
        rows.paired("first-step", "import torch", first, torch_alone, "s"),
    ]
    for row in kept:
        beside = f"   import torch alone {row.theirs:.2f} s: {row.ratio:.2f}×" if row.theirs else ""
        print(f"{row.name:<12}{row.ours:>9.2f} {row.unit}{beside}")
    rows.keep(given.json, kept)


def seconds_of(command: list[str]) -> float:
    begun = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - begun


def first_step() -> float:
    """Seconds until the first step stands in metrics.jsonl. Raises SystemExit if none comes."""
    with tempfile.TemporaryDirectory() as folder:
        caches = {"CLINOMETER_CACHE": f"{folder}/texts", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/kernels"}
        metrics = Path(folder, "run", "metrics.jsonl")
        corpus = str(argparse.__file__)  # a text that every machine has
        command = [sys.executable, "-m", "clinometer", "train", "--corpus", corpus]
        command += ["--run", f"{folder}/run", "--data.tokenizer=bytes", "--training.sample-tokens=0"]
        with Path(folder, "said").open("w+") as said:
            begun = time.perf_counter()
            training = subprocess.Popen(command, env={**os.environ, **caches}, stdout=said, stderr=said)
            try:
                while not (metrics.exists() and metrics.stat().st_size):
                    if training.poll() is not None:
                        said.seek(0)
                        sys.exit(f"clinometer train ended before its first step:\n{said.read()[-2000:]}")
                    time.sleep(0.002)
                return time.perf_counter() - begun
            finally:
                training.kill()
                training.wait()


if __name__ == "__main__":
    main()
