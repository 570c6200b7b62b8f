"""Generating text, cached against uncached and against transformers' `generate` on the exported model.

    python -m benchmarks.generation [--rounds 5] [--tokens 256] [--batches 1,32] [--threads N]

The model is the same everywhere (4 layers, width 256, vocabulary 10,000, context 512, float32, greedy from a
prompt of 16 tokens), and every run must give the same tokens. Sides alternate in one process (A B A B …);
medians are compared.
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

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor

from benchmarks import rows
from clinometer.lm.generate import generate
from clinometer.lm.llama_files import export_llama
from clinometer.lm.model import TransformerLM
from clinometer.lm.transformer_config import TransformerConfig

CONFIG = TransformerConfig(
    vocab_size=10_000, context_length=512, d_model=256, num_layers=4, num_heads=8, d_ff=704
)
PROMPT = 16

Side = Callable[[Tensor, int], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--batches", default="1,32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    rows.options(parser)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)

    import transformers

    transformers.logging.disable_progress_bar()
    model = TransformerLM(CONFIG, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        exported = export_llama(model, CONFIG, Path(folder) / "model")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(exported).eval()
    print(f"{machine()}, torch {torch.__version__}, {given.threads} threads")
    print(f"transformers {transformers.__version__}; {given.tokens} tokens, medians of {given.rounds}\n")

    def cached(prompt: Tensor, count: int) -> Tensor:
        return torch.stack(list(generate(model, prompt, count, temperature=0)), dim=1)

    def uncached(prompt: Tensor, count: int) -> Tensor:
        return torch.stack(list(generate(model, prompt, count, temperature=0, cache=False)), dim=1)

    def peer(prompt: Tensor, count: int) -> Tensor:
        mask = torch.ones_like(prompt)
        made = theirs.generate(prompt, attention_mask=mask, max_new_tokens=count, do_sample=False)
        return made[:, PROMPT:]

    print(f"batch  {'cached tokens/s':>16}  {'the other':>12} {'tokens/s':>9}   cached is")
    for batch in map(int, given.batches.split(",")):
        drawn = torch.Generator().manual_seed(1)
        prompt = torch.randint(0, CONFIG.vocab_size, (batch, PROMPT), generator=drawn)
        others: dict[str, Side] = {"transformers": peer}
        if batch == 1:  # uncached, a batch of 32 takes minutes a run
            others["uncached"] = uncached
        for name, other in others.items():
            times = compare(cached, other, prompt, given.tokens, given.rounds)
            fast, slow = map(statistics.median, times)
            made = batch * given.tokens
            print(
                f"{batch:>5}  {made / fast:>16,.0f}  {name:>12} {made / slow:>9,.0f}   {slow / fast:.2f}×",
                flush=True,
            )
            if name == "transformers" and batch in (1, 32):
                speeds = ([made / seconds for seconds in one] for one in times)
                rows.keep(given.json, [rows.paired(f"generation-{batch}", name, *speeds, "tokens/s")])


def compare(
    first: Side, second: Side, prompt: Tensor, count: int, rounds: int
) -> tuple[list[float], list[float]]:
    """Seconds of each in each round, alternating; both must make the same tokens."""
    times: tuple[list[float], list[float]] = ([], [])
    for side in (first, second):
        side(prompt, 8)  # first calls choose kernels
    for _ in range(rounds):
        made = []
        for side, kept in zip((first, second), times, strict=True):
            begin = time.perf_counter()
            made.append(side(prompt, count))
            kept.append(time.perf_counter() - begin)
        if not torch.equal(made[0], made[1]):
            raise SystemExit("the two sides made different tokens: nothing to compare")
    return times


def machine() -> str:
    """The processor's name and its cores."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line
        ]
        name = names[0] if names else name
    return f"{name}, {os.cpu_count()} cores"


if __name__ == "__main__":
    main()
