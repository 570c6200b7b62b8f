"""Each remedy for NaN and infinity was followed: the faulty program, the remedy applied, a healthy program.

The reasons come from values, so every program has a twin that differs in nothing but the remedy.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clinometer.gradients.diagnose.diagnose import diagnose

INF = float("inf")
PROGRAMS = []


def program(variant, *words, start=None, cause="backward"):
    """A loss of (parameter, whether the remedy is followed); `words` must stand in the remedy."""

    def add(loss):
        PROGRAMS.append((loss, cause, variant, words, start))
        return loss

    return add


def matrix(*diagonal):
    return torch.diag(torch.tensor(diagonal))


@program("edge", "clamp(min=1 + 1e-6)", start=torch.tensor([1.0, 1.5, 3.0]))
def inverse_cosh_at_one(p, mended):
    return torch.acosh(p.clamp(min=1 + 1e-6) if mended else p * 1).sum()


@program("edge", "clamp(min=-1 + 1e-6, max=1 - 1e-6)", start=torch.tensor([1.0, 0.5, -1.0]))
def arc_sine_at_one(p, mended):
    return torch.asin(p.clamp(-1 + 1e-6, 1 - 1e-6) if mended else p * 1).sum()


@program("outside", "clamp(min=1 + 1e-6)", start=torch.tensor([0.9, 1.5]), cause="forward")
def inverse_cosh_below_one(p, mended):
    return torch.acosh(p.clamp(min=1 + 1e-6) if mended else p * 1).sum()


@program("power-exponent", "clamp(min=1e-6)", start=torch.tensor([3.0, 2.0]))
def learned_exponent_of_a_negative_base(p, mended):
    x = torch.tensor([-0.5, 0.5])
    return ((x.clamp(min=1e-6) if mended else x) ** p).sum()


@program("power-negative", "clamp(min=1e-6)", start=torch.tensor([-0.5, 0.5]), cause="forward")
def root_by_a_power_of_a_negative_number(p, mended):
    return ((p.clamp(min=1e-6) if mended else p * 1) ** 1.5).sum()


@program("power-zero", "+ 1e-6", start=torch.tensor([0.0, 0.5]))
def power_below_one_of_zero(p, mended):
    return ((p + 1e-6 if mended else p * 1) ** 0.5).sum()


@program("sqrt", "+ 1e-12", start=torch.tensor([0.0, 2.0]))
def length_of_nothing(p, mended):
    return (p.square() + (1e-12 if mended else 0)).sqrt().sum()


@program("where", "torch.where(ok, x, 2.0)", start=torch.tensor([1.0, 2.0]))
def masked_after_acosh(p, mended):
    ok = p > 1
    return torch.where(ok, torch.acosh(torch.where(ok, p, 2.0) if mended else p * 1), 0.0).sum()


@program("where-division", "d = torch.where(ok, d, 1.0)", start=torch.tensor([0.0, 2.0]))
def masked_after_a_division(p, mended):
    ok = p > 0
    return torch.where(ok, 3 / (torch.where(ok, p, 1.0) if mended else p * 1), 0.0).sum()


@program("division", "torch.where(d.abs()", start=torch.tensor([0.0, 2.0]), cause="forward")
def division_by_zero(p, mended):
    return (3 / (torch.where(p.abs() < 1e-6, 1e-6, p) if mended else p * 1)).sum()


@program("division-small", "torch.where(d.abs()", start=torch.tensor([1e-30, 2.0]))
def division_by_very_little(p, mended):
    return (torch.ones(2) / (torch.where(p.abs() < 1e-6, 1e-6, p) if mended else p * 1)).sum()


@program("singular-values", "svdvals", "perturbation", start=matrix(3.0, 2.0, 0.0, 0.0))
def singular_vectors_of_a_matrix_of_low_rank(p, mended):
    a = p + 1e-3 * torch.linspace(0.1, 1.3, 16).sin().view(4, 4) if mended else p * 1
    u, s, v = torch.linalg.svd(a)
    return (u * s.square() @ v * torch.arange(16.0).view(4, 4)).sum()


@program("singular-values", "svdvals", start=torch.eye(3))
def singular_values_alone_have_a_gradient(p, mended):
    return torch.linalg.svdvals(p).sum() if mended else torch.linalg.svd(p)[0].sum()


@program("eigenvalues", "torch.diag(1e-3 * torch.rand(n))", start=torch.eye(3))
def eigenvectors_of_equal_eigenvalues(p, mended):
    a = p + torch.diag(1e-3 * torch.tensor([0.1, 0.5, 0.8])) if mended else p * 1
    return torch.linalg.eigh(a)[1].sum()


@program("rank", "1e-3 * torch.randn_like(A)", start=torch.ones(3, 3))
def qr_of_dependent_columns(p, mended):
    a = p + 1e-3 * torch.randn(3, 3, generator=torch.Generator().manual_seed(0)) if mended else p * 1
    return torch.linalg.qr(a)[0].sum()


@program("singular", "1e-3 * torch.eye(n)", start=torch.ones(3, 3), cause="forward")
def logarithm_of_the_determinant_of_a_singular_matrix(p, mended):
    return torch.linalg.slogdet(p + (1e-3 * torch.eye(3) if mended else 0))[1]


@program("singular", "1e-3 * torch.eye(n)", start=1e-30 * torch.eye(3))
def solution_of_a_nearly_singular_system(p, mended):
    return torch.linalg.solve(p + (1e-3 * torch.eye(3) if mended else 0), torch.ones(3, 1)).sum()


@program("singular", "1e-3 * torch.eye(n)", start=torch.zeros(3, 3), cause="forward")
def triangular_system_with_a_zero_on_its_diagonal(p, mended):
    a = p + (1e-3 * torch.eye(3) if mended else 0)
    return torch.linalg.solve_triangular(a, torch.ones(3, 1), upper=True).sum()


@program("origin", "torch.where((x == 0) & (y == 0)", start=torch.zeros(2))
def hypotenuse_of_nothing(p, mended):
    x, y = p, p * 2
    return torch.hypot(y, torch.where((x == 0) & (y == 0), 1e-12, x) if mended else x).sum()


@program("eps", "1e-5", start=torch.ones(2, 4), cause="forward")
def layer_norm_without_eps(p, mended):
    return F.layer_norm(p, (4,), eps=1e-5 if mended else 0.0).square().sum() + p.sum()


@program("eps-inside", "1e-5", start=torch.zeros(2, 4), cause="forward")
def normalize_without_eps(p, mended):
    return (F.normalize(p, eps=1e-5 if mended else 0.0) + p).sum()


@program("eps-inside", "1e-5", start=torch.zeros(2, 4), cause="forward")
def rms_norm_without_eps(p, mended):
    return (F.rms_norm(p, (4,), eps=1e-5 if mended else 0.0) + p).sum()


@program("no-alignment", "zero_infinity=True", start=torch.randn(3, 1, 5), cause="forward")
def target_longer_than_its_input(p, mended):
    lengths = torch.tensor([3]), torch.tensor([3])
    loss = F.ctc_loss(p.log_softmax(-1), torch.tensor([[1, 1, 2]]), *lengths, zero_infinity=mended)
    return loss + p.square().sum()


@program("no-target", "reduction", start=torch.randn(3, 5), cause="forward")
def every_target_ignored(p, mended):
    targets = torch.full((3,), -100)
    if mended:
        return F.cross_entropy(p, targets, reduction="sum") / max(int((targets != -100).sum()), 1) + p.sum()
    return F.cross_entropy(p, targets) + p.sum()


@program("no-weight", "weight above 0", start=torch.randn(3, 2), cause="forward")
def classes_without_weight(p, mended):
    return F.cross_entropy(p, torch.zeros(3, dtype=torch.long), torch.tensor([0.5 if mended else 0.0, 1.0]))


@program("empty", "max(count, 1)", start=torch.randn(4), cause="forward")
def mean_over_nothing(p, mended):
    chosen = p[p > 1e9]
    return (chosen.sum() / max(chosen.numel(), 1) if mended else chosen.mean()) + p.sum()


@program("single", "correction=0", start=torch.randn(4, 1), cause="forward")
def variance_of_one(p, mended):
    return (p.var(-1, correction=0 if mended else 1) + p.squeeze()).sum()


@program("softmax", "Leave at least one position", start=torch.randn(2, 3), cause="forward")
def row_that_is_masked_throughout(p, mended):
    mask = torch.tensor([[True] * 3, [False] * 3])
    mask[0, 0] &= not mended
    return (p + torch.zeros(2, 3).masked_fill(mask, -INF)).softmax(-1).square().sum()


@program("unseen-softmax", "Leave at least one position", start=torch.randn(2, 3))
def masked_row_that_the_loss_leaves_out(p, mended):
    mask = torch.tensor([[True] * 3, [False] * 3])
    mask[0, 0] &= not mended
    return (p + torch.zeros(2, 3).masked_fill(mask, -INF)).softmax(-1)[1:].square().sum()


@program("operand", "large finite number", start=torch.tensor([1.0, 2.0]))
def logaddexp_of_minus_infinity(p, mended):
    x = p + torch.tensor([-1e9 if mended else -INF, 0.0])
    return torch.where(torch.tensor([False, True]), torch.logaddexp(x, x), 0.0).sum()


@program("infinity-term", "large finite number", start=torch.tensor([1.0, 2.0]), cause="forward")
def infinity_minus_infinity(p, mended):
    x = p.masked_fill(torch.tensor([True, False]), 1e9 if mended else INF)
    return (x - x).sum() + p.sum()


@program("constant", "Write a finite number", start=torch.tensor([1.0, 2.0]), cause="forward")
def nan_written_by_the_program(p, mended):
    marks = torch.tensor([0.0 if mended else float("nan"), 1.0])
    return (p * marks).sum()


@program("constant", "Write a finite number", start=torch.tensor([1.0, 2.0]), cause="forward")
def nan_as_a_number(p, mended):
    return (p * (1.0 if mended else float("nan"))).sum()


@program("exponential-wide", "clamp(max=87)", start=torch.tensor([1.0, 100.0]), cause="overflow")
def exponential_of_much(p, mended):
    return torch.exp(p.clamp(max=87) if mended else p * 1).log().sum()


@program("exponential", "float32", start=torch.tensor([1.0, 20.0]).half(), cause="overflow")
def exponential_in_half_precision(p, mended):
    return torch.exp(p.float() if mended else p * 1).float().log().sum()


@program("forward-wide", "normalise", start=torch.tensor([1.0, 1e20]), cause="overflow")
def square_of_much(p, mended):
    return (p / 1e20 if mended else p * 1).square().sum()


@program("unseen-large", "softplus", start=torch.tensor([1.0, 100.0]))
def softplus_by_hand(p, mended):
    return F.softplus(p).sum() if mended else (1 / (1 + torch.exp(p))).sum()


@program("unseen", "torch.where(ok, x, 1.0)", start=torch.tensor([1.0, 0.0]))
def logarithm_far_before_the_mask(p, mended):
    count = torch.tensor([1.0, 0.0])
    ok = count > 0
    share = torch.log(torch.where(ok, count, 1.0) if mended else count)
    return torch.where(ok, (share + 1) * p, 0.0).sum()


@program("hook", "hook", start=torch.tensor([1.0, 2.0]))
def hook_that_divides_by_zero(p, mended):
    h = p * 2
    h.register_hook(lambda g: g if mended else g * (g - g) / (g - g))
    return h.square().sum()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", PROGRAMS, ids=lambda case: case[0].__name__)
def test_the_reason_is_in_the_values_and_the_remedy_mends(case):
    loss, cause, variant, words, start = case
    p = nn.Parameter(start.clone())
    found = diagnose({"p": p}, lambda: loss(p, False))
    (finding,) = [f for f in found.findings if f.severity == "fault"]
    assert (finding.status, finding.cause, finding.variant) == ("non-finite", cause, variant), str(found)
    assert finding.where.function == loss.__name__
    for part in ("what", "why", "remedy"):
        for language in ("en", "zh"):
            assert "{" not in finding.say(part, language)
            assert finding.say(part, language)
    assert all(word in finding.say("remedy", "en") for word in words), finding.say("remedy", "en")
    healthy = diagnose({"p": p}, lambda: loss(p, True))
    assert not [f for f in healthy.findings if f.status == "non-finite"], str(healthy)


def test_float32_is_not_told_to_use_float32():
    for dtype, told in ((torch.float32, False), (torch.bfloat16, False), (torch.float16, True)):
        p = nn.Parameter(torch.full((2,), torch.finfo(dtype).max / 2, dtype=dtype))
        (finding,) = diagnose({"p": p}, lambda p=p: (p * 4).sum().float()).findings
        assert finding.cause == "overflow"
        assert ("or use bfloat16 or float32" in finding.say("remedy", "en")) == told


def test_a_hook_of_a_module_is_not_taken_for_a_custom_function():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model[1].register_full_backward_hook(lambda module, into, out: (into[0] * float("nan"),))
    (finding,) = diagnose(model, lambda: model(torch.ones(1, 2)).sum()).findings
    assert (finding.cause, finding.variant) == ("backward", "hook")


def test_a_hook_of_a_parameter_has_no_line_to_accuse():
    p = nn.Parameter(torch.ones(2))
    p.register_hook(lambda g: g * float("nan"))
    (finding,) = diagnose({"p": p}, lambda: (p * 2).sum()).findings
    assert (finding.variant, finding.where) == ("hook-parameter", None)


def test_a_gradient_spoilt_behind_a_softmax_is_not_the_softmax_s():
    """−∞ goes into the softmax as it should; what is not finite is the gradient that comes to it."""
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 1)])

    def closure():
        scores = model[0](torch.ones(2, 4)) + torch.tensor([0.0, 0.0, 0.0, -INF])
        v = model[1](scores.softmax(-1))
        return (v - v.detach()).sqrt().sum()  # here

    (finding,) = diagnose(model, closure).findings
    assert finding.where.source.endswith("# here")
    assert finding.variant == "sqrt"
