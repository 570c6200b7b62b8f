"""Parameters that are no ordinary tensors: every call gives what is true of them, or a clear error."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from tests.gradients.traces import bits, hooks_of
from torch import nn

from clinometer.gradients.attribute.attribute import attribute
from clinometer.gradients.check.accumulation import check_accumulation
from clinometer.gradients.check.check_gradients import check_gradients
from clinometer.gradients.diagnose.diagnose import diagnose
from clinometer.gradients.step.explain_step import explain_step
from clinometer.messages import InputError
from clinometer.optim.clipping import gradient_norms

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


def dictionary(**tensors):
    return nn.ParameterDict({name: nn.Parameter(tensor) for name, tensor in tensors.items()})


def nested():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.LayerNorm(5), nn.Linear(5, 1))
    x = torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(2, 4)], layout=torch.jagged)
    return model, lambda: model(x).values().square().mean(), "0.weight", (1, 2)


def nested_attention():
    model = nn.ModuleDict({"q": nn.Linear(4, 4), "k": nn.Linear(4, 4), "out": nn.Linear(4, 2)})
    x = torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(2, 4)], layout=torch.jagged)

    def loss():
        q, k, v = (t.unflatten(-1, (2, 2)).transpose(1, 2) for t in (model["q"](x), model["k"](x), x))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
        return model["out"](mixed).values().square().mean()

    return model, loss, "out.weight", (1, 2)


def sparse():
    model = nn.ModuleDict({"embed": nn.Embedding(6, 4, sparse=True), "head": nn.Linear(4, 1)})
    ids = torch.tensor([[1, 2, 2], [4, 1, 0]])
    return model, lambda: model["head"](model["embed"](ids)).square().mean(), "embed.weight", (2, 1)


class Sub(torch.Tensor):
    """A subclass as users write them: a name, and no more."""


def subclass():
    model = nn.Linear(4, 2)
    model.weight = nn.Parameter(torch.randn(2, 4).as_subclass(Sub))
    return model, lambda: model(X).square().mean(), "weight", (1, 2)


class Quantised(nn.Module):
    """int8 weights with trained scales, a quantised buffer and an adapter: QLoRA's shape."""

    def __init__(self):
        super().__init__()
        w = torch.randn(5, 4)
        self.scale = nn.Parameter(w.abs().amax(1, keepdim=True) / 127)
        self.register_buffer("whole", (w / self.scale.detach()).round().to(torch.int8))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.register_buffer("old", torch.quantize_per_tensor(w, 0.1, 0, torch.qint8))
        self.down, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, 5, bias=False)

    def forward(self, x):
        held = F.linear(x, self.whole.to(x.dtype) * self.scale) + F.linear(x, self.old.dequantize())
        return held + self.up(self.down(x))


def quantised():
    model = Quantised()
    return model, lambda: model(X).square().mean(), "scale", (2, 0)


def zero_size():
    model = dictionary(w=torch.randn(4, 3), empty=torch.randn(4, 0))
    return model, lambda: torch.cat([X @ model["w"], X @ model["empty"]], 1).square().mean(), "w", (1, 2)


def zero_dimensions():
    model = dictionary(w=torch.randn(4, 3), t=torch.tensor(0.5))
    return model, lambda: ((X @ model["w"]) * model["t"].exp() + model["t"]).square().mean(), "t", None


def complex_weights():
    model = dictionary(w=torch.randn(4, 3, dtype=torch.complex64))
    return model, lambda: (X.cfloat() @ model["w"]).abs().square().mean(), "w", (1, 2)


def real_weight_in_complex_numbers():
    model = dictionary(w=torch.randn(4), v=torch.randn(3))
    x = torch.randn(3, 4, dtype=torch.complex64)
    return model, lambda: (x * model["w"]).abs().square().mean() + model["v"].square().sum(), "v", (1,)


class Scaled(torch.Tensor):
    """int8 numbers and a scale that behave as a float tensor: what quantisers make of a weight."""

    @staticmethod
    def __new__(cls, whole, scale):
        return torch.Tensor._make_wrapper_subclass(cls, whole.shape, dtype=scale.dtype, device=scale.device)

    def __init__(self, whole, scale):
        self.whole, self.scale = whole, scale

    def __tensor_flatten__(self):
        return ["whole", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner, _, size, stride):
        return Scaled(inner["whole"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func, kinds, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return Scaled(args[0].whole, args[0].scale)
        plain = [a.whole.to(a.scale.dtype) * a.scale if isinstance(a, Scaled) else a for a in args]
        return func(*plain, **(kwargs or {}))

    __torch_function__ = torch._C._disabled_torch_function_impl


def wrapper_subclass():
    model = nn.Linear(4, 2)
    whole = torch.randint(-127, 127, (2, 4), dtype=torch.int8)
    model.weight = nn.Parameter(Scaled(whole, torch.full((2, 1), 0.01)))
    return model, lambda: model(X).square().mean(), "weight", (1, 2)


CASES = [
    nested, nested_attention, sparse, subclass, quantised, zero_size, zero_dimensions, complex_weights,
    real_weight_in_complex_numbers,
]  # fmt: skip


@pytest.fixture(params=CASES, ids=lambda f: f.__name__)
def case(request):
    return request.param()


def test_a_healthy_model_is_not_accused(case):
    model, loss, *_ = case
    found = diagnose(model, loss)
    assert found.healthy, found.render()
    for name in found:  # a key's bias cancels in the softmax
        assert found[name].status in ("zero" if name == "k.bias" else "ok", "partly-zero"), name
    loss().backward()
    assert diagnose(model).healthy


@pytest.mark.parametrize("make", [nested, sparse, subclass, quantised])
def test_a_cut_is_found(make):
    model, loss, *_ = make()
    last = list(model.parameters())[-1]
    found = diagnose(model, lambda: loss().detach() + last.square().sum())
    (finding,) = [f for f in found.findings if f.severity == "fault"]
    assert (finding.cause, finding.variant, finding.where.op) == ("cut", "detach", "detach")


def test_the_check_passes_what_it_can_check_and_accuses_nobody(case):
    model, loss, *_ = case
    found = check_gradients(model, loss)
    assert found.healthy, found.render()
    assert found.passed, found.render()


def test_the_parts_of_a_batch_add_up(case):
    model, loss, *_ = case
    assert check_accumulation(model, loss, [lambda: loss() / 4, lambda: 3 * loss() / 4]).passed


def test_a_step_is_replayed(case):
    model, loss, name, _ = case
    rule = torch.optim.SGD if isinstance(model, nn.ModuleDict) else torch.optim.AdamW
    optimizer = rule(model.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        loss().backward()
        with explain_step(optimizer, model, loss=loss) as anatomy:
            optimizer.step()
    assert anatomy.faithful is True
    assert math.isclose(anatomy.predicted, anatomy.loss_change, rel_tol=0.2, abs_tol=1e-3)
    assert anatomy[name].render("en")
    assert anatomy.render("zh")


def test_one_weight_is_split_or_refused(case):
    model, loss, name, index = case
    if dict(model.named_parameters())[name].is_complex():
        with pytest.raises(InputError, match="complex64"):
            attribute(model, loss, name, index)
        return
    found = attribute(model, loss, name, index)
    assert found.complete, found.render()
    assert found.gradient != 0


def test_a_real_weight_that_meets_complex_numbers_is_an_honest_remainder():
    model, loss, *_ = real_weight_in_complex_numbers()
    found = attribute(model, loss, "w", (1,))
    assert found.total == 0
    assert [op for op, _ in found.unseen] == ["mul"]


def test_everything_is_afterwards_what_it_was(case):
    model, loss, name, index = case
    tensors = [*model.parameters(), *(b for b in model.buffers() if not b.is_quantized)]
    held = [bits(t) for t in tensors]
    loss().backward()
    grads = [p.grad for p in model.parameters()]
    diagnose(model, loss)
    check_gradients(model, loss)
    if not tensors[0].is_complex():
        attribute(model, loss, name, index)
    assert [bits(t) for t in tensors] == held
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    assert hooks_of(model) == {}


@pytest.mark.parametrize("make", [sparse, complex_weights])
def test_norms_of_gradients_that_clipping_does_not_take_are_refused(make):
    model, loss, *_ = make()
    loss().backward()
    with pytest.raises(InputError):
        gradient_norms(model.parameters())


def test_a_wrapper_subclass_is_diagnosed_and_left_unchecked():
    model, loss, name, index = wrapper_subclass()
    held = bits(model.weight.whole), bits(model.weight.scale)
    diagnosed = diagnose(model, loss)
    assert diagnosed.healthy
    assert diagnosed["weight"].status == "ok"
    found = check_gradients(model, loss)
    assert found.healthy
    assert found["weight"].status == "unchecked"
    assert found["bias"].status == "passed"
    assert attribute(model, loss, name, index).complete
    assert (bits(model.weight.whole), bits(model.weight.scale)) == held


def meta():
    model = nn.Linear(4, 2, device="meta")
    return model, lambda: model(torch.empty(3, 4, device="meta")).sum()


@pytest.mark.parametrize(
    "ask",
    [
        diagnose,
        check_gradients,
        lambda model, loss: attribute(model, loss, "weight", (0, 1)),
        lambda model, loss: attribute(model, loss, "weight"),
        lambda model, loss: check_accumulation(model, loss, [loss]),
    ],
)
def test_a_model_without_values_is_refused(ask):
    with pytest.raises(InputError, match="meta device") as error:
        ask(*meta())
    assert error.value.key == "gradients.closure.meta"


def test_gradients_without_values_are_refused():
    model, loss = meta()
    loss().backward()
    with pytest.raises(InputError, match="meta device"):
        diagnose(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InputError, match="meta device"), explain_step(optimizer, model):
        optimizer.step()


class Offloaded(nn.Module):
    """A frozen layer whose weights are on the meta device, and in memory while it runs, by hooks."""

    def __init__(self):
        super().__init__()
        self.far = nn.Linear(4, 4, device="meta")
        self.near = nn.Linear(4, 2)
        self.weights = {"weight": torch.randn(4, 4), "bias": torch.randn(4)}
        self.kept = dict(self.far._parameters)
        self.far.register_forward_pre_hook(self.fetch)
        self.far.register_forward_hook(self.send_away)

    def fetch(self, module, args):
        for name, value in self.weights.items():
            module._parameters[name] = nn.Parameter(value, requires_grad=False)

    def send_away(self, module, args, out):
        module._parameters.update(self.kept)

    def forward(self, x):
        return self.near(torch.tanh(self.far(x)))


def test_an_offloaded_layer_is_explained_and_the_rest_is_looked_at():
    model = Offloaded()
    loss = lambda: model(X).square().mean()  # noqa: E731
    parameters = dict(model.far._parameters)
    found = diagnose(model, loss)
    assert found.healthy
    entry = found["far.weight"]
    assert (entry.status, entry.cause, entry.severity) == ("none", "unused", "explained")
    assert "meta device" in entry.message
    assert found["near.weight"].status == "ok"
    assert check_gradients(model, loss).healthy
    assert attribute(model, loss, "near.weight", (1, 2)).complete
    loss().backward()
    assert diagnose(model).healthy
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with explain_step(optimizer, model, loss=loss) as anatomy:
        optimizer.step()
    assert anatomy["near.weight"].faithful
    assert anatomy["far.weight"].status == "no-gradient"
    assert all(model.far._parameters[name] is p for name, p in parameters.items())
    assert len(model.far._forward_pre_hooks) == 1


@pytest.mark.gpu
def test_a_model_over_two_devices_is_checked_split_and_stepped():
    """Half of it on the CPU and half on the GPU, as accelerate does it by hooks."""
    near, far = nn.Linear(4, 5), nn.Linear(5, 2).cuda()
    far.register_forward_pre_hook(lambda module, args: tuple(a.cuda() for a in args))
    model = nn.Sequential(nn.Embedding(7, 4), near, nn.GELU(), nn.Dropout(0.2), far)
    ids = torch.arange(6).view(2, 3)
    loss = lambda: model(ids).square().mean()  # noqa: E731
    assert diagnose(model, loss).healthy
    assert check_gradients(model, loss, entries={"4.weight": [(1, 2)], "1.weight": [(1, 2)]}).passed
    for name in ("0.weight", "1.weight", "4.weight", "4.bias"):
        torch.manual_seed(0)
        assert attribute(model, loss, name).complete
    loss().backward()
    assert float(gradient_norms(model.parameters()).total) > 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with explain_step(optimizer, model, loss=loss) as anatomy:
        optimizer.step()
    assert anatomy.faithful is True


@pytest.mark.gpu
def test_dropout_on_the_gpu_is_drawn_again():
    model = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 1)).cuda()
    x = X.cuda()
    state = torch.cuda.get_rng_state()
    assert check_gradients(model, lambda: model(x).square().mean()).passed
    assert torch.equal(state, torch.cuda.get_rng_state())
    soft = nn.Linear(4, 6).cuda()
    hard = lambda: (F.gumbel_softmax(soft(x), hard=True) * torch.arange(6.0, device="cuda")).sum()  # noqa: E731
    assert check_gradients(soft, hard).healthy
