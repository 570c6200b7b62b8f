"""Tensors of every kind are kept and put back: whatever layout, type or memory they have."""

import warnings
import weakref

import numpy
import pytest
import torch
from tests.gradients.traces import bits
from torch import nn

from clinometer.gradients.sandbox.sandbox import untouched
from clinometer.gradients.sandbox.subject import Subject


def test_memory_that_may_not_be_written_is_not(tmp_path):
    numpy.ones(4, dtype=numpy.float32).tofile(tmp_path / "weights")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read_only = torch.from_numpy(numpy.memmap(tmp_path / "weights", dtype=numpy.float32, mode="r"))
    with untouched(Subject.of({"w": read_only})):
        pass  # a write would end the process
    assert read_only.sum().item() == 4


def test_the_copies_are_let_go_at_the_end():
    tensor = torch.ones(1000)
    with untouched(Subject.of({"w": tensor})) as before:
        (kept,) = before._bits.values()
        copy = weakref.ref(kept.copy)
        del kept
        assert copy() is not None
    assert copy() is None


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


def test_containers_of_the_same_size_with_other_things_in_them_are_put_back():
    module, x, y = nn.Linear(1, 1), object(), object()
    module.listed, module.mapped, module.chosen = [x, 1], {"a": x, "b": y}, {"only"}
    with untouched(Subject.of(module)):
        module.listed[0] = y
        module.mapped["c"] = module.mapped.pop("b")  # the same value under another key
        module.mapped["a"] = y
        module.chosen.clear()
        module.chosen.add("other")
    assert module.listed[0] is x
    assert module.mapped == {"a": x, "b": y}
    assert module.chosen == {"only"}


def test_containers_that_were_empty_are_emptied_again():
    module = nn.Linear(1, 1)
    module.log, module.cache = [], {}
    with untouched(Subject.of(module)):
        module.log.append(3)
        module.cache["k"] = torch.ones(2)
    assert module.log == []
    assert module.cache == {}
