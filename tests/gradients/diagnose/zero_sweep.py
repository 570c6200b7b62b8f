"""Torch's unary, binary and reducing operations, in flat places, at singular points and elsewhere.

For each the gradient is computed in float32 and in float64. Where it is zero in one of them, in float64 up
to rounding, `diagnose` must say so, with a cause and a line; where it is not, no fault may be said of it.
Gradients between the two, and those that are not finite, are run and not judged.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clinometer.gradients.diagnose.diagnose import diagnose
from clinometer.gradients.report.formatting import words

UNARY = words(
    """
    abs acos acosh angle asin asinh atan atanh ceil cos cosh deg2rad digamma erf erfc erfinv exp exp2
    expm1 fix floor frac i0 lgamma log log10 log1p log2 logit nan_to_num neg positive rad2deg reciprocal
    relu round rsqrt sgn sigmoid sign signbit sin sinc sinh sqrt square tan tanh trunc special.entr
    special.erfcx special.i0e special.i1 special.i1e special.log_ndtr special.ndtr special.ndtri
    bernoulli poisson nn.functional.celu nn.functional.elu nn.functional.gelu nn.functional.hardshrink
    nn.functional.hardsigmoid nn.functional.hardswish nn.functional.hardtanh nn.functional.leaky_relu
    nn.functional.logsigmoid nn.functional.mish nn.functional.relu6 nn.functional.rrelu
    nn.functional.selu nn.functional.silu nn.functional.softplus nn.functional.softshrink
    nn.functional.softsign nn.functional.tanhshrink
    """
)
BINARY = words(
    """
    add sub mul div true_divide pow float_power fmod remainder atan2 hypot maximum minimum fmax fmin
    copysign xlogy special.xlog1py logaddexp logaddexp2 nextafter floor_divide heaviside ldexp normal
    """
)
ALONG = words(
    """
    amax amin max min logsumexp mode nanmedian cumsum cumprod cummax cummin logcumsumexp softmax log_softmax
    sort argsort argmax argmin
    """
)
WHOLE = words("sum mean prod std var median norm nansum nanmean")
REDUCTIONS: dict[str, Callable[[Tensor], Any]] = {
    **{name: getattr(torch, name) for name in sorted(WHOLE)},
    **{name: partial(getattr(torch, name), dim=-1) for name in sorted(ALONG)},
    "norm 1": lambda h: h.norm(1, -1),
    "norm inf": lambda h: h.norm(math.inf, -1),
    "norm 0": lambda h: h.norm(0, -1),
    "kthvalue": lambda h: h.kthvalue(2, -1),
    "quantile": lambda h: h.quantile(0.5, -1),
    "topk": lambda h: h.topk(2, -1),
    "softmin": lambda h: F.softmin(h, -1),
    "layer_norm": lambda h: F.layer_norm(h, (4,)),
    "group_norm": lambda h: F.group_norm(h, 1),
    "group_norm of one": lambda h: F.group_norm(h, 4),
    "batch_norm": lambda h: F.batch_norm(h, None, None, training=True),
    "instance_norm": lambda h: F.instance_norm(h[None]),
    "rms_norm": lambda h: F.rms_norm(h, (4,)),
    "normalize": lambda h: F.normalize(h, dim=-1),
    "normalize, squared": lambda h: F.normalize(h, dim=-1).square(),
    "cosine_similarity": lambda h: F.cosine_similarity(h, h, dim=-1),
    "less its mean": lambda h: h - h.mean(-1, keepdim=True),
    "by its sum": lambda h: h.exp() / h.exp().sum(-1, keepdim=True),
    "by its largest": lambda h: h.exp() / h.exp().amax(-1, keepdim=True),
    "max_pool1d": lambda h: F.max_pool1d(h[None], 2),
    "avg_pool1d": lambda h: F.avg_pool1d(h[None], 2),
    "multinomial": lambda h: torch.multinomial(h.softmax(-1), 2).float(),
    "gumbel_softmax": lambda h: F.gumbel_softmax(h, hard=True),
    "one_hot": lambda h: F.one_hot(h.argmax(-1), 4).float(),
    "bucketize": lambda h: torch.bucketize(h, torch.tensor([0.0, 1.0])).float(),
    "histc": lambda h: torch.histc(h, 4),
    "count_nonzero": lambda h: torch.count_nonzero(h, -1).float(),
    "det": lambda h: torch.linalg.det(h[:4] @ h[:4].T),
    "cdist": lambda h: torch.cdist(h, h + 1),
}  # fmt: skip
POINTS = {
    "zero": 0.0,
    "half": 0.5,
    "far above": 60.0,
    "far below": -60.0,
    "further below": -300.0,
    "spread": None,
}
MISSED = {("batch_norm", "far above")}
"""Silent: the mean of equal large numbers is rounded too much to tell what is left of it from a slope."""
CONSTANTS = (0.0, 1.0, -1.0, 60.0)


@dataclass(frozen=True)
class Place:
    """An operation at a point."""

    name: str
    function: Callable[[Tensor], Tensor]
    point: str


@dataclass(frozen=True)
class Answer:
    """What the gradient is, and what is said."""

    gradient: str
    """"zero", "some", "not finite", "none", or "raises"."""
    said: str
    """"" or the cause."""
    place: str
    """The operation that is named; "" for none."""
    wrong: str
    """What is wrong with the answer; "" if it is right."""


def places() -> Iterator[Place]:
    for name in sorted(UNARY):
        function = _named(name)
        for point in POINTS:
            yield Place(name, lambda h, f=function: f(h), point)
    for name in sorted(BINARY):
        function = _named(name)
        for constant in CONSTANTS:
            for point in ("zero", "half", "far above", "spread"):
                yield Place(
                    f"{name}(h, {constant})", lambda h, f=function, c=constant: f(h, h.new_tensor(c)), point
                )
                yield Place(
                    f"{name}({constant}, h)", lambda h, f=function, c=constant: f(h.new_tensor(c), h), point
                )
    for mode in ("trunc", "floor"):
        yield Place(f"div {mode}", lambda h, mode=mode: torch.div(h, 0.1, rounding_mode=mode), "spread")
    for name, function in REDUCTIONS.items():
        for point in ("zero", "half", "far above", "spread"):
            yield Place(name, function, point)


def answer(place: Place) -> Answer:
    """Runs the operation behind a linear layer, and beside a term that trains another one."""
    torch.manual_seed(0)
    model, other = nn.Linear(4, 4), nn.Linear(1, 1)
    value = POINTS[place.point]
    if value is not None:
        nn.init.zeros_(model.weight)
        nn.init.constant_(model.bias, value)
    x = torch.randn(6, 4)

    def loss(numbers: Tensor = x, layer: nn.Module = model) -> Tensor:
        out = place.function(layer(numbers))  # here
        return 0.3 * _first(out).sum() + other(torch.ones(1, 1)).sum().to(numbers.dtype)

    gradient = _gradient(place, model, x)
    try:
        found = diagnose({"weight": model.weight, "bias": model.bias, "other": other.weight}, loss)
    except RuntimeError as error:
        noted = any("zero_sweep.py:" in note for note in getattr(error, "__notes__", ()))
        return Answer("raises", "", "", "" if noted or gradient == "raises" else f"raised {error}")
    entry = found["bias"]
    cause, where = entry.cause or "", entry.where.op if entry.where else ""
    return Answer(gradient, cause, where, _wrong(gradient, entry, found.render("en")))


def _wrong(gradient: str, entry: Any, text: str) -> str:
    line = entry.where is not None and entry.where.file == __file__
    if gradient == "zero" and (entry.status not in ("zero", "none") or entry.cause in (None, "unknown")):
        return f"zero, but {entry.status} {entry.cause}"
    if gradient == "zero" and not line and entry.cause != "structural":
        return f"no line: {text}"
    if gradient == "some" and entry.status == "zero" and entry.severity == "fault":
        return f"accused: {text}"
    return ""


def _gradient(place: Place, model: nn.Module, x: Tensor) -> str:
    """What the gradient of the operation's input is, in float32 and in float64."""
    found = [_gradient_of(place, model(x).detach().to(dtype)) for dtype in (torch.float32, torch.float64)]
    return "zero" if "zero" in found and "raises" not in found else found[1]


def _gradient_of(place: Place, h: Tensor) -> str:
    h.requires_grad_()
    try:
        out = _first(place.function(h))
        if out.grad_fn is None:
            return "none"
        (gradient,) = torch.autograd.grad(out.sum(), h, retain_graph=True)
        (term,) = torch.autograd.grad((out * torch.rand_like(out)).sum(), h)
    except RuntimeError:
        return "raises"
    if not bool(torch.isfinite(gradient).all()) or not bool(torch.isfinite(out).all()):
        return "not finite"
    size, terms = float(gradient.abs().max()), float(term.abs().max())
    rounding = 1e-11 if h.dtype == torch.float64 else 0.0
    if size <= rounding * terms:
        return "zero"
    return "some" if size > max(1e-5 * terms, rounding * float(out.abs().max())) else "small"


def _first(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out[0]


def _named(name: str) -> Callable[..., Tensor]:
    found: Any = torch
    for part in name.split("."):
        found = getattr(found, part)
    return found
