"""What pages print on other processors: python -m tests.docs.stability [names of pages]

Runs every page in a process of its own under each of `PROCESSORS` and `ROUNDINGS`, and shows each line that
is not the page's. `PROCESSORS` are the instruction sets and threads that this machine can take. `ROUNDINGS`
are stronger: there, products, sums and functions are rounded otherwise than this processor rounds them, and a
number at which a chaotic training arrives moves.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from difflib import ndiff
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.docs.pages import DOCS, name_of, pages, run, same

ROOT = Path(__file__).parents[2]
OLDEST = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"}
PROCESSORS: dict[str, dict[str, str]] = {
    "the oldest": OLDEST,
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "AVX2"},
    "torch with AVX2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "oneDNN with AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    "oneDNN without AMX": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    "MKL's compatible code": {"MKL_CBWR": "COMPATIBLE"},
    "this one": {},
    "this one, two threads": {"OMP_NUM_THREADS": "2"},
    "AVX2, two threads": {"ATEN_CPU_CAPABILITY": "avx2", "OMP_NUM_THREADS": "2"},
}
"""Environment variables of a process, by the name of the processor that they make of this one."""
ROUNDINGS = {"rounded exactly": 0.0, "rounded the other way": -1.0, "errors × 4": 4.0, "errors × −3": -3.0}
"""What the rounding errors of this processor are multiplied with."""
OUTS = {
    **{name: f"{name}.out" for name in ("mm", "addmm", "bmm", "baddbmm", "addmv", "exp", "log", "tanh")},
    **{name: f"{name}.out" for name in ("sigmoid", "rsqrt", "silu", "gelu", "erf", "sin", "cos", "cumsum")},
    **{name: f"{name}.out" for name in ("_softmax", "_log_softmax")},
    "_softmax_backward_data": "_softmax_backward_data.out",
    "_log_softmax_backward_data": "_log_softmax_backward_data.out",
    "mean.dim": "mean.out",
    "sum.dim_IntList": "sum.IntList_out",
    "prod.dim_int": "prod.int_out",
}
"""Operations of torch whose last digits differ between processors (the order of a sum, the polynomial of a
function), and the form of each that writes into a given tensor."""


def round_otherwise(factor: float) -> torch.library.Library:
    """Multiply the rounding errors of OUTS on the CPU by `factor` until the result is let go.

    An operation stays a function of its inputs, and a result that needs no rounding stays as it is: what is
    equal by construction stays equal.
    """
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a kernel of torch is overridden, and that is meant
        for operation, out in OUTS.items():
            library.impl(operation, _rounding(out, factor), "CPU")
    return library


def _rounding(name: str, factor: float) -> Callable[..., Tensor]:
    packet, overload = name.split(".")
    operation = getattr(getattr(torch.ops.aten, packet), overload)
    out = next(argument.name for argument in operation._schema.arguments if argument.is_out)

    def call(arguments: Sequence[Any], options: Mapping[str, Any], dtype: torch.dtype) -> Tensor:
        return operation(*arguments, **options, **{out: torch.empty(0, dtype=dtype)})

    def computed(*arguments: Any, **options: Any) -> Tensor:
        dtype = options.get("dtype") or _result_type(packet, arguments)
        native = call(arguments, options, dtype)
        if not dtype.is_floating_point:
            return native
        if dtype == torch.float64:
            return _moved(native, factor)
        wide: list[Any] = [
            a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments
        ]
        if packet.endswith("_backward_data"):
            wide[-1] = torch.float64  # the dtype of the forward's input
        if options.get("dtype"):
            options = {**options, "dtype": torch.float64}
        exact = call(wide, options, torch.float64)
        return torch.where(native == exact, native, (exact + factor * (native - exact)).to(dtype))

    return computed


def _result_type(packet: str, arguments: Sequence[Any]) -> torch.dtype:
    dtype = next(a for a in arguments if isinstance(a, Tensor)).dtype
    if dtype.is_floating_point or dtype.is_complex or packet in ("mm", "addmm", "bmm", "baddbmm", "addmv"):
        return dtype
    return torch.int64 if packet in ("sum", "cumsum", "prod") else torch.get_default_dtype()


def _moved(value: Tensor, factor: float) -> Tensor:
    """Moves float64 by |factor| units in the last place, at least one, up or down as its bits say.

    There is no wider type to round from. A number whose last bits are zero was
    probably not rounded, and stays.
    """
    bits = value.contiguous().view(torch.int64)
    up = ((bits * 0x5851F42D4C957F2D) >> 40) & 1
    step = max(1, round(abs(factor))) * (2 * (up ^ (factor < 0)) - 1)
    stays = ((bits & 0xFFFFF) == 0) | ~value.isfinite() | (value.abs() < 1e-300)
    return torch.where(stays, bits, bits + step).view(torch.float64)


def differences(
    paths: Sequence[Path], variables: Mapping[str, str], factor: float | None = None, exact: bool = False
) -> list[str]:
    """Where the pages print something else in a process with these variables; with `exact`, down to the last
    digit shown."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "printed.json")
        command = [sys.executable, "-m", "tests.docs.stability", "--result", str(result)]
        if factor is not None:
            command.append(f"--factor={factor}")
        done = subprocess.run(
            [*command, *map(str, paths)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
            capture_output=True,
            text=True,
            encoding="utf-8",
            check=False,
        )
        if not result.exists():
            raise RuntimeError(done.stderr)
        blocks = json.loads(result.read_text(encoding="utf-8"))
    return [
        f"{place}\n"
        + "".join(line for line in ndiff(shown.splitlines(True), printed.splitlines(True)) if line[0] in "+-")
        for place, shown, printed in blocks
        if not same(shown, printed, units=0 if exact else 1)
    ]


def write(result: Path, factor: float | None, paths: Sequence[Path]) -> None:
    """Place, shown and printed text of every block, as JSON."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.manual_seed(1)  # the tests begin with 0: a page that sets no seed is noticed
    library = None if factor is None else round_otherwise(factor)
    blocks = []
    for path in paths:
        try:
            for ran in run(path):
                blocks.append((f"{name_of(path)}:{ran.code.line + 1}", ran.code.output or "", ran.printed))
                for number, limit in ran.rounding:
                    if abs(number) > limit:
                        blocks.append(
                            (f"{name_of(path)}:{ran.code.line + 1}", f"at most {limit}\n", f"{number}\n")
                        )
        except Exception as error:
            blocks.append((name_of(path), "", f"raised {type(error).__name__}: {error}\n"))
    del library
    result.write_text(json.dumps(blocks), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--factor", type=float, help=argparse.SUPPRESS)
    parser.add_argument("names", nargs="*", type=lambda name: Path(name).resolve())
    given = parser.parse_args()
    # Both languages run the same code, which tests/docs/test_pages.py proves.
    paths = given.names or [path for path in pages() if path.is_relative_to(DOCS / "en")]
    if given.result:
        return write(given.result, given.factor, paths)
    found = 0
    settings = [(name, variables, None) for name, variables in PROCESSORS.items()]
    settings += [(name, {}, factor) for name, factor in ROUNDINGS.items()]
    for name, variables, factor in settings:
        start = time.monotonic()
        lines = differences(paths, variables, factor, exact=True)
        found += len(lines)
        print(
            f"{name}: {len(lines)} blocks differ ({time.monotonic() - start:.0f} s)",
            *lines,
            sep="\n",
            flush=True,
        )
    sys.exit(found > 0)


if __name__ == "__main__":
    main()
