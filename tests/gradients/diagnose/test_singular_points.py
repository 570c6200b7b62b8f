"""Every operation of torch at its singular points: what is said is so, and the remedy, followed, helps.

Principle: the reason is read from the values that arrive where NaN or infinity begins, never from the name of
the operation. So of each finding the sweep checks that the value it names did arrive, and it applies the
remedy to the program that it was given for: afterwards loss and gradient are finite. Where the gradient that
torch computes is finite nothing is accused.
"""

import math
from collections import Counter

import pytest
import torch
from torch import nn

from clinometer.gradients.diagnose.diagnose import diagnose

INF = math.inf
UNARY = """
abs acos acosh angle asin asinh atan atanh ceil cos cosh deg2rad digamma erf erfc erfinv exp exp2
expm1 floor frac i0 lgamma log log10 log1p log2 logit neg positive rad2deg reciprocal relu round
rsqrt sgn sigmoid sign sin sinc sinh sqrt square tan tanh trunc nan_to_num special.entr
special.erfcx special.expit special.i0e special.i1 special.i1e special.log_ndtr special.ndtr
special.ndtri special.psi nn.functional.celu nn.functional.elu nn.functional.gelu
nn.functional.hardsigmoid nn.functional.hardswish nn.functional.hardtanh nn.functional.leaky_relu
nn.functional.logsigmoid nn.functional.mish nn.functional.relu6 nn.functional.selu
nn.functional.silu nn.functional.softplus nn.functional.softsign nn.functional.tanhshrink
"""
POINTS = [0.0, 1.0, -1.0, 2.0, -2.0, 1e-30, -1e30, 100.0, -100.0, 1e-42]
BINARY = """
add sub mul div pow atan2 hypot fmod remainder xlogy special.xlog1py logaddexp logaddexp2 maximum
minimum fmax fmin copysign float_power rsub
"""
PAIRS = [
    *[(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.0, -1.0), (0.0, 0.5), (-2.0, 0.5), (-2.0, 3.0), (1.0, 1e-30)],
    *[(1e-30, 1e-30), (1e30, 1e30), (1e30, 1e-30), (-1.0, -1.0), (1.0, -1.0), (INF, 1.0), (0.0, INF)],
    *[(INF, INF), (-INF, -INF)],
]
FEW = [0.0, 1.0, -1.0, 100.0]
UNEXPLAINED = {"other", "other-at", "unread"}
KEPT = torch.tensor([True, False])


def function(name):
    found = torch
    for part in name.split("."):
        found = getattr(found, part)
    return found


def remedied(finding, tensor):
    """The argument after the remedy of a finding about a function of one number; None if it has no code."""
    values = finding.values
    if finding.variant in ("sqrt", "power-zero"):
        return tensor + float(values["small"])
    if finding.variant in ("power-exponent", "power-negative"):
        return tensor.clamp(min=float(values["small"]))
    if finding.variant in ("edge", "log", "near", "outside"):
        return eval(f"tensor.{values['clamp']}")
    if finding.variant in ("division", "division-small"):
        small = float(values["small"])
        return torch.where(tensor.abs() < small, small, tensor)
    if finding.cause == "overflow" and "exponential" in finding.variant:
        return tensor.clamp(max=values["bound"]) if values["call"] not in ("sinh", "cosh") else tensor / 1e30
    return None


def gradients(parameters, closure):
    for parameter in parameters:
        parameter.grad = None
    loss = closure()
    if loss.requires_grad:
        loss.backward()
    found = [p.grad for p in parameters if p.grad is not None]
    for parameter in parameters:
        parameter.grad = None
    return loss.detach(), found


def all_finite(parameters, closure):
    loss, found = gradients(parameters, closure)
    return bool(torch.isfinite(loss)) and all(bool(torch.isfinite(g).all()) for g in found)


def findings(named, closure):
    return [f for f in diagnose(named, closure).findings if f.status == "non-finite"]


def say_all(finding):
    for language in ("en", "zh"):
        for part in ("what", "why", "remedy"):
            text = finding.say(part, language)
            assert text, (finding.cause, finding.variant, part)
            assert "{" not in text
            assert "gradcheck" not in text


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("dtype", "points", "least"),
    [
        (torch.float32, POINTS, 160),
        (torch.float64, FEW, 40),
        (torch.float16, FEW, 40),
        (torch.bfloat16, FEW, 40),
    ],
)
def test_of_functions_of_one_number_what_is_said_is_so_and_the_remedy_helps(dtype, points, least):
    counts = Counter()
    for name in UNARY.split():
        for point in points:
            for masked in (False, True):
                counts += judge_one(name, point, masked, dtype)
    assert counts["not finite"] >= least
    assert counts["remedies"] >= 0.9 * counts["not finite"], counts
    assert counts["unexplained"] <= 0.03 * counts["not finite"], counts


def judge_one(name, point, masked, dtype):
    """Counts of one function at one point, with its result at the point used or left out."""
    op, fix = function(name), [lambda x: x]
    p = nn.Parameter(torch.tensor([1.5 if name == "acosh" else 0.25, point], dtype=dtype))
    what = f"{name} at {point} in {dtype}, masked={masked}"

    def closure():
        x = fix[0](p * 1)
        y = op(x)  # here
        return (torch.where(KEPT, y, 0.0) if masked else y).sum() + (p * 0).sum()

    try:
        fine = all_finite([p], closure)
    except (RuntimeError, NotImplementedError):  # not for this type
        return Counter()
    found = findings({"p": p}, closure)
    assert bool(found) != fine, what
    counts = Counter({"tried": 1})
    if fine:
        return counts
    (finding,) = found
    say_all(finding)
    assert finding.where.source.endswith("# here"), what
    counts += Counter({"not finite": 1, "unexplained": finding.variant in UNEXPLAINED})
    value = finding.values.get("value")
    if value is not None and not value.startswith("≤"):
        near = value.startswith("≈ ")
        said = float(value.removeprefix("≈ ").replace("−", "-").replace("∞", "inf"))
        arrived = [float(v) for v in p]
        assert math.isnan(said) or any(
            math.isclose(said, v, rel_tol=0.5 if near else 1e-6) for v in arrived
        ), what
    if masked:
        safe = float(finding.values.get("safe", 1.0))
        fix[0] = lambda x: torch.where(KEPT, x, safe)
    elif remedied(finding, p.detach()) is not None:
        fix[0] = lambda x: remedied(finding, x)
    else:
        return counts
    counts["remedies"] += 1
    assert all_finite([p], closure), (what, finding.variant, finding.say("remedy"))
    return counts


@pytest.mark.filterwarnings("ignore")
def test_of_functions_of_two_numbers_what_is_said_is_so():
    counts = Counter()
    for name in BINARY.split():
        for pair in PAIRS:
            for masked in (False, True):
                counts += judge_two(name, *pair, masked)
    assert counts["not finite"] >= 120
    assert counts["remedies"] >= 25, counts
    assert counts["unexplained"] == 0, counts


def judge_two(name, first, second, masked):
    op, fix = function(name), [lambda x, y: (x, y)]
    a, b = (nn.Parameter(torch.tensor([0.25, v])) for v in (first, second))
    what = f"{name} at {first}, {second}, masked={masked}"

    def closure():
        x, y = fix[0](a * 1, b * 1)
        z = op(x, y)  # here
        return (torch.where(KEPT, z, 0.0) if masked else z).sum()

    try:
        fine = all_finite([a, b], closure)
    except (RuntimeError, NotImplementedError):
        return Counter()
    found = findings({"a": a, "b": b}, closure)
    assert bool(found) != fine, what
    counts = Counter({"tried": 1, "not finite": not fine})
    for finding in found:
        say_all(finding)
        counts["unexplained"] += finding.variant in UNEXPLAINED
        infinite = math.isinf(first) or math.isinf(second)
        if finding.variant == "parameter":
            assert infinite, what
            continue
        assert finding.where.source.endswith("# here"), what
        if finding.variant.startswith("division"):
            assert abs(second) < 1e-6, what
        if finding.variant.startswith("power"):
            assert float(finding.values["base"].replace("−", "-").replace("∞", "inf")) == first, what
        if finding.variant == "operand":
            assert infinite or math.isinf(op(a, b)[1].item()), what
        if infinite or masked or len(found) > 1:
            continue
        if finding.variant.startswith("division"):
            fix[0] = lambda x, y, f=finding: (x, remedied(f, y))
        elif finding.variant.startswith("power"):
            fix[0] = lambda x, y, f=finding: (remedied(f, x), y)
        elif finding.variant in ("edge", "log", "near", "outside"):
            fix[0] = lambda x, y, f=finding: (x, remedied(f, y))
        elif finding.variant == "origin":
            small = float(finding.values["small"])
            fix[0] = lambda x, y, small=small: (x, torch.where((y == 0) & (x == 0), small, y))
        else:
            continue
        counts["remedies"] += 1
        assert all_finite([a, b], closure), (what, finding.variant, finding.say("remedy"))
    return counts
