"""Training, side by side with a nanoGPT checkout on this machine.

    python -m benchmarks.training --nanogpt DIR --text FILE [--rounds 3]
                                  [--only loss,longer,speed,memory,loop]

loss     whole process, from nothing to validation loss 1.8857: nanoGPT's README CPU command against
         `clinometer train` on the same bytes, once with nothing cached and once more
longer   loss, and then as many of our steps as fit into nanoGPT's own time: the loss after equal time
speed    tokens/s at d_model 512, 4 layers, 16 heads, context 256, vocabulary 10,000, batch 16, and the
         share of this machine's own matrix-product rate (2048³, same precision, in the same process)
memory   largest resident memory of a step at vocabulary 50,257, width 768, 12 layers, batch 16 x 256
loop     what the loop costs beside forward, backward and update (see benchmarks/loop.py)

Each worker is a process of its own; the two sides alternate (A B A B …) and medians are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import rows as kept_rows
from benchmarks.training_rows import memory_rows, race_rows, speed_rows

TARGET = 1.8857
NANOGPT_COMMAND = (
    "train.py config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1 "
    "--block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 "
    "--lr_decay_iters=2000 --dropout=0.0"
)
OUR_SETTINGS = [
    "--data.tokenizer=bytes",
    "--model.context-length=64",
    "--model.d-model=128",
    "--model.num-layers=4",
    "--model.num-heads=4",
    "--model.d-ff=288",
    "--optim.name=muon",
    "--optim.lr=3e-2",
    "--optim.embedding-lr=9e-2",
    "--optim.momentum=0.8",
    "--optim.max-norm=inf",
    "--schedule.name=wsd",
    "--schedule.warmup-steps=0",
    "--schedule.min-lr=3e-4",
    "--training.batch-size=12",
    "--training.eval-batches=40",
    "--training.sample-tokens=0",
]
"""0.77 M weights, nanoGPT's command has 0.80 M; the rate falls in a straight line from the first step on."""
OUR_STEPS = 195
SHAPE = {"d_model": 512, "num_layers": 4, "num_heads": 16, "context_length": 256, "vocab_size": 10_000}
LARGE = {"d_model": 768, "num_layers": 12, "num_heads": 12, "context_length": 256, "vocab_size": 50_257}
BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kept_rows.options(parser)
    parser.add_argument("--nanogpt", type=Path, required=True)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--only", default="loss,speed,memory,loop")
    arguments = parser.parse_args()
    wanted = set(arguments.only.split(","))
    print(machine())
    if wanted & {"loss", "longer", "loop"} and arguments.text is None:
        parser.error("--text FILE is needed for the race to the loss and for the loop")
    if wanted & {"loss", "longer"}:
        raced = race(arguments.nanogpt, arguments.text, arguments.rounds, "longer" in wanted)
        kept_rows.keep(arguments.json, raced)
    if "speed" in wanted:
        kept_rows.keep(arguments.json, throughput(arguments.nanogpt, arguments.rounds, arguments.steps))
    if "memory" in wanted:
        kept_rows.keep(arguments.json, memory(arguments.nanogpt))
    if "loop" in wanted:
        command = [sys.executable, "-m", "benchmarks.loop", "--text", str(arguments.text.absolute())]
        command += ["--json", str(arguments.json.absolute())] if arguments.json else []
        print(run(command, env=our_settings()))


def race(nanogpt: Path, text: Path, rounds: int, longer: bool) -> list[kept_rows.Row]:
    """Wall time of whole processes to the validation loss; `longer`: the loss after nanoGPT's own time."""
    theirs, cold, warm, long = [], [], [], []
    with tempfile.TemporaryDirectory() as scratch:
        checkout = Path(scratch, "nanoGPT")
        shutil.copytree(nanogpt, checkout, ignore=shutil.ignore_patterns(".git", "out-*"))
        prepare_characters(checkout, text)
        for number in range(rounds):
            start = time.perf_counter()
            out = run([sys.executable, *NANOGPT_COMMAND.split()], cwd=checkout)
            seconds = time.perf_counter() - start
            theirs.append((seconds, float(out.rsplit("val loss ", 1)[1].split()[0])))
            cold.append(
                ours(text, Path(scratch, f"cold{number}"), Path(scratch, f"cache{number}"), OUR_STEPS)
            )
            warm.append(
                ours(text, Path(scratch, f"warm{number}"), Path(scratch, f"cache{number}"), OUR_STEPS)
            )
            if longer:
                # As many steps as fit into the time that nanoGPT just took, judged by the race just run.
                fitting = int(0.97 * seconds / cold[-1][0] * OUR_STEPS)
                folder = Path(scratch, f"long{number}")
                long.append(ours(text, folder, Path(scratch, f"longer{number}"), fitting))
    print(f"\nWhole process to validation loss {TARGET} ({text.name}, {rounds} rounds, medians)")
    for name, found in (("nanoGPT", theirs), ("clinometer", cold), ("caches warm", warm)):
        print(f"  {name:12} {median_of(found, 0):7.1f} s   loss {median_of(found, 1):.4f}")
    for name, found in (("cold", cold), ("warm", warm)):
        ratio = statistics.median(a[0] / b[0] for a, b in zip(found, theirs, strict=True))
        reached = "reached" if max(loss for _, loss in found) <= TARGET else "NOT reached"
        print(f"  ratio, {name}: {ratio:.3f} (1/{1 / ratio:.1f}); target loss {reached}")
    if longer:
        print(
            f"  after nanoGPT's time: loss {median_of(long, 1):.4f} in {median_of(long, 0):.1f} s, "
            f"nanoGPT's {median_of(theirs, 1):.4f} in {median_of(theirs, 0):.1f} s"
        )
    return race_rows(TARGET, theirs, cold, warm, long)


def median_of(found: list[tuple[float, float]], column: int) -> float:
    return statistics.median(pair[column] for pair in found)


def ours(text: Path, folder: Path, caches: Path, steps: int) -> tuple[float, float]:
    """Seconds and validation loss of one `clinometer train`; what it may cache is kept in `caches`."""
    command = [sys.executable, "-m", "clinometer", "train", "--corpus", str(text), "--run", str(folder)]
    lengths = {"steps": steps, "eval-every": steps, "checkpoint-every": steps}
    settings = [*OUR_SETTINGS, f"--schedule.decay-steps={steps}"]
    settings += [f"--training.{name}={value}" for name, value in lengths.items()]
    kept = {"CLINOMETER_CACHE": f"{caches}/texts", "TORCHINDUCTOR_CACHE_DIR": f"{caches}/kernels"}
    start = time.perf_counter()
    run([*command, *settings], env=kept)
    seconds = time.perf_counter() - start
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return seconds, [row["validation_loss"] for row in rows if "validation_loss" in row][-1]


def throughput(nanogpt: Path, rounds: int, steps: int) -> list[kept_rows.Row]:
    """Tokens a second of the same training step, and the share of this machine's matrix-product rate."""
    sides = {
        "nanoGPT eager": ["nanogpt", "float32", "eager"],
        "nanoGPT compiled": ["nanogpt", "float32", "compiled"],
        "nanoGPT bf16 compiled": ["nanogpt", "bfloat16", "compiled"],
        "clinometer float32": ["ours", "float32", "compiled"],
        "clinometer bf16": ["ours", "bfloat16", "compiled"],
    }
    results: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            results[name].append(measured(side, SHAPE, nanogpt, steps))
    print(f"\nTraining step, {SHAPE}, batch {BATCH} ({rounds} rounds of {steps} steps, medians)")
    for name, found in results.items():
        speed = statistics.median(f["tokens_per_second"] for f in found)
        memory = statistics.median(f["peak_gigabytes"] for f in found)
        begin = statistics.median(f["start_seconds"] for f in found)
        share = statistics.median(f["matmul_share"] for f in found)
        print(
            f"  {name:22} {speed:8.0f} tokens/s  {100 * share:4.0f} % of the 2048³ rate"
            f"  {memory:5.2f} GB  first step after {begin:5.1f} s"
        )

    def ratio(a: str, b: str) -> float:
        pairs = zip(results[a], results[b], strict=True)
        return statistics.median(x["tokens_per_second"] / y["tokens_per_second"] for x, y in pairs)

    peers = ("nanoGPT eager", "nanoGPT compiled")
    best = max(peers, key=lambda n: statistics.median(f["tokens_per_second"] for f in results[n]))
    for name in ("clinometer float32", "clinometer bf16"):
        print(f"  {name} / {best}: {ratio(name, best):.2f}×")
    print(
        f"  clinometer bf16 / nanoGPT bf16 compiled: {ratio('clinometer bf16', 'nanoGPT bf16 compiled'):.2f}×"
    )
    from clinometer.lm.transformer_config import TransformerConfig

    config = TransformerConfig(**SHAPE, d_ff=feed_forward(SHAPE))
    return speed_rows(results, config.flops_per_token())


def memory(nanogpt: Path) -> list[kept_rows.Row]:
    """Largest resident memory of a few steps at a large vocabulary, each in a process of its own."""
    sides = {
        "nanoGPT eager": ["nanogpt", "float32", "eager"],
        "clinometer float32": ["ours", "float32", "eager"],
        "clinometer bf16": ["ours", "bfloat16", "eager"],
        "clinometer bf16 compiled": ["ours", "bfloat16", "compiled"],
        # The same step: the batch in four parts, and what a block holds computed once more in its backward.
        "clinometer in parts": ["ours", "float32", "eager", "--micro=4", "--recompute"],
    }
    print(f"\nPeak memory, {LARGE}, batch {BATCH}")
    found: dict[str, float] = {}
    for name, side in sides.items():
        found[name] = measured(side, LARGE, nanogpt, 1)["peak_gigabytes"]
        share = found[name] / found["nanoGPT eager"]
        print(f"  {name:25} {found[name]:5.2f} GB   {share:.2f} x nanoGPT eager", flush=True)
    return memory_rows(found)


def measured(side: list[str], shape: dict[str, int], nanogpt: Path, steps: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.training", "--worker", *side]
    command += ["--shape", json.dumps(shape), "--nanogpt", str(nanogpt), "--steps", str(steps)]
    out = run(command, env=our_settings() if side[0] == "ours" else {})
    return json.loads(out.splitlines()[-1])


def worker(
    side: str,
    precision: str,
    form: str,
    shape: dict[str, int],
    nanogpt: Path,
    steps: int,
    micro: int = BATCH,
    recompute: bool = False,
) -> None:
    """One process: build the model, take steps on random tokens, print a line of JSON."""
    began = time.perf_counter()
    import torch

    torch.manual_seed(0)
    V, S = shape["vocab_size"], shape["context_length"]
    batches = [torch.randint(0, V, (2, BATCH, S)) for _ in range(3)]
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    context = torch.autocast("cpu", dtype, enabled=precision == "bfloat16")
    if side == "nanogpt":
        sys.path.insert(0, str(nanogpt))
        from model import GPT, GPTConfig  # pyright: ignore  (nanoGPT's own)

        config = GPTConfig(
            block_size=S,
            vocab_size=V,
            n_layer=shape["num_layers"],
            n_head=shape["num_heads"],
            n_embd=shape["d_model"],
            dropout=0.0,
            bias=False,
        )
        model = GPT(config)
        optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
        forward = torch.compile(model) if form == "compiled" else model

        def step(x: torch.Tensor, y: torch.Tensor) -> None:
            with context:
                _, loss = forward(x, y)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    else:
        from clinometer.lm.model import TransformerLM
        from clinometer.lm.transformer_config import TransformerConfig
        from clinometer.optim.clipping import clip_grad_norm_
        from clinometer.optim.make_optimizers import make_optimizers

        model = TransformerLM(TransformerConfig(**shape, d_ff=feed_forward(shape)))
        model.recompute_blocks(recompute)
        (optimizer,) = make_optimizers(model.named_parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
        if form == "compiled":
            from clinometer.lm.compiled_step import onednn_is_faster

            model.compile_parts(onednn=precision == "float32" and onednn_is_faster())

        def step(x: torch.Tensor, y: torch.Tensor) -> None:
            for part in range(0, BATCH, micro):  # as the trainer does: sums over the whole batch's count
                with context:
                    loss = model.loss(x[part : part + micro], y[part : part + micro], reduction="sum")
                (loss / y.numel()).backward()
            clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    step(*batches[0])
    started = time.perf_counter() - began
    step(*batches[1])
    times = []
    for number in range(steps):
        start = time.perf_counter()
        step(*batches[number % 3])
        times.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    speed = BATCH * S / statistics.median(times)
    from clinometer.lm.transformer_config import TransformerConfig
    from clinometer.training.settings.precision import matmul_rate

    # nanoGPT's block has as many weights in products as ours, so the same count serves both.
    flops = TransformerConfig(**shape, d_ff=feed_forward(shape)).flops_per_token()
    print(
        json.dumps(
            {
                "tokens_per_second": speed,
                "peak_gigabytes": peak,
                "start_seconds": started,
                "matmul_share": speed * flops / matmul_rate(torch.device("cpu"), precision, size=2048),
            }
        )
    )


def feed_forward(shape: dict[str, int]) -> int:
    return -(-shape["d_model"] * 8 // (3 * 32)) * 32


def prepare_characters(checkout: Path, text: Path) -> None:
    """What nanoGPT's prepare.py does, without its download."""
    folder = checkout / "data" / "shakespeare_char"
    shutil.copy(text, folder / "input.txt")
    run([sys.executable, "prepare.py"], cwd=folder)


def our_settings() -> dict[str, str]:
    """What `clinometer train` sets for its own process; see clinometer.cli."""
    from clinometer.commands.helpers.process_settings import PROCESS_SETTINGS

    return PROCESS_SETTINGS


def run(command: list[str], env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **(env or {})}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def machine() -> str:
    import torch

    from clinometer.training.settings.precision import bfloat16_is_fast, processor_name

    _, bfloat16 = bfloat16_is_fast(torch.device("cpu"))
    return f"{processor_name()}, {os.cpu_count()} cores, torch {torch.__version__}, bfloat16: {bfloat16}"


if __name__ == "__main__":
    if "--worker" in sys.argv:
        inner = argparse.ArgumentParser()
        inner.add_argument("--worker", nargs=3)
        inner.add_argument("--shape", type=json.loads)
        inner.add_argument("--nanogpt", type=Path)
        inner.add_argument("--steps", type=int)
        inner.add_argument("--micro", type=int, default=BATCH)
        inner.add_argument("--recompute", action="store_true")
        given = inner.parse_args()
        side, precision, form = given.worker
        worker(side, precision, form, given.shape, given.nanogpt, given.steps, given.micro, given.recompute)
    else:
        main()
