"""What this machine offers, and what `auto` makes of it."""

from __future__ import annotations

import os
import platform
import shutil
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache

import torch

from clinometer.messages import InputError, say
from clinometer.torch_internals.kernels import bfloat16_instructions

COMPILE_SECONDS = 40.0
"""Compiling the blocks and the loss takes 5 to 30 s on two cores, and makes steps about a third shorter."""


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What a run computes with. A resumed run keeps the same, even if `auto` would now choose differently."""

    device: str
    precision: str
    compile: bool
    threads: int
    onednn: bool = False
    """Float32 products by oneDNN: compiled runs on a CPU where it was measured faster."""
    ranks: int = 1
    parallel: str = "one"
    """How several ranks share the work: "fsdp" or "ddp"."""
    why_precision: str = ""
    why_compile: str = ""

    def autocast(self) -> AbstractContextManager[object]:
        """Matrix products in bfloat16 where chosen; weights, norms, softmax and loss in float32."""
        kind = torch.device(self.device).type
        return torch.autocast(kind, torch.bfloat16, enabled=self.precision == "bfloat16")

    def uncompiled(self) -> AbstractContextManager[object]:
        """The model's eager form. Where nothing was compiled the compiler is not even imported (1.3 s)."""
        return torch.compiler.set_stance("force_eager") if self.compile else nullcontext()


def choose(*, device: str, precision: str, compile: str, total_flops: float) -> Choices:
    """Resolve every "auto" for this machine and a run of `total_flops` floating-point operations."""
    where = choose_device(device)
    if precision == "auto":
        fast, why = bfloat16_is_fast(where)
        precision = "bfloat16" if fast else "float32"
    else:
        why = say("doctor.as_asked")
    compiler = find_compiler(where)
    if compile == "auto":
        seconds = total_flops / matmul_rate(where, precision) / 0.4
        wanted, why_compile = seconds > 5 * COMPILE_SECONDS, say("doctor.run_length", seconds=seconds)
        if wanted and compiler is None:
            wanted, why_compile = False, say("doctor.no_compiler")
    else:
        wanted, why_compile = compile == "on", say("doctor.as_asked")
        if wanted and compiler is None:
            raise InputError("training.no_compiler")
    onednn = False
    if wanted and where.type == "cpu" and precision == "float32":
        from clinometer.lm.compiled_step import onednn_is_faster

        if onednn := onednn_is_faster():
            why_compile = say("doctor.onednn", why=why_compile)
    return Choices(
        device=str(where),
        precision=precision,
        compile=wanted,
        onednn=onednn,
        threads=torch.get_num_threads(),
        why_precision=why,
        why_compile=why_compile,
    )


def choose_device(name: str) -> torch.device:
    """The requested device. Raises `InputError` if this machine does not have it."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError("training.device_name", device=name) from None
    present = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not present.get(device.type, False):
        offered = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise InputError("training.no_device", device=name, offered=", ".join(offered))
    return device


def devices() -> dict[str, tuple[bool, str]]:
    """What there is to compute on, in the order in which "auto" takes it: whether it is here, and why not."""
    cuda, hip = torch.version.cuda, torch.version.hip
    built = f"CUDA {cuda}" if cuda else f"ROCm {hip}" if hip else None
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = ", ".join(torch.cuda.get_device_name(i) for i in range(count))
    no_cuda = say("doctor.no_gpu", built=built) if built else say("doctor.not_built", what="CUDA")
    mps = torch.backends.mps.is_available()
    no_mps = say("doctor.no_mps") if torch.backends.mps.is_built() else say("doctor.not_built", what="MPS")
    return {
        "cuda": (count > 0, names or no_cuda),
        "mps": (mps, platform.processor() if mps else no_mps),
        "cpu": (True, processor_name()),
    }


def bfloat16_is_fast(device: torch.device) -> tuple[bool, str]:
    """Whether bf16 matrix products run in hardware here, and by what."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return major >= 8, f"{torch.cuda.get_device_name(device)}, sm_{major}{minor}"
    if device.type == "cpu" and (name := bfloat16_instructions()):
        return True, name
    return False, say("doctor.no_bfloat16")


def find_compiler(device: torch.device) -> str | None:
    """The C++ compiler that torch.compile needs on the CPU; on a GPU Triton brings its own way."""
    if device.type == "cuda":
        from importlib.util import find_spec

        return "triton" if find_spec("triton") else None
    candidates = [os.environ.get("CXX", ""), "g++", "clang++", "c++"]
    return next((found for name in candidates if name and (found := shutil.which(name))), None)


@cache
def matmul_rate(device: torch.device, precision: str, size: int = 1024, seconds: float = 0.15) -> float:
    """Measured rate of a size³ matrix product in FLOP/s, the best of a few: this machine's peak.

    Measured once in a process: `auto` and the progress line both ask.
    """
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    if device.type == "cuda":
        size = 8192
    # Its own generator: a measurement must not change the run's random numbers.
    generator = torch.Generator(device=device).manual_seed(0)
    a = torch.randn(size, size, device=device, generator=generator).to(dtype)
    torch.matmul(a, a)
    best, spent = 0.0, 0.0
    while spent < seconds:
        _wait(device)
        start = time.perf_counter()
        torch.matmul(a, a)
        _wait(device)
        elapsed = time.perf_counter() - start
        spent += elapsed
        best = max(best, 2 * size**3 / elapsed)
    return best


def copy_bandwidth(device: torch.device, megabytes: int = 256) -> float:
    """Measured bytes read and written a second by a plain copy, the best of five."""
    source = torch.zeros(megabytes * 2**20 // 4, device=device)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(5):
        _wait(device)
        start = time.perf_counter()
        target.copy_(source)
        _wait(device)
        best = max(best, 2 * source.numel() * 4 / (time.perf_counter() - start))
    return best


def processor_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
