import functools
import random
import warnings

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from clinometer.gradients.closure import evaluate
from clinometer.gradients.subject import Subject
from clinometer.gradients.untouched import modules_named_by, untouched
from tests.gradients.traces import bits, hooks_of, trace_of


class Model(nn.Module):
    """One of everything: running statistics, a tied pair, a reassigned buffer, attributes that change."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 4))
        self.head = nn.Linear(4, 4, bias=False)
        self.head.weight = self.inner[3].weight
        self.unused = nn.Parameter(torch.tensor([float("nan"), -0.0, float("inf")]))
        self.register_buffer("average", torch.zeros(4))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.ema = torch.zeros(4)
        self.calls, self.history = 0, []
        self.hidden = [nn.Linear(4, 4)]

    def forward(self, x):
        y = self.head(self.hidden[0](self.inner(x)))
        self.average = 0.9 * self.average + y.detach().mean(0)
        self.steps += 1
        self.ema.mul_(0.9).add_(y.detach().mean(0))
        self.calls += 1
        self.history.append(self.calls)
        return y


def trained(steps=2):
    """A model in the middle of its training, with gradients and an optimizer's state."""
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
    return model, optimizer


def everything(model, optimizer=None):
    return {
        **trace_of(model, optimizer),
        "ema": bits(model.ema),
        "history": list(model.history),
        "hidden": trace_of(model.hidden[0]),
    }


def difference(before, after):
    return [key for key in before if before[key] != after[key]]


def weight(model):
    return model.inner[0].weight


@torch.no_grad()
def scale(model, optimizer):
    weight(model).mul_(3)


def scale_data(model, optimizer):
    weight(model).data.clamp_(-0.01, 0.01)


def other_memory(model, optimizer):
    weight(model).data = torch.randn(4, 4)


def half(model, optimizer):
    model.half()


def other_shape(model, optimizer):
    weight(model).data = torch.randn(7)


def other_parameter(model, optimizer):
    model.inner[0].weight = nn.Parameter(torch.zeros(4, 4))


def negative_zero(model, optimizer):
    model.unused.data[1] = 0.0


def freeze(model, optimizer):
    model.requires_grad_(False)


def backward(model, optimizer):
    model(torch.randn(8, 4)).sum().backward()


def zero_grads(model, optimizer):
    optimizer.zero_grad(set_to_none=False)
    weight(model).grad = torch.ones(4, 4)


def step(model, optimizer):
    backward(model, optimizer)
    optimizer.step()


def other_groups(model, optimizer):
    optimizer.param_groups[0]["lr"] = 7.0
    optimizer.add_param_group({"params": [torch.ones(1, requires_grad=True)]})


def forget_state(model, optimizer):
    optimizer.state.clear()


def to_eval(model, optimizer):
    model.inner.eval()


def add_hook(model, optimizer):
    model.inner[1].register_forward_hook(lambda *_: None)


def attributes(model, optimizer):
    model.new, model.calls = 1, "many"
    del model.ema


def draw(model, optimizer):
    torch.rand(3), random.random(), numpy.random.rand()


def switches(model, optimizer):
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    torch.set_autocast_enabled("cpu", True)
    torch.set_autocast_dtype("cpu", torch.float16)
    torch.set_anomaly_enabled(True)


def buffer_with_graph(model, optimizer):
    model.average.mul_(weight(model).sum())


MUTATIONS = [
    *(scale, scale_data, other_memory, half, other_shape, other_parameter, negative_zero, freeze, backward),
    *(zero_grads, step, other_groups, forget_state, to_eval, add_hook, attributes, draw, switches),
    buffer_with_graph,
]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda f: f.__name__)
def test_each_mutation_is_seen_by_the_trace_and_undone(mutation):
    model, optimizer = trained()
    before = everything(model, optimizer)
    changed = None
    with untouched(Subject.of(model), optimizer=optimizer):
        inside = everything(model, optimizer)
        mutation(model, optimizer)
        if mutation is not attributes:
            changed = difference(inside, everything(model, optimizer))
    assert difference(before, everything(model, optimizer)) == []
    assert changed is None or changed, "the mutation changed nothing, so the test proves nothing"


@given(
    mutations=st.lists(st.sampled_from(MUTATIONS), max_size=8),
    error=st.sampled_from([None, RuntimeError, KeyboardInterrupt, SystemExit]),
    without_grads=st.booleans(),
)
def test_any_sequence_of_mutations_and_any_exception_leaves_no_bit_changed(mutations, error, without_grads):
    model, optimizer = trained(1)
    if without_grads:
        optimizer.zero_grad()
    weight(model).grad = None
    before = everything(model, optimizer)
    came = None
    try:
        with untouched(Subject.of(model), optimizer=optimizer):
            for mutation in mutations:
                try:
                    mutation(model, optimizer)
                except (RuntimeError, AttributeError, KeyError):  # two mutations may exclude each other
                    continue
            if error is not None:
                raise error
    except BaseException as caught:
        came = type(caught)
    assert came is error
    assert difference(before, everything(model, optimizer)) == []


def test_gradients_are_none_inside_and_the_same_objects_afterwards():
    model, _ = trained()
    held = {name: (p.grad, p.grad.clone()) for name, p in model.named_parameters() if p.grad is not None}
    assert len(held) >= 4
    with untouched(Subject.of(model)):
        assert all(p.grad is None for p in model.parameters())
        model(torch.randn(8, 4)).square().sum().backward()
        assert weight(model).grad is not None
    for name, (grad, values) in held.items():
        assert model.get_parameter(name).grad is grad
        assert torch.equal(grad, values)


def test_a_gradient_that_the_closure_holds_and_zeroes_has_its_values_again():
    model, _ = trained()
    grad = weight(model).grad
    values = bits(grad)
    with untouched(Subject.of(model)):
        grad.zero_()
    assert bits(grad) == values


def test_a_graph_the_user_holds_can_still_be_walked_backward_afterwards():
    model, _ = trained()
    loss = model(torch.randn(8, 4)).square().mean()
    with untouched(Subject.of(model)):
        scale(model, None)
        model(torch.randn(8, 4)).square().mean().backward()
    loss.backward()  # a moved version counter would raise here
    assert torch.isfinite(weight(model).grad).all()


def test_what_nobody_wrote_to_keeps_its_version():
    model, _ = trained()
    versions = [p._version for p in model.parameters()]
    with untouched(Subject.of(model)):
        pass
    assert [p._version for p in model.parameters()] == versions


def test_interruption_while_putting_back_still_puts_everything_back(monkeypatch):
    model, optimizer = trained()
    before = everything(model, optimizer)
    from clinometer.gradients import keeping

    original, calls = keeping.KeptBits.restore, []

    def interrupted_once(self):
        calls.append(self)
        if len(calls) == 3:
            raise KeyboardInterrupt
        original(self)

    monkeypatch.setattr(keeping.KeptBits, "restore", interrupted_once)
    with pytest.raises(KeyboardInterrupt), untouched(Subject.of(model), optimizer=optimizer):
        step(model, optimizer)
    assert len(calls) > 3
    assert difference(before, everything(model, optimizer)) == []


def test_casts_in_the_autocast_cache_do_not_leak_into_the_next_forward():
    model = nn.Linear(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        with untouched(Subject.of(model)):
            model(torch.ones(2, 4)).sum().backward()
        model(torch.ones(2, 4)).sum().backward()  # a cached cast of the freed graph would raise here
    assert model.weight.grad is not None


def test_modules_that_only_the_closure_names_are_put_back():
    model, _ = trained()
    x = torch.randn(8, 4)
    bound = nn.Linear(4, 4)

    def inner():
        return model(bound(x)).mean()

    def closure():
        return inner()

    before = everything(model), trace_of(bound)
    with untouched(Subject.of({"w": weight(model)}), closure=closure):
        evaluate(closure).backward()
        assert model.calls == 3
    assert difference(before[0], everything(model)) == []
    assert trace_of(bound) == before[1]


MODULE = nn.Linear(2, 2)


def uses_a_global():
    return [MODULE(torch.ones(2)) for _ in range(1)]


class Trainer:
    def __init__(self, model):
        self.model = model

    def loss(self):
        return self.model(torch.ones(2)).sum()

    __call__ = loss


def test_modules_are_found_however_the_closure_names_them():
    def default(model=MODULE):
        return model

    enclosed = MODULE
    for closure in (
        uses_a_global,
        default,
        lambda: enclosed,
        lambda: [enclosed for _ in range(2)],
        functools.partial(uses_a_global),
        functools.partial(torch.sum, MODULE),
        Trainer(MODULE).loss,
        Trainer(MODULE),
        MODULE.forward,
        MODULE,
    ):
        assert modules_named_by(closure) == [MODULE]
    assert modules_named_by(None) == modules_named_by(torch.sum) == []


def test_rewind_gives_the_closure_the_same_state_but_leaves_the_values():
    model, _ = trained()
    x = torch.randn(8, 4)
    with untouched(Subject.of(model)) as before:
        first = evaluate(lambda: model(x).mean()).item()
        average = bits(model.average)
        before.rewind()
        assert model.steps.item() == 2
        assert evaluate(lambda: model(x).mean()).item() == first
        assert bits(model.average) == average
        with torch.no_grad():
            weight(model).add_(1)
        before.rewind()
        assert evaluate(lambda: model(x).mean()).item() != first
    leaf = torch.ones(3, requires_grad=True)
    with untouched(Subject.of({"w": leaf})) as before:
        leaf.data.add_(1)
        before.rewind()
        assert leaf.tolist() == [2.0, 2.0, 2.0]
    assert leaf.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("mutate", [True, False])
def test_unusual_tensors_neither_crash_nor_change(mutate):
    base = torch.arange(12.0)
    with torch.inference_mode():
        inference = torch.ones(3)
    w = torch.ones(2, requires_grad=True)
    sparse = nn.Embedding(5, 2, sparse=True)
    sparse(torch.tensor([1, 1, 3])).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.quantize_per_tensor(torch.randn(4), 0.1, 0, torch.qint8)
    odd = {
        "view": base[1:7:2],
        "transposed": base.view(3, 4).t(),
        "expanded": torch.ones(1).expand(5),
        "empty": torch.ones(0, 3),
        "inference": inference,
        "complex": torch.randn(3, dtype=torch.complex64).conj(),
        "bool": torch.tensor([True, False]),
        "fp8": torch.randn(4).to(torch.float8_e4m3fn),
        "byte": torch.arange(7, dtype=torch.uint8)[3:],
        "nonleaf": w * 2,
        "quantised": quantised,
    }
    other = {"meta": torch.ones(3, device="meta"), "sparse": sparse.weight}
    held = {name: t.clone() if t.is_quantized else bits(t) for name, t in odd.items()}
    grad, grad_bits = sparse.weight.grad, bits(sparse.weight.grad)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # reading .grad of a non-leaf would warn
        with untouched(Subject.of({**odd, **other})):
            assert sparse.weight.grad is None
            if mutate:
                base.zero_()
                grad._values().zero_()
                for name in ("fp8", "byte", "bool", "complex"):
                    odd[name].data.copy_(torch.zeros_like(odd[name]))
                with torch.inference_mode():
                    inference.zero_()
                sparse(torch.tensor([0])).sum().backward()
    for name, tensor in odd.items():
        same = torch.equal(tensor, held[name]) if tensor.is_quantized else bits(tensor) == held[name]
        assert same, name
    assert sparse.weight.grad is grad
    assert bits(grad) == grad_bits


def test_a_distributed_tensor_is_put_back(tmp_path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        tensor = nn.Parameter(distribute_tensor(torch.arange(6.0), mesh, [Shard(0)]))
        tensor.sum().backward()
        grad = tensor.grad
        with untouched(Subject.of({"w": tensor})):
            assert tensor.grad is None
            tensor.data.mul_(2)
            (tensor * 3).sum().backward()
        assert tensor.to_local().tolist() == [0, 1, 2, 3, 4, 5]
        assert tensor.grad is grad
        assert grad.to_local().tolist() == [1] * 6
    finally:
        dist.destroy_process_group()


def test_a_scripted_module_is_put_back():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    held = [bits(t) for t in (*scripted.parameters(), *scripted.buffers())]
    with untouched(Subject.of(scripted)):
        scripted(torch.randn(4, 3)).sum().backward()
        scripted.eval()
        next(scripted.parameters()).data.zero_()
    assert [bits(t) for t in (*scripted.parameters(), *scripted.buffers())] == held
    assert all(p.grad is None for p in scripted.parameters())
    assert all(m.training for m in scripted.modules())


def test_a_stretch_of_a_big_storage_costs_only_its_own_size():
    big = torch.zeros(1_000_000)
    with untouched(Subject.of({"w": big[10:20]})) as before:
        big[10:20] = 1
        big[0] = 1
        copies = sum(kept.copy.numel() * kept.copy.element_size() for kept in before._bits.values())
        assert copies == 10 * 4
    assert (big[0].item(), big[10:20].sum().item()) == (1, 0)


def test_tied_and_shared_memory_is_copied_once():
    model = Model()
    with untouched(Subject.of(model)) as before:
        starts = [kept.key for kept in before._bits.values()]
    assert len(starts) == len(set(starts))


def test_hooks_of_counts_what_a_module_has():
    model = nn.Sequential(nn.Linear(2, 2))
    assert hooks_of(model) == {}
    model[0].register_forward_hook(lambda *_: None)
    assert hooks_of(model) == {("0", "_forward_hooks"): 1}
