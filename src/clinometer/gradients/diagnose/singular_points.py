"""Singular points: what is special about the values that arrive where NaN or infinity is made.

`FORWARD_POINTS` are asked of the first operation of a forward whose result is not finite, `BACKWARD_POINTS`
of the first node that hands on a gradient that is not. The first rule that returns a clue decides, and a rule
returns one only for values that it has seen: the name of an operation alone explains nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from clinometer.gradients.diagnose.domains import DOMAINS, Domain, distance, short
from clinometer.gradients.diagnose.operation_view import Clue, OperationView
from clinometer.gradients.report.formatting import MINUS, words
from clinometer.gradients.sandbox.tensors import largest

PointRule = Callable[[OperationView], Clue | None]

_OPERANDS = words(
    """
    self other exponent result input weight mat1 mat2 vec vec1 vec2 batch1 batch2 tensor tensor1 tensor2
    tensors x1 x2 query key value target src source end grid A inverse
    """
)
"""Names under which operations have what they compute with."""
_PRODUCTS = words("mul mm bmm addmm baddbmm addbmm mv addmv dot linear convolution addr outer prod cumprod")
_SUMS = words("add sub rsub sum mean cumsum")
_LOSSES = words(
    """
    mseloss l1loss smoothl1loss huberloss binarycrossentropy binarycrossentropywithlogits softmarginloss mean
    nanmean
    """
)
"""Reductions that divide by the number of their entries."""
_EXPONENTIALS: dict[str, Callable[[float], float]] = {
    "exp": math.log, "expm1": math.log, "sinh": math.log, "cosh": math.log, "exp2": math.log2,
    "pow": math.sqrt,
}  # fmt: skip
"""Functions that overflow early, and the argument for which they reach a number."""
_NO_POLES = (
    _PRODUCTS
    | _SUMS
    | _EXPONENTIALS.keys()
    | words(
        """
        linalgvectornorm norm var std varmean stdmean tocopy linalgdet addcmul addcdiv lerp dist cdist pdist
        hypot logcumsumexp cumsum i0 specialerfcx softplus elu silu gelu nativelayernorm nativebatchnorm
        nativegroupnorm fusedrmsnorm scaleddotproductflashattentionforcpu celu addmm nansum trace
        mseloss smoothl1loss huberloss kldiv poissonnllloss matrixexp linalgmatrixexp expand repeat stack
        indexadd scatteradd indexput upsamplebilinear2d avgpool2d copy convert
        """
    )
)
"""Operations that are finite for all finite numbers: infinity out of them has left the range of its type."""
_WIDE = {
    "forward": "forward-wide",
    "exponential": "exponential-wide",
    "backward": "backward-wide",
    "sum": "sum-wide",
}
_NORMALISERS = words("nativelayernorm nativebatchnorm nativegroupnorm fusedrmsnorm batchnorm")
_SQUARE_MATRICES = words(
    """
    linalginvex linalgsolveex linalgslogdet linalgdet linalgcholeskyex linalgsolvetriangular linalglu
    linalglufactorex
    """
)


_DIVISORS = {
    "div": "other", "fmod": "other", "remainder": "other", "floordivide": "other", "addcdiv": "tensor2",
    "reciprocal": "self",
}  # fmt: skip


# ---- functions of one number ----


def end_of_a_domain(view: OperationView) -> Clue | None:
    """The argument is where the function or its slope is infinite: log at 0, acosh at 1."""
    domain, values = _domain_and_values(view)
    if domain is None or values is None or (end := domain.end_at(values)) is None:
        return None
    if not view.backward:
        return _domain_clue(view, domain, "edge", end, end=end)
    if view.nothing_arrived:
        return _domain_clue(view, domain, "where", end, end=end)
    return _domain_clue(view, domain, "sqrt" if view.name == "sqrt" else "edge", end, end=end)


def outside_of_a_domain(view: OperationView) -> Clue | None:
    """The argument is where the function has no value: the logarithm of a negative number."""
    domain, values = _domain_and_values(view)
    if domain is None:
        return None
    beyond = None if values is None else domain.outside(values)
    if beyond is None and view.backward and domain.inverse is not None:
        result = view.at("result")
        beyond = math.nan if result is not None and bool(torch.isnan(result).any()) else None
    return None if beyond is None else _domain_clue(view, domain, "outside", beyond)


def near_the_end_of_a_domain(view: OperationView) -> Clue | None:
    """The argument is so near to where the slope is infinite that the gradient leaves its type's range."""
    domain, values = _domain_and_values(view)
    if domain is None or values is None or (near := domain.end_near(values)) is None:
        return None
    clue = _domain_clue(view, domain, "near", near[0], end=near[1])
    if view.at(domain.argument) is not None:
        return clue
    return replace(clue, values=(*clue.values, ("value", f"≈ {near[0]:.1g}")))  # computed from the result


def _domain_and_values(view: OperationView) -> tuple[Domain | None, Tensor | None]:
    domain = DOMAINS.get(view.name)
    if domain is None:
        return None, None
    values = view.at(domain.argument)
    if values is None and domain.inverse is not None and (result := view.at("result")) is not None:
        values = domain.inverse(result)
    if values is not None and values.is_complex():
        values = values.abs() if domain.low == 0 else None
    return domain, values


def _domain_clue(
    view: OperationView, domain: Domain, variant: str, value: float, *, end: float = math.nan
) -> Clue:
    return _clue(
        view,
        variant,
        value=_number(value),
        end=_number(end),
        domain=domain.text,
        symbol=domain.symbol,
        clamp=domain.clamp(view.dtype),
        safe=str(domain.safe),
        small=short(distance(0.0, view.dtype)),
    )


# ---- divisions and powers ----


def division(view: OperationView) -> Clue | None:
    """The divisor is zero, or so small that its reciprocal or its square leaves the range of the type."""
    if view.name not in _DIVISORS:
        return None
    divisor = view.at(_DIVISORS[view.name])
    small = 1e-2 if view.dtype is torch.float16 else 1e-6
    names: dict[str, Any] = {"small": short(small), "safe": "1.0"}
    if view.name == "reciprocal" and divisor is None and (result := view.at("result")) is not None:
        if not bool((result.abs() > 1 / small).any()):
            return None
        # Infinite results are those of zero, and of numbers whose reciprocals are too large.
        variant, value = (
            "division-small",
            f"≤ {1 / min(float(result.abs().max()), torch.finfo(view.dtype).max):.1g}",
        )
    elif divisor is None or not divisor.numel():
        return None
    else:
        smallest = float(divisor.abs().nan_to_num(math.inf).min())
        if smallest >= small:
            return None
        variant, value = "division" if smallest == 0 else "division-small", _number(smallest)
    if view.nothing_arrived:
        variant = "where-division"
    return _clue(view, variant, value=value, **names)


def power(view: OperationView) -> Clue | None:
    """A base that is zero or negative, with an exponent for which that has no value or no slope."""
    if view.name != "pow":
        return None
    base, exponent = view.at("self"), view.at("exponent")
    if base is None or exponent is None or exponent.is_complex():
        return None
    base, exponent = torch.broadcast_tensors(base.abs() if base.is_complex() else base, exponent)
    values: dict[str, Any] = {
        "small": "1e-2" if view.dtype is torch.float16 else "1e-6",
        "safe": "1.0",
        "symbol": "x",
    }
    negative = (base < 0) & (exponent != exponent.floor())
    zero = (base == 0) & (exponent < (1 if view.backward else 0))
    if view.backward and _of_the_exponent(view):
        negative, zero = base < 0, (base == 0) & (exponent <= 0)
        variants = ("power-exponent", "power-exponent")
    elif view.nothing_arrived:
        variants = ("outside", "where")
    else:
        variants = ("power-negative", "power-zero")
    for hit, variant in ((zero, variants[1]), (negative, variants[0])):
        if bool(hit.any()):
            values |= {"base": _number(float(base[hit][0])), "exponent": _number(float(exponent[hit][0]))}
            values |= {"domain": "x ≥ 0", "clamp": f"clamp(min={values['small']})"}
            return _clue(view, variant, **values)
    return None


def _of_the_exponent(view: OperationView) -> bool:
    return view.position == 1 or not isinstance(view.read("self"), Tensor)


# ---- infinity that arrives ----


def infinity_without_a_result(view: OperationView) -> Clue | None:
    """∞ − ∞, 0 × ∞ and ∞ / ∞ are NaN, and so is what most functions make of an infinite argument."""
    if not view.nan or not any(bool(torch.isinf(operand).any()) for operand in _operands(view)):
        return None
    term = "0 × ∞" if view.name in ("mul", "prod", "cumprod") else "∞ / ∞" if view.name == "div" else ""
    term = "∞ − ∞" if view.name in _SUMS else term
    return _clue(view, "infinity-term" if term else "infinity", term=term, large=_large(view))


def operand_that_is_not_finite(view: OperationView) -> Clue | None:
    """The backward multiplies by a value that the forward made, or was given, infinite or NaN."""
    value = next((v for operand in _operands(view) for v in operand[~torch.isfinite(operand)][:1]), None)
    if value is None:
        return None
    return _clue(
        view, "operand", value=_number(abs(value) if value.is_complex() else value), large=_large(view)
    )


def _operands(view: OperationView) -> Iterator[Tensor]:
    """What an operation computes with: the entries that belong to the spoilt ones, if they can be told."""
    for name in sorted(_OPERANDS):
        if name == "result" and not view.backward:
            continue
        whole = view.tensor(name)
        if whole is None:
            value = view.read(name)
            if isinstance(value, float):
                yield torch.tensor(value)
            continue
        part = view.at(name)
        yield whole if part is None or view.name in _PRODUCTS - {"mul"} else part


def _large(view: OperationView) -> str:
    return "1e4" if view.dtype is torch.float16 else "1e9"


# ---- rows ----


def row_of_minus_infinity(view: OperationView) -> Clue | None:
    """A softmax or logsumexp with nothing to choose from: every score of a row is −∞."""
    if view.name not in ("softmax", "logsoftmax", "logsumexp"):
        return None
    scores = view.tensor("self")
    if scores is None:
        return None
    hidden = torch.isneginf(scores)
    over = _dimensions(view.read("dim"), scores.dim())
    rows = hidden.all(over[0]) if len(over) == 1 else hidden.all()
    return _clue(view, "softmax") if bool(rows.any()) else None


def spread_of_one(view: OperationView) -> Clue | None:
    """A standard deviation or variance of n values divides by n − 1."""
    values = view.tensor("self")
    if view.name not in ("std", "var", "stdmean", "varmean") or values is None:
        return None
    over = _dimensions(view.read("dim"), values.dim())
    count = math.prod(values.shape[d] for d in over)
    correction = view.read("correction")
    if count - (1 if correction is None else correction) > 0:
        return None
    return _clue(view, "single", number=count) if count else _clue(view, "empty")


def mean_of_nothing(view: OperationView) -> Clue | None:
    """A mean over no entries is 0/0."""
    values = view.tensor("self")
    if view.name not in _LOSSES or values is None or values.numel():
        return None
    return _clue(view, "empty")


def targets_that_do_not_count(view: OperationView) -> Clue | None:
    """A mean over targets that are all ignored, or whose classes have no weight, is 0/0."""
    target, weight = view.read("target"), view.read("weight")
    if view.name not in ("nllloss", "nllloss2d") or not isinstance(target, Tensor):
        return None
    ignored = view.read("ignore_index")
    counted = target[target != (-100 if ignored is None else ignored)]
    if not counted.numel():
        return _clue(view, "no-target")
    if isinstance(weight, Tensor) and not bool(weight[counted].any()):
        return _clue(view, "no-weight")
    return None


def no_alignment(view: OperationView) -> Clue | None:
    """A CTC loss is infinite for a target that does not fit into its input."""
    if view.name != "ctcloss":
        return None
    target, lengths, given = (view.read(n) for n in ("targets", "target_lengths", "input_lengths"))
    if target is None or lengths is None or given is None:
        return None
    lengths, given = [torch.as_tensor(v).flatten().tolist() for v in (lengths, given)]
    rows = list(target) if target.dim() == 2 else list(target.split([int(n) for n in lengths]))
    for row, length, frames in zip(rows, lengths, given, strict=False):
        row = row[: int(length)]
        needed = int(length) + int((row[1:] == row[:-1]).sum())
        if frames < needed:
            return _clue(view, "no-alignment", frames=int(frames), needed=needed)
    return None


def row_of_equal_values(view: OperationView) -> Clue | None:
    """A normalisation whose eps is 0 divides by the spread of values that are all equal."""
    spread = view.tensor("result2")
    if view.name not in _NORMALISERS or spread is None or not bool(torch.isinf(spread).any()):
        return None
    return _clue(view, "eps")


# ---- angles ----


def angle_of_the_origin(view: OperationView) -> Clue | None:
    """atan2(0, 0) and hypot(0, 0) have no slope."""
    first, second = view.at("self"), view.at("other")
    if not view.backward or view.name not in ("atan2", "hypot") or first is None or second is None:
        return None
    first, second = torch.broadcast_tensors(first, second)
    if not bool(((first == 0) & (second == 0)).any()):
        return None
    variant = "where" if view.nothing_arrived else "origin"
    small = "1e-3" if view.dtype is torch.float16 else "1e-12"
    return _clue(view, variant, small=small, safe="1.0", symbol="x")


# ---- matrices ----


def equal_singular_values(view: OperationView) -> Clue | None:
    """The derivative of singular vectors has 1/(sᵢ² − sⱼ²) in it."""
    values = view.tensor("S")
    if not view.backward or view.name != "linalgsvd" or values is None:
        return None
    if (pair := _closest(values.square())) is not None:
        return _clue(view, "singular-values", value=_number(pair.sqrt()))
    if bool((values == 0).any()):
        return _clue(view, "singular-zero")
    return None


def equal_eigenvalues(view: OperationView) -> Clue | None:
    """The derivative of eigenvectors has 1/(λᵢ − λⱼ) in it."""
    values = view.tensor("eigenvalues")
    if not view.backward or view.name not in ("linalgeigh", "linalgeig") or values is None:
        return None
    pair = _closest(values)
    if pair is None:
        return None
    return _clue(view, "eigenvalues", value=_number(abs(pair) if pair.is_complex() else pair))


def _closest(values: Tensor) -> Tensor | None:
    """One of two values of a row that are equal up to rounding; None if there are no such two."""
    apart = (values[..., :, None] - values[..., None, :]).abs()
    apart.diagonal(dim1=-2, dim2=-1).fill_(math.inf)
    equal = apart.amin(-1) <= 4 * torch.finfo(values.dtype).eps * values.abs().amax(-1, keepdim=True)
    found = values[equal]
    return found[0] if found.numel() else None


def singular_matrix(view: OperationView) -> Clue | None:
    """A pivot of the matrix is zero, or nothing but rounding beside the largest."""
    if view.name == "linalgqr":
        factor = view.tensor("R")
    elif view.name in _SQUARE_MATRICES:
        # A triangular system has its matrix as it is; inverse has none: its size says the same.
        names = ("LU", "U", "L", *(("self", "A") if view.name == "linalgsolvetriangular" else ()))
        factor = next((f for name in names if (f := view.tensor(name)) is not None), None)
        if factor is None and not view.backward and (matrix := view.tensor("A")) is not None:
            factor = torch.linalg.lu_factor_ex(matrix)[0]
        if factor is None and (inverse := view.tensor("inverse")) is not None:
            return (
                _clue(view, "singular", value=_number(1 / (largest(inverse) or 1.0)))
                if _huge(inverse)
                else None
            )
    else:
        return None
    if factor is None or not bool(torch.isfinite(factor).all()):
        return None
    pivots = factor.diagonal(dim1=-2, dim2=-1).abs()
    largest_one = pivots.amax(-1, keepdim=True)
    lost = pivots <= 4 * torch.finfo(pivots.dtype).eps * largest_one
    huge = bool((pivots < torch.finfo(pivots.dtype).max ** -0.5).any())
    if not bool(lost.any()) and not huge:
        return None
    variant = "rank" if view.name == "linalgqr" else "singular"
    return _clue(view, variant, value=_number(pivots.min()))


def _huge(inverse: Tensor) -> bool:
    size = largest(inverse) or 0.0
    return not size * size < torch.finfo(inverse.dtype).max


# ---- too large for the type ----


def result_too_large(view: OperationView) -> Clue | None:
    """An operation that is finite for all finite numbers gave infinity: its type ends before."""
    if view.backward or view.name not in _NO_POLES:
        return None
    sizes = [largest(operand) or 0.0 for operand in _operands(view)]
    top = torch.finfo(view.dtype).max
    if view.nan and not max(sizes, default=0.0) ** 2 >= top:  # on the way only what is squared overflows
        return None
    inverse = _EXPONENTIALS.get(view.name)
    if inverse is not None and view.name != "pow":
        bound = math.floor(inverse(top)) - 1
        return _overflow(view, "exponential", bound=bound)
    return _overflow(view, "forward")


def gradient_too_large(view: OperationView) -> Clue | None:
    """What arrives and what it is multiplied by can together leave the range of the type."""
    if view.arrived is None or not bool(torch.isinf(view.result).any()):
        return None
    top = torch.finfo(view.dtype).max
    factor = max([1.0, *(largest(operand) or 0.0 for operand in _operands(view))])
    exponent = view.read("exponent") if view.name == "pow" else None
    power_of = max(2.0, abs(float(exponent))) if isinstance(exponent, int | float) else 2.0
    reach = math.log(max(largest(view.arrived) or 0.0, 1e-300)) + power_of * math.log(factor)
    reach += math.log(max(1, view.arrived.numel()))
    return _overflow(view, "backward") if reach >= math.log(top) else None


def _overflow(view: OperationView, variant: str, **values: Any) -> Clue:
    most = f"{torch.finfo(view.dtype).max:.2g}".replace("e+", "e")
    names = {"call": plain_name(view.name), "dtype": view.dtype_name, "most": most, **values}
    return Clue("overflow", of_range(variant, view.dtype), values=tuple(names.items()))


def of_range(variant: str, dtype: torch.dtype) -> str:
    """The variant of an overflow: where only float64 has a wider range, another type is no remedy."""
    wide = torch.finfo(dtype).max >= torch.finfo(torch.bfloat16).max
    return _WIDE[variant] if wide else variant


# ---- what no rule explains ----


def values_that_arrived(view: OperationView) -> Clue | None:
    """What went in, and nothing about why."""
    values = view.at("self")
    if values is None or not values.numel() or values.is_complex():
        return _clue(view, "other")
    return _clue(view, "other-at", value=_number(values[0]))


FORWARD_POINTS: tuple[PointRule, ...] = (
    row_of_minus_infinity,
    infinity_without_a_result,
    outside_of_a_domain,
    end_of_a_domain,
    near_the_end_of_a_domain,
    division,
    power,
    spread_of_one,
    mean_of_nothing,
    targets_that_do_not_count,
    no_alignment,
    row_of_equal_values,
    singular_matrix,
    result_too_large,
    values_that_arrived,
)

BACKWARD_POINTS: tuple[PointRule, ...] = (
    end_of_a_domain,
    outside_of_a_domain,
    near_the_end_of_a_domain,
    division,
    power,
    spread_of_one,
    targets_that_do_not_count,
    row_of_equal_values,
    operand_that_is_not_finite,
    angle_of_the_origin,
    equal_singular_values,
    equal_eigenvalues,
    singular_matrix,
    gradient_too_large,
    values_that_arrived,
)


def singular_point(view: OperationView) -> Clue:
    """Returns what is special about the values that arrive at an operation."""
    rules = BACKWARD_POINTS if view.backward else FORWARD_POINTS
    try:
        found = next((clue for rule in rules if (clue := rule(view)) is not None), None)
    except (
        RuntimeError,
        TypeError,
        ValueError,
        IndexError,
        NotImplementedError,
    ):  # a type that has no such read
        found = None
    return found or _clue(view, "other")


def _clue(view: OperationView, variant: str, **values: Any) -> Clue:
    names = {"call": plain_name(view.name), "dtype": view.dtype_name, **values}
    return Clue("backward" if view.backward else "forward", variant, values=tuple(names.items()))


def plain_name(name: str) -> str:
    """An operation as a person calls it: "specialndtri" is ndtri."""
    return name.removeprefix("special").removeprefix("linalg").removesuffix("ex").removeprefix("native")


def _dimensions(dims: Any, count: int) -> list[int]:
    """The dimensions of a reduction, from 0; all of them if none are given."""
    given = [dims] if isinstance(dims, int) else list(dims or range(count))
    signed = [d - 2**64 if d >= 2**63 else d for d in given]  # nodes save them unsigned
    return [d % count for d in signed] if count else []


def _number(value: Any) -> str:
    """With as many digits as tell 0.999999 from 1."""
    value = float(value)
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "+∞" if value > 0 else f"{MINUS}∞"
    text = f"{value:.7g}"
    if abs(value) < 1e6 and float(text).is_integer() and float(text) != value:
        text = f"{value:.9g}"
    return text.replace("-", MINUS, 1) if value < 0 else text
