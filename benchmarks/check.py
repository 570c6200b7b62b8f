"""What `check_gradients` costs, beside torch.autograd.gradcheck.

    python benchmarks/check.py            small: both modes of gradcheck, then 10 M parameters
    python benchmarks/check.py --gpt2     also 124 M parameters, the size of GPT-2

gradcheck differences every number of its inputs (slow mode) or one fixed direction an input (fast mode);
both need the loss as a function of its parameters, so they get the model's pure form.
"""

from __future__ import annotations

import argparse
import gc
import platform
import resource
import statistics
import time
import warnings

import torch
from torch import Tensor

from benchmarks import rows
from clinometer.gradients.check.check_gradients import check_gradients
from clinometer.lm.functional import cross_entropy, transformer_lm
from clinometer.lm.model import TransformerLM
from clinometer.lm.transformer_config import TransformerConfig


def peak_gib() -> float:
    """The most memory this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def model_and_closure(tokens: int, **sizes: int):
    torch.manual_seed(0)
    config = TransformerConfig(context_length=tokens, **sizes)
    model = TransformerLM(config)
    ids = torch.randint(0, config.vocab_size, (1, tokens + 1))
    return model, lambda: cross_entropy(model(ids[:, :-1]), ids[:, 1:]), ids


def ours(label: str, tokens: int, **sizes: int) -> float:
    model, closure, _ = model_and_closure(tokens, **sizes)
    count = sum(p.numel() for p in model.parameters())
    gc.collect()  # what the imports left would be collected in here, 80 ms
    start, used = time.perf_counter(), time.process_time()

    def show(done: int, total: int) -> None:
        print(f"\r  {done}/{total}  {time.perf_counter() - start:.0f} s", end="", flush=True)

    check = check_gradients(model, closure, progress=show)
    seconds = time.perf_counter() - start
    verdict = "all pass" if check.passed else check.render()
    print(
        f"\r{label:<26} {count:>12,} parameters  {len(check)} tensors  {seconds:8.2f} s  "
        f"(CPU {time.process_time() - used:.1f} s)  {check.evaluations} evaluations, "
        f"peak {peak_gib():.1f} GiB, {verdict}"
    )
    return seconds


def gradcheck(label: str, fast: bool, tokens: int, **sizes: int) -> float:
    model, _, ids = model_and_closure(tokens, **sizes)
    model = model.double()
    names = [name for name, _ in model.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in model.parameters()]

    def loss(*given: Tensor) -> Tensor:
        logits = transformer_lm(dict(zip(names, given, strict=True)), ids[:, :-1], model.config)
        return cross_entropy(logits, ids[:, 1:])

    gc.collect()
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        passed = torch.autograd.gradcheck(loss, values, fast_mode=fast)
    seconds = time.perf_counter() - start
    print(
        f"{label:<26} {sum(v.numel() for v in values):>12,} parameters  {seconds:18.2f} s  passes: {passed}"
    )
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gpt2", action="store_true")
    parser.add_argument("--only", choices=["small", "10m", "gpt2"])
    parser.add_argument("--rounds", type=int, default=2, help="of the small model, both sides taking turns")
    rows.options(parser)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}")
    if args.only in (None, "small"):
        small = {"vocab_size": 62, "d_model": 16, "num_layers": 3, "num_heads": 2, "d_ff": 17}
        assert sum(p.numel() for p in model_and_closure(16, **small)[0].parameters()) == 7_616
        one, fast, slow = [], [], []
        for _ in range(args.rounds):
            one.append(ours("check_gradients", 16, **small))
            fast.append(gradcheck("gradcheck, fast mode", True, 16, **small))
            slow.append(gradcheck("gradcheck, slow mode", False, 16, **small))
        a, b, c = map(statistics.median, (one, fast, slow))
        print(f"gradcheck took {b / a:.2f} × (fast) and {c / a:.2f} × (slow) the time")
        rows.keep(args.json, [rows.paired("check-small", "gradcheck, slow mode", one, slow, "s")])
    if args.only in (None, "10m"):
        ours("10 M", 32, vocab_size=8_192, d_model=256, num_layers=8, num_heads=8, d_ff=684)
    if args.gpt2 or args.only == "gpt2":
        seconds = ours(
            "GPT-2's size", 32, vocab_size=50_257, d_model=768, num_layers=12, num_heads=12, d_ff=2_048
        )
        peak = peak_gib() * 2**30 / 1e9
        kept = [rows.alone("check-gpt2", [seconds], "s"), rows.alone("check-gpt2-memory", [peak], "GB")]
        rows.keep(args.json, kept)


if __name__ == "__main__":
    main()
