"""float64 whatever the model asks for; and what cannot do that, said and checked on its own."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from clinometer.gradients.check.check_gradients import check_gradients
from clinometer.gradients.check.numerics.float64 import InDouble, in_double


class Lowering(nn.Module):
    """A forward that leaves the model's precision in every way there is."""

    def __init__(self, way):
        super().__init__()
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 1)
        self.way = way
        self.register_buffer("scale", torch.linspace(1, 2, 6))

    def forward(self, x):
        h = self.first(x)
        match self.way:
            case "float":
                h = h.float().tanh()
            case "half":
                h = h.half().float()
            case "to dtype":
                h = h.to(torch.bfloat16).to(torch.float32)
            case "to keyword":
                h = h.to(dtype=torch.float16, copy=True)
            case "to other":
                h = h.to(torch.zeros(1))
            case "type":
                h = h.type(torch.FloatTensor).type("torch.FloatTensor").type(torch.float32)
            case "type_as":
                h = h.type_as(torch.zeros(1, dtype=torch.float16))
            case "softmax dtype":
                h = F.softmax(h, -1, dtype=torch.float32)
            case "factories":
                h = h * torch.full((6,), 1 / 3, dtype=torch.float32) + h.new_ones(6, dtype=torch.float16) / 3
            case "autocast":
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    h = F.linear(h, torch.eye(6))
            case "in place":
                out = torch.zeros(*h.shape, dtype=torch.float32)
                out[:, 1:] = h[:, 1:]
                h = out.add_(h) * self.scale
            case "sums":
                h = h.sum(0, dtype=torch.float32) + h.cumsum(0, dtype=torch.float32)
        return self.last(h.to(self.last.weight.dtype)).square().mean()


WAYS = [
    "float",
    "half",
    "to dtype",
    "to keyword",
    "to other",
    "type",
    "type_as",
    "softmax dtype",
    "factories",
]
WAYS += ["autocast", "in place", "sums"]


@pytest.mark.parametrize("way", WAYS)
def test_a_request_for_low_precision_is_answered_with_float64(way):
    model, x = Lowering(way), torch.randn(4, 5)
    check = check_gradients(model, lambda: model(x))
    assert check.passed, check.render("en")
    # Rounding to float32 anywhere would leave errors near 1e-7 of the derivative.
    assert max(tensor.error for tensor in check.entries().values()) < 1e-10
    assert max(tensor.step for tensor in check.entries().values()) > 7e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_model_of_any_precision_is_checked_in_float64(dtype):
    model = nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 3)).to(dtype)
    x, y = torch.randn(7, 6, dtype=dtype), torch.randint(0, 3, (7,))
    check = check_gradients(model, lambda: F.cross_entropy(model(x), y))
    assert check.passed
    assert max(tensor.error for tensor in check.entries().values()) < 1e-11
    assert {tensor.dtype for tensor in check.entries().values()} == {str(dtype).removeprefix("torch.")}
    own = [tensor.own_precision for tensor in check.entries().values()]
    if dtype is torch.float64:
        assert own == [None] * 4
    else:
        eps = torch.finfo(dtype).eps
        assert all(0 < distance < 8 * eps for distance in own)


def test_a_gradient_that_its_own_precision_ruins_is_reported_and_not_accused():
    w = torch.tensor([1.0, 1.1, 1.2, 1.3], requires_grad=True)
    offset = torch.tensor(1e5)
    # (w + 1e5) − 1e5 keeps few digits of w in float32; the formula is right.
    check = check_gradients({"w": w}, lambda: (((w * 1.2345 + offset) - offset) ** 3).sum())
    assert check.healthy
    assert check["w"].passed
    finding = next(f for f in check.findings if f.cause == "coarse")
    assert finding.severity == "explained"
    assert finding.values["dtype"] == "float32"
    assert 1e-3 < check["w"].own_precision < 1e-2


def test_an_input_that_needs_a_gradient_stays_the_tensor_it_is():
    x = torch.randn(3, requires_grad=True)
    w = torch.randn(3, requires_grad=True)

    def loss():
        (g,) = torch.autograd.grad((w * x).tanh().sum(), x, create_graph=True)
        return g.square().sum()

    assert check_gradients({"w": w}, loss).passed
    assert x.dtype == torch.float32


class OnlyFloat32(torch.autograd.Function):
    """What a kernel without float64 does."""

    @staticmethod
    def forward(ctx, x, factor):
        if x.dtype != torch.float32:
            raise TypeError("this kernel knows float32 only")
        ctx.save_for_backward(x)
        ctx.factor = factor
        return torch.sin(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return ctx.factor * g * torch.cos(x), None


class Kernel(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return OnlyFloat32.apply(x, self.factor)


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_a_model_that_cannot_run_in_float64_is_checked_layer_by_layer_and_says_so(factor):
    model = nn.Sequential(nn.Linear(5, 6), Kernel(factor), nn.Linear(6, 2))
    x = torch.randn(9, 5)
    check = check_gradients(model, lambda: model(x).square().mean())
    assert "own-precision" in [finding.cause for finding in check.findings]
    assert "this kernel knows float32 only" in " ".join(check.render("en").split())
    assert check.healthy == (factor == 1.0)
    precision = {(layer.path, layer.kind): layer.precision for layer in check.layers}
    assert precision["0", "Linear"] == precision["2", "Linear"] == "float64"
    assert precision["1", "OnlyFloat32"] == "float32"
    assert {tensor.status for tensor in check.entries().values()} == {"unchecked"}
    if factor == 2.0:
        fault = next(finding for finding in check.findings if finding.severity == "fault")
        assert fault.where.source.startswith("def backward")
        assert fault.values["kind"] == "OnlyFloat32"


def test_grouped_products_equal_their_loop():
    offs = torch.tensor([2, 2, 5], dtype=torch.int32)
    a, b = torch.randn(5, 16), torch.randn(3, 16, 8)
    mode = InDouble()
    with mode:
        out = torch._grouped_mm(a, b, offs=offs)
    expected = torch.cat([a[:2].double() @ b[0].double(), a[2:].double() @ b[2].double()])
    assert torch.equal(out, expected)


def test_tensors_are_float64_inside_and_their_own_memory_outside():
    w = nn.Parameter(torch.randn(3))
    address = w.data_ptr()

    def interrupted():
        with in_double([w]) as (_, doubled):
            assert w.dtype == torch.float64
            assert doubled.original(w).data_ptr() == address
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert w.dtype == torch.float32
    assert w.data_ptr() == address


@pytest.mark.parametrize("constant", [0.0, 1e6, 1e12, 1e14])
def test_a_doubled_gradient_does_not_pass_because_the_loss_is_large(constant):
    model, x = nn.Linear(4, 3), torch.randn(5, 4)

    def loss(double):
        h = model(x)
        if double:
            h.register_hook(lambda g: 2 * g)
        return h.square().mean() + constant

    doubled, right = check_gradients(model, lambda: loss(True)), check_gradients(model, lambda: loss(False))
    assert right.healthy
    assert not doubled.passed
    assert right.passed == (constant <= 1e6)
    if constant > 1e6:
        for check in (doubled, right):
            (finding,) = check.findings
            assert (finding.cause, finding.variant) == ("unclear", "rounding")
            assert "constant" in finding.say("remedy")


@pytest.mark.parametrize("size", [1e-11, 1e-30])
def test_tiny_weights_are_not_accused(size):
    w = (size * torch.linspace(1, 2, 3, dtype=torch.float64)).requires_grad_()
    for f in (lambda: (1 / w).sum(), lambda: w.square().sum(), lambda: (w / size).tanh().sum()):
        assert check_gradients({"w": w}, f).healthy
