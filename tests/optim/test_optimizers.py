"""AdamW and SGD as citizens of torch.optim: groups, names, state dicts, closures, None, scaler, DTensor."""

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from clinometer.messages import InputError
from clinometer.optim.adamw import AdamW
from clinometer.optim.sgd import SGD

KINDS = {
    "AdamW": lambda params, **options: AdamW(params, lr=0.1, weight_decay=0.1, **options),
    "AdamW reference": lambda params, **options: AdamW(
        params, lr=0.1, weight_decay=0.1, fused=False, **options
    ),
    "SGD": lambda params, **options: SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1, **options),
    "SGD reference": lambda params, **options: SGD(
        params, lr=0.1, momentum=0.9, weight_decay=0.1, fused=False, **options
    ),
}
EACH = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
Make = Callable[..., torch.optim.Optimizer]


def parameter(*values: float, grad: float | None = 1.0) -> nn.Parameter:
    p = nn.Parameter(torch.tensor(values))
    p.grad = None if grad is None else torch.full_like(p, grad)
    return p


def key_of(error: pytest.ExceptionInfo[InputError]) -> str:
    for language in ("en", "zh"):  # both sentences can be made from the values
        assert error.value.render(language)
    return error.value.key


@EACH
def test_none_grad_means_neither_decay_nor_step_count_nor_state(make: Make) -> None:
    seen, unseen = parameter(1.0, 2.0), parameter(3.0, 4.0, grad=None)
    optimizer = make([seen, unseen])
    optimizer.step()
    assert torch.equal(unseen, torch.tensor([3.0, 4.0]))
    assert unseen not in optimizer.state
    assert not torch.equal(seen, torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("fused", [None, False])
def test_parameters_that_joined_later_have_their_own_bias_correction(fused: bool | None) -> None:
    """On the first step of AdamW m/√v is ±1, so it moves by lr; the other group member is at its third."""
    early, late = parameter(5.0, grad=1.0), parameter(5.0, grad=None)
    optimizer = AdamW([early, late], lr=0.1, weight_decay=0.0, fused=fused)
    optimizer.step()
    optimizer.step()
    late.grad = torch.tensor([1.0])
    early.grad = torch.tensor([0.0])
    optimizer.step()
    assert optimizer.state[early]["step"].item() == 3
    assert optimizer.state[late]["step"].item() == 1
    assert late.item() == pytest.approx(4.9, abs=1e-6)
    m, v = 0.9 * 0.19, 0.999 * (1 - 0.999**2)  # after 1, 1, 0
    expected = 5 - 0.2 - 0.1 * m / (1 - 0.9**3) / math.sqrt(v / (1 - 0.999**3))
    assert early.item() == pytest.approx(expected, abs=2e-6)


@EACH
def test_groups_have_their_own_numbers_and_can_be_added(make: Make) -> None:
    first, second = parameter(1.0), parameter(1.0)
    optimizer = make([{"params": [first], "lr": 0.0}])
    optimizer.add_param_group({"params": [second], "lr": 0.2, "weight_decay": 0.0})
    optimizer.step()
    assert first.item() == 1.0
    assert second.item() == pytest.approx(0.8, abs=1e-6)


@EACH
def test_a_bad_number_in_one_group_is_refused(make: Make) -> None:
    optimizer = make([parameter(1.0)])
    with pytest.raises(InputError) as error:
        optimizer.add_param_group({"params": [parameter(1.0)], "lr": -1.0})
    assert key_of(error) == "optim.nonnegative"
    assert "lr = -1.0" in error.value.render("en")
    assert len(optimizer.param_groups) == 1


@EACH
def test_the_closure_runs_with_gradients_and_its_loss_comes_back(make: Make) -> None:
    p = parameter(3.0, grad=None)
    optimizer = make([p])

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 9.0
    assert p.grad is not None
    assert p.item() < 3.0


@EACH
def test_named_parameters_are_in_the_state_dict(make: Make) -> None:
    optimizer = make([("w", parameter(1.0)), ("b", parameter(2.0))])
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["w", "b"]


@EACH
def test_a_state_dict_carries_on_bit_for_bit(make: Make, tmp_path: Path) -> None:
    def run(optimizer: torch.optim.Optimizer, p: nn.Parameter, steps: range) -> None:
        for step in steps:
            p.grad = torch.sin(step + p.detach())
            optimizer.step()

    whole = nn.Parameter(torch.linspace(-1, 1, 7))
    run(make([whole]), whole, range(10))

    p = nn.Parameter(torch.linspace(-1, 1, 7))
    half = make([p])
    run(half, p, range(5))
    torch.save(half.state_dict(), tmp_path / "state.pt")
    resumed = make([p])
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    run(resumed, p, range(5, 10))
    assert torch.equal(p, whole)

    p_copy, optimizer_copy = copy.deepcopy((p, resumed))
    run(resumed, p, range(10, 12))
    run(optimizer_copy, p_copy, range(10, 12))
    assert torch.equal(p, p_copy)
    assert pickle.loads(pickle.dumps(resumed)).param_groups[0]["lr"] == resumed.param_groups[0]["lr"]


PAIRS: dict[str, tuple[Any, Any]] = {
    "AdamW": (lambda p: AdamW(p, lr=0.1), lambda p: torch.optim.AdamW(p, lr=0.1)),
    "AdamW fused": (lambda p: AdamW(p, lr=0.1), lambda p: torch.optim.AdamW(p, lr=0.1, fused=True)),
    "SGD": (lambda p: SGD(p, lr=0.1, momentum=0.9), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
}


@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_state_dicts_go_to_torch_and_back(pair: tuple[Any, Any], ours_first: bool) -> None:
    make_source, make_target = pair if ours_first else pair[::-1]
    p, q = parameter(1.0, 2.0), parameter(1.0, 2.0)
    source, target = make_source([p]), make_target([q])
    for _ in range(3):
        source.step()
    target.load_state_dict(copy.deepcopy(source.state_dict()))
    for key, value in source.state[p].items():
        loaded = target.state[q][key]
        assert torch.equal(loaded, value)
        assert loaded.dtype == value.dtype
        assert loaded.device.type == "cpu"
    assert target.state[q].keys() == source.state[p].keys()
    before = q.detach().clone()
    target.step()
    assert ((before - q.detach()) > 0.05).all()
    if "step" in target.state[q]:
        assert target.state[q]["step"].item() == 4


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (lambda p: torch.optim.AdamW(p, amsgrad=True), lambda p: AdamW(p)),
        (lambda p: torch.optim.AdamW(p, maximize=True), lambda p: AdamW(p)),
        (lambda p: torch.optim.SGD(p, momentum=0.9, dampening=0.5), lambda p: SGD(p, lr=0.1)),
    ],
    ids=["amsgrad", "maximize", "dampening"],
)
def test_a_state_that_means_another_formula_is_refused(theirs: Any, ours: Any) -> None:
    source = theirs([parameter(1.0)])
    with pytest.raises(InputError) as error:
        ours([parameter(1.0)]).load_state_dict(source.state_dict())
    assert key_of(error) == "optim.variant"


@EACH
def test_sparse_gradients_are_refused_before_anything_moves(make: Make) -> None:
    embedding = nn.Embedding(5, 2, sparse=True)
    other = parameter(1.0)
    embedding(torch.tensor([1, 3])).sum().backward()
    optimizer = make([("other", other), ("embedding.weight", embedding.weight)])
    with pytest.raises(InputError) as error:
        optimizer.step()
    assert key_of(error) == "optim.sparse"
    assert "embedding.weight" in str(error.value)
    assert other.item() == 1.0
    assert not optimizer.state


@EACH
def test_complex_gradients_are_refused(make: Make) -> None:
    p = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    p.grad = torch.ones_like(p)
    with pytest.raises(InputError) as error:
        make([p]).step()
    assert key_of(error) == "optim.complex"
    assert "params[0]" in str(error.value)


@pytest.mark.parametrize(
    ("build", "key"),
    [
        (lambda p: AdamW(p, lr=-1e-3), "optim.nonnegative"),
        (lambda p: AdamW(p, lr=math.nan), "optim.nonnegative"),
        (lambda p: AdamW(p, lr=math.inf), "optim.nonnegative"),
        (lambda p: AdamW(p, lr="1e-3"), "optim.nonnegative"),
        (lambda p: AdamW(p, eps=-1e-8), "optim.nonnegative"),
        (lambda p: AdamW(p, weight_decay=-0.1), "optim.nonnegative"),
        (lambda p: AdamW(p, betas=(1.0, 0.999)), "optim.fraction"),
        (lambda p: AdamW(p, betas=(0.9, -0.1)), "optim.fraction"),
        (lambda p: AdamW(p, betas=(0.9, math.nan)), "optim.fraction"),
        (lambda p: AdamW(p, betas=0.9), "optim.betas"),
        (lambda p: SGD(p, lr=-1.0), "optim.nonnegative"),
        (lambda p: SGD(p, lr=0.1, momentum=1.0), "optim.fraction"),
        (lambda p: SGD(p, lr=0.1, weight_decay=math.nan), "optim.nonnegative"),
        (lambda p: SGD(p, lr=0.1, nesterov=True), "optim.nesterov"),
    ],
)
def test_numbers_out_of_range_are_refused(build: Any, key: str) -> None:
    with pytest.raises(InputError) as error:
        build([parameter(1.0)])
    assert key_of(error) == key


@EACH
def test_schedulers_set_the_rate(make: Make) -> None:
    p = parameter(0.0)
    optimizer = make([p])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: [0.0, 2.0][min(step, 1)])
    optimizer.step()
    assert p.item() == 0.0
    scheduler.step()
    assert scheduler.get_last_lr() == [0.2]
    optimizer.step()
    assert p.item() < -0.15


@pytest.mark.parametrize("kind", [AdamW, SGD])
def test_the_rate_may_be_a_one_element_tensor(kind: Any) -> None:
    p, q = parameter(1.0, 2.0), parameter(1.0, 2.0)
    kind([p], lr=torch.tensor(0.25)).step()
    kind([q], lr=0.25).step()
    assert torch.equal(p, q)
    assert not torch.equal(p, torch.tensor([1.0, 2.0]))


@EACH
def test_grad_scaler_unscales_and_skips_a_step_with_infinite_gradients(make: Make) -> None:
    p, q = parameter(1.0, 2.0, grad=None), parameter(1.0, 2.0)
    optimizer, plain = make([p]), make([q])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    p.grad = torch.tensor([1024.0, math.inf])
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(p, torch.tensor([1.0, 2.0]))
    assert not optimizer.state
    assert scaler.get_scale() == 512.0

    p.grad = torch.full((2,), 512.0)
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    scaler.update()
    plain.step()  # with gradients of 1
    assert torch.equal(p, q)
    assert not torch.equal(p, torch.tensor([1.0, 2.0]))


@EACH
def test_step_hooks_run(make: Make) -> None:
    calls = []
    optimizer = make([parameter(1.0)])
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    optimizer.step()
    assert calls == ["pre", "post"]


@EACH
def test_small_tensors_joined_update_like_each_alone(make: Make) -> None:
    """Transposed, scalar and empty ones among them: each must get its own numbers back."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator) for shape in [(), (3,), (4, 5), (0, 2), (20000,)]]
    tensors.append(torch.randn(5, 4, generator=generator).t())
    together, alone = ([nn.Parameter(tensor.clone()) for tensor in tensors] for _ in range(2))
    optimizer, singles = make(together), [make([p]) for p in alone]
    for _ in range(3):
        for p, q in zip(together, alone, strict=True):
            p.grad = torch.randn(p.shape, generator=generator).as_strided(p.shape, p.stride())
            q.grad = p.grad.clone()
        optimizer.step()
        for single in singles:
            single.step()
    for p, q, start in zip(together, alone, tensors, strict=True):
        assert torch.allclose(p, q, rtol=1e-6, atol=1e-7)
        assert not p.numel() or not torch.allclose(p, start)
        for key, value in optimizer.state[p].items():
            other = singles[[*map(id, alone)].index(id(q))].state[q][key]
            assert torch.allclose(value, other, rtol=1e-6, atol=1e-7)
            assert value.stride() == other.stride()


@EACH
def test_dtensor_parameters_train(make: Make, tmp_path: Path) -> None:
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        start, grad = torch.randn(6, 3), torch.randn(6, 3)
        p = nn.Parameter(distribute_tensor(start.clone(), mesh, [Shard(0)]))
        plain, q = parameter(1.0), nn.Parameter(start.clone())
        optimizer, expected = make([p, plain]), make([q])
        for _ in range(2):
            p.grad, q.grad = distribute_tensor(grad.clone(), mesh, [Shard(0)]), grad.clone()
            optimizer.step()
            expected.step()
        assert isinstance(p, DTensor)
        assert torch.allclose(p.full_tensor(), q, atol=1e-6)
        assert plain.item() < 1.0
    finally:
        distributed.destroy_process_group()
