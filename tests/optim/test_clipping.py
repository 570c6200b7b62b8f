"""Gradient norms and clipping: against float64 and torch, at the ends of the number range, at the edges."""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from clinometer.messages import InputError
from clinometer.optim import clipping
from clinometer.optim.clipping import clip_grad_norm_, gradient_norms
from tests.forked_ranks import run_ranks


def with_gradients(grads: Sequence[Tensor | None]) -> list[nn.Parameter]:
    parameters = []
    for grad in grads:
        p = nn.Parameter(torch.zeros(()) if grad is None else torch.zeros_like(grad))
        p.grad = grad
        parameters.append(p)
    return parameters


def exact_norm(grads: Sequence[Tensor]) -> float:
    return math.sqrt(math.fsum((grad.double() ** 2).sum().item() for grad in grads))


def some_gradients(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(300, 80), (7,), (), (90, 3), (70001,), (0, 4), (5, 64, 2)]
    grads = [torch.randn(shape, generator=generator) for shape in shapes]
    return [*grads, torch.randn(64, 300, generator=generator).t()]


def test_norms_agree_with_float64_one_by_one_and_together() -> None:
    grads = some_gradients()
    norms = gradient_norms(with_gradients(grads))
    assert norms.per_tensor.tolist() == pytest.approx([exact_norm([grad]) for grad in grads], rel=1e-6)
    assert norms.total.item() == pytest.approx(exact_norm(grads), rel=1e-6)
    assert norms.total.shape == ()


def test_measuring_leaves_the_gradients_alone() -> None:
    parameters = with_gradients(some_gradients())
    gradient_norms(parameters)
    total = clip_grad_norm_(parameters, math.inf)
    assert total > 100
    for p, grad in zip(parameters, some_gradients(), strict=True):
        assert torch.equal(p.grad, grad)


@pytest.mark.parametrize("max_norm", [0.5, 1.0, 100.0, 1e6])
def test_clipping_is_torchs(max_norm: float) -> None:
    ours, theirs = with_gradients(some_gradients()), with_gradients(some_gradients())
    total = clip_grad_norm_(ours, max_norm)
    assert total.item() == pytest.approx(nn.utils.clip_grad_norm_(theirs, max_norm).item(), rel=1e-5)
    for p, q in zip(ours, theirs, strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-5, atol=0)
    assert exact_norm([p.grad for p in ours]) == pytest.approx(min(total.item(), max_norm), rel=2e-6)


def test_the_millionth_in_the_denominator_is_torchs() -> None:
    parameters = with_gradients([torch.tensor([1e-6], dtype=torch.float64)])
    clip_grad_norm_(parameters, 1e-6)
    assert parameters[0].grad.item() == pytest.approx(0.5e-6, rel=1e-9)


def test_a_norm_below_the_limit_changes_no_bit() -> None:
    parameters = with_gradients(some_gradients())
    clip_grad_norm_(parameters, 1e4)
    assert all(torch.equal(p.grad, g) for p, g in zip(parameters, some_gradients(), strict=True))


def test_the_norm_of_a_large_tensor_is_right_where_torchs_is_not() -> None:
    """2²² equal entries; torch adds their squares up in float32, where small terms get lost."""
    grad = torch.full((1 << 22,), 0.1)
    exact = grad[0].double().item() * 2**11
    ours = gradient_norms(with_gradients([grad])).total.item()
    rows = gradient_norms(with_gradients([grad.view(1024, 4096)])).total.item()
    assert abs(ours / exact - 1) < 1e-6
    assert abs(rows / exact - 1) < 1e-5
    assert abs(torch.linalg.vector_norm(grad).item() / exact - 1) > 1e-3


@pytest.mark.parametrize("shape", [(1000,), (50, 100), (70000,)])
@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        (1e30, torch.float32),
        (1e-30, torch.float32),
        (1e-42, torch.float32),
        (1e200, torch.float64),
        (1e-200, torch.float64),
        (6e4, torch.float16),
        (1e-7, torch.float16),
        (1e30, torch.bfloat16),
        (1e-30, torch.bfloat16),
    ],
)
def test_norms_neither_overflow_nor_underflow(size: float, dtype: torch.dtype, shape: tuple[int]) -> None:
    grad = torch.full(shape, size, dtype=dtype)
    exact = grad.flatten()[0].double().item() * math.sqrt(grad.numel())
    norms = gradient_norms(with_gradients([grad, grad.clone()]))
    assert norms.per_tensor.tolist() == pytest.approx([exact, exact], rel=1e-5)
    assert norms.total.item() == pytest.approx(exact * math.sqrt(2), rel=1e-5)


def test_huge_gradients_are_clipped_to_the_limit() -> None:
    parameters = with_gradients([torch.full((100,), 1e30), torch.full((10, 100), -1e30)])
    clip_grad_norm_(parameters, 1.0)
    assert exact_norm([p.grad for p in parameters]) == pytest.approx(1.0, rel=1e-5)


def test_dtypes_mix_and_each_gradient_keeps_its_own() -> None:
    dtypes = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
    grads = [torch.linspace(-3, 3, 200).to(dtype) for dtype in dtypes]
    parameters = with_gradients([grad.clone() for grad in grads])
    total = clip_grad_norm_(parameters, 0.01)
    assert total.item() == pytest.approx(exact_norm(grads), rel=1e-6)
    for p, grad in zip(parameters, grads, strict=True):
        assert p.grad.dtype == grad.dtype
        expected = grad.double() * (0.01 / (total.item() + 1e-6))
        tolerance = torch.finfo(grad.dtype).eps
        assert ((p.grad.double() - expected).abs() <= tolerance * expected.abs() + 1e-7).all()


def test_float16_survives_a_factor_that_float16_cannot_hold() -> None:
    parameters = with_gradients([torch.full((4,), 6e4).half(), torch.full((4,), 1e13)])
    clip_grad_norm_(parameters, 1e4)  # the factor, 5e-10, is zero in float16
    assert parameters[0].grad.tolist() == pytest.approx([6e4 * 1e4 / 2e13] * 4, rel=2e-3)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [(3,), (2, 100), (70000,)])
def test_a_norm_that_is_not_finite_is_returned_and_spreads_nowhere(
    poison: float, shape: tuple[int, ...]
) -> None:
    bad = torch.ones(shape)
    bad.view(-1)[1] = poison
    good = torch.full((3,), 1e5)
    parameters = with_gradients([good.clone(), bad.clone()])
    total = clip_grad_norm_(parameters, 1.0)
    assert not total.isfinite()
    assert total.isnan().item() == math.isnan(poison)
    assert torch.equal(parameters[0].grad, good)
    assert torch.equal(parameters[1].grad, bad) or math.isnan(poison)
    assert gradient_norms(parameters).per_tensor[0].item() == pytest.approx(exact_norm([good]))


def test_frozen_and_unused_parameters_are_left_out() -> None:
    parameters = with_gradients([torch.tensor([3.0]), None, torch.tensor([4.0])])
    parameters.append(nn.Parameter(torch.ones(5), requires_grad=False))
    assert gradient_norms(parameters).per_tensor.tolist() == [3.0, 4.0]
    assert clip_grad_norm_(parameters, 1.0).item() == 5.0
    assert parameters[0].grad.item() == pytest.approx(0.6, rel=1e-6)
    assert parameters[1].grad is None


def test_nothing_to_clip_is_a_norm_of_zero() -> None:
    for empty in ([], iter(()), with_gradients([None])):
        assert clip_grad_norm_(empty, 1.0).item() == 0.0
    assert gradient_norms([]).per_tensor.shape == (0,)
    assert gradient_norms(with_gradients([torch.zeros(0)])).total.item() == 0.0
    zeros = with_gradients([torch.zeros(3)])
    assert clip_grad_norm_(zeros, 1.0).item() == 0.0
    assert torch.equal(zeros[0].grad, torch.zeros(3))


def test_a_tensor_and_a_generator_are_taken_too() -> None:
    single = with_gradients([torch.tensor([3.0, 4.0])])[0]
    assert clip_grad_norm_(single, 1.0).item() == 5.0
    assert single.grad.tolist() == pytest.approx([0.6, 0.8], rel=1e-6)
    parameters = with_gradients([torch.tensor([3.0]), torch.tensor([4.0])])
    assert clip_grad_norm_((p for p in parameters), 1.0).item() == 5.0
    assert parameters[1].grad.item() == pytest.approx(0.8, rel=1e-6)


def test_what_comes_twice_counts_once() -> None:
    p, q = with_gradients([torch.tensor([3.0]), torch.tensor([0.0])])
    q.grad = p.grad
    assert clip_grad_norm_([p, p, q], 1.5).item() == 3.0
    assert p.grad.item() == pytest.approx(1.5, rel=1e-6)


@pytest.mark.parametrize("max_norm", [0.0, -1.0, math.nan, "1", None])
def test_a_limit_that_is_not_above_zero_is_refused(max_norm: float) -> None:
    with pytest.raises(InputError) as error:
        clip_grad_norm_([], max_norm)
    assert error.value.key == "optim.max_norm"
    assert str(max_norm) in error.value.render("en")
    assert str(max_norm) in error.value.render("zh")


def test_sparse_and_complex_gradients_are_refused() -> None:
    embedding = nn.Embedding(5, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    for bad, key in (
        (embedding.weight, "optim.sparse"),
        (with_gradients([torch.ones(2, dtype=torch.complex64)])[0], "optim.complex"),
    ):
        with pytest.raises(InputError) as error:
            gradient_norms([bad])
        assert error.value.key == key
        assert "parameters[0]" in str(error.value)


def test_the_device_path_measures_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU would run (torch._foreach_norm in float64), run here; it was once wrong (pytorch#140066)."""
    grads = some_gradients()
    host = clipping._norm_of_each(grads)
    device = torch.stack(torch._foreach_norm(grads, 2, dtype=torch.float64))
    assert torch.allclose(host, device, rtol=1e-6, atol=0)
    assert device.tolist() == pytest.approx([exact_norm([grad]) for grad in grads], rel=1e-12)


def _rank(rank: int, store: str, results: str) -> None:
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    full = [torch.linspace(1, 2, 15).view(5, 3), torch.linspace(-1, 3, 8), torch.full((4, 2), 0.5)]
    intact = [tensor.clone() for tensor in full]  # a replicated DTensor shares its memory
    parameters = []
    for tensor, placement in zip(full, (Shard(0), Replicate(), Shard(1)), strict=True):
        p = nn.Parameter(distribute_tensor(torch.zeros_like(tensor), mesh, [placement]))
        p.grad = distribute_tensor(tensor, mesh, [placement])
        parameters.append(p)
    each = gradient_norms(parameters).per_tensor
    total = clip_grad_norm_(parameters, 1.0)
    clipped = [p.grad.full_tensor() for p in parameters]
    torch.save((intact, each, total, clipped), f"{results}/{rank}.pt")
    distributed.barrier()  # taken down while another rank is in it, gloo now and then aborts
    distributed.destroy_process_group()


def test_sharded_gradients_give_the_norm_of_the_full_ones_on_every_rank(tmp_path: Path) -> None:
    run_ranks(_rank, str(tmp_path / "store"), str(tmp_path), count=2)
    for rank in range(2):
        full, each, total, clipped = torch.load(tmp_path / f"{rank}.pt")
        assert each.tolist() == pytest.approx([exact_norm([grad]) for grad in full], rel=1e-6)
        assert total.item() == pytest.approx(exact_norm(full), rel=1e-6)
        for before, after in zip(full, clipped, strict=True):
            assert torch.allclose(after, before / exact_norm(full), rtol=1e-5)
