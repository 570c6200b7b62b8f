"""What a diagnosis costs, in training steps and in memory of the same model: diagnose() against one step.

    python -m benchmarks.diagnosis [--width 768] [--layers 12] [--rounds 3]

Each side runs in processes of its own, because a peak of memory is a property of a process; they take turns.
The step is forward, backward and torch's fused AdamW, whose state it therefore holds; the diagnosis is given
that optimizer too when `--optimizer` is set.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time

import torch

from benchmarks import rows
from clinometer.lm.functional import cross_entropy
from clinometer.lm.model import TransformerLM
from clinometer.lm.transformer_config import TransformerConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--optimizer", action="store_true")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3, help="of both sides, taking turns")
    rows.options(parser)
    parser.add_argument("--side", choices=["step", "diagnose"])
    options = parser.parse_args()
    if options.side:
        seconds, peak, parameters = run(options)
        print(f"{seconds} {peak} {parameters}")
        return
    command = [sys.executable, "-m", "benchmarks.diagnosis", *sys.argv[1:]]
    sides: dict[str, list[tuple[float, float]]] = {"step": [], "diagnose": []}
    parameters = "0"
    for _ in range(options.rounds):
        for side, found in sides.items():
            done = subprocess.run([*command, "--side", side], check=True, capture_output=True, text=True)
            seconds, peak, parameters = done.stdout.split()
            found.append((float(seconds), float(peak)))
    print(f"{int(parameters):,} parameters, medians of {options.rounds} rounds of {options.repeat}")
    times = {side: [seconds for seconds, _ in found] for side, found in sides.items()}
    peaks = {side: [peak / 1000 for _, peak in found] for side, found in sides.items()}
    for side in sides:
        seconds, peak = statistics.median(times[side]), statistics.median(peaks[side])
        print(f"{side:<9} {seconds:6.2f} s   peak {peak:6.2f} GB")
    time_row = rows.paired("diagnose-gpt2", "one training step", times["diagnose"], times["step"], "s")
    peak_row = rows.paired(
        "diagnose-gpt2-memory", "one training step", peaks["diagnose"], peaks["step"], "GB"
    )
    print(f"a diagnosis costs {time_row.ratio:.2f} steps and {peak_row.ratio:.2f} of a step's peak memory")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s)")
    if int(parameters) > 100e6:
        rows.keep(options.json, [time_row, peak_row])


def run(options: argparse.Namespace) -> tuple[float, float, int]:
    """Median seconds, the process's peak in MB, and the number of parameters."""
    torch.manual_seed(0)
    config = TransformerConfig(
        vocab_size=options.vocabulary,
        context_length=options.length,
        d_model=options.width,
        num_layers=options.layers,
        num_heads=options.width // 64,
        d_ff=options.width * 8 // 3 // 64 * 64,
    )
    model = TransformerLM(config)
    tokens = torch.randint(0, options.vocabulary, (options.batch, options.length + 1))

    def loss() -> torch.Tensor:
        return cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    if options.side == "step":
        work = step
    else:
        from clinometer.gradients.diagnose.diagnose import diagnose

        if options.optimizer:
            step()
            optimizer.zero_grad()

        def work() -> None:
            found = diagnose(model, loss, optimizer=optimizer if options.optimizer else None)
            assert found.healthy, found.render()

    work()
    times = []
    for _ in range(options.repeat):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    return statistics.median(times), peak, sum(p.numel() for p in model.parameters())


if __name__ == "__main__":
    main()
