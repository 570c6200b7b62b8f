"""Sums and maxima over ranks count each entry once, whatever the placements."""

import json
import math
import subprocess
import sys

import pytest
import torch
from torch import nn

from clinometer.distributed.reduce import ShardReduction
from clinometer.distributed.sharded_tensors import is_distributed, is_sharded, local, rank
from clinometer.optim.clipping import clip_grad_norm_, gradient_norms
from tests.forked_ranks import PATIENCE, run_ranks

FULL = {
    "rows": torch.linspace(-1, 2, 15).view(5, 3),  # three and two rows
    "columns": torch.linspace(-3, 1, 8).view(2, 4),
    "one": torch.linspace(1, 2, 3).view(1, 3),  # nothing on the second rank
    "copies": torch.linspace(-1, 3, 8),
    "partial": torch.linspace(0, 1, 6),
    "plain": torch.tensor([3.0, -4.0]),
}


def test_one_process_holds_everything_and_adds_up_with_nobody():
    together = ShardReduction([torch.ones(3), None])
    values = torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert together.alone
    assert not is_distributed()
    assert rank() == 0
    assert together.sums(values).tolist() == [1.0, 2.0]
    assert together.maxima(values).tolist() == [1.0, 2.0]
    assert local(values) is values


def test_asking_makes_nobody_import_distributed_tensors():
    code = (
        "import sys, torch; before = set(sys.modules); import clinometer.distributed.reduce as r;"
        "import clinometer.distributed.sharded_tensors as s;"
        "from clinometer.optim.clipping import clip_grad_norm_;"
        "p = torch.nn.Parameter(torch.ones(2)); p.grad = torch.ones(2); clip_grad_norm_([p], 1.0);"
        "r.ShardReduction([p]).sums(torch.ones(1)); s.is_distributed();"
        "new = [m for m in set(sys.modules) - before if m.startswith('torch.distributed')];"
        "assert not new, new"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def placed(mesh, rank_here):
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    def spread(name, placement):
        return distribute_tensor(FULL[name].clone(), mesh, [placement])

    share = FULL["partial"] * (0.25 if rank_here == 0 else 0.75)
    return {
        "rows": spread("rows", Shard(0)),
        "columns": spread("columns", Shard(1)),
        "one": spread("one", Shard(0)),
        "copies": spread("copies", Replicate()),
        "partial": DTensor.from_local(share, mesh, [Partial()], run_check=False),
        "plain": FULL["plain"].clone(),
    }


def _rank(number, folder):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=number,
        world_size=2,
        timeout=PATIENCE,
    )
    mesh = init_device_mesh("cpu", (2,))
    facts = {"rank": rank(), "distributed": is_distributed()}
    tensors = placed(mesh, number)
    reductions = []
    original = dist.all_reduce
    dist.all_reduce = lambda *args, **kwargs: reductions.append(1) or original(*args, **kwargs)
    parts = {name: local(tensor) for name, tensor in tensors.items()}
    together = ShardReduction([*tensors.values(), None])
    facts["ranks"] = together.ranks
    facts["counts"] = together.counts
    sums = [part.double().sum() for part in parts.values()] + [torch.tensor(float(number + 5))]
    facts["sums"] = together.sums(torch.stack(sums)).tolist()
    largest = [p.abs().max().double() if p.numel() else torch.tensor(-1.0).double() for p in parts.values()]
    odd = math.nan if number == 1 else 2.0
    facts["maxima"] = together.maxima(torch.stack([*largest, torch.tensor(odd)])).tolist()
    facts["reductions"] = len(reductions)

    def parameters(given):
        found = []
        for tensor in given.values():
            p = nn.Parameter(tensor.detach().clone(), requires_grad=True)
            p.grad = tensor
            found.append(p)
        return found

    held = parameters(tensors)
    facts["norms"] = gradient_norms(held).per_tensor.tolist()
    reductions.clear()
    total = clip_grad_norm_(held, 1.5)
    facts["reductions of clipping"] = len(reductions)
    facts["total"] = total.item()
    facts["plain total"] = type(total) is torch.Tensor
    clipped = {
        n: p.grad.full_tensor() if is_sharded(p.grad) else p.grad for n, p in zip(tensors, held, strict=True)
    }
    facts["clipped"] = {name: grad.tolist() for name, grad in clipped.items()}

    # This rank alone has a gradient of one; another has a NaN on the other's shard alone.
    held = parameters(placed(mesh, number))
    if number == 1:
        held[0].grad = None
    facts["absent here"] = clip_grad_norm_(held, 1.5).item()
    held = parameters(placed(mesh, number))
    before = [local(p.grad).clone() for p in held]
    if number == 1:
        local(held[0].grad)[0] = before[0][0] = math.nan
    facts["nan"] = clip_grad_norm_(held, 1.5).item()
    facts["unscaled"] = all(
        torch.equal(local(p.grad).nan_to_num(), old.nan_to_num()) for p, old in zip(held, before, strict=True)
    )
    with open(f"{folder}/{number}.json", "w") as file:
        json.dump(facts, file)
    dist.barrier()  # taken down while another rank is in it, gloo now and then aborts
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharding")
    run_ranks(_rank, str(folder), count=2)
    return [json.loads((folder / f"{number}.json").read_text()) for number in range(2)]


def test_each_entry_counts_once_in_a_sum(ranks):
    expected = [float(full.double().sum()) for full in FULL.values()] + [5.0]
    for facts in ranks:
        assert facts["sums"] == pytest.approx(expected, rel=1e-6)
        assert facts["sums"] == ranks[0]["sums"]
    assert ranks[0]["counts"] == [True] * 7
    assert ranks[1]["counts"] == [True, True, True, False, False, False, False]


def test_maxima_are_those_of_the_full_tensors_and_nan_is_infinity(ranks):
    expected = [float(full.abs().max()) for full in FULL.values()] + [math.inf]
    for facts in ranks:
        assert facts["maxima"] == pytest.approx(expected, rel=1e-6)
        assert facts["ranks"] == [0, 1]


def test_one_reduction_for_each_kind(ranks):
    for facts in ranks:
        assert facts["reductions"] == 2
        assert facts["reductions of clipping"] == 1


def test_the_norm_is_that_of_the_full_gradients_and_all_are_scaled_by_it(ranks):
    norms = [float(full.double().norm()) for full in FULL.values()]
    total = math.sqrt(sum(norm**2 for norm in norms))
    for facts in ranks:
        assert facts["plain total"]
        assert facts["norms"] == pytest.approx(norms, rel=1e-6)
        assert facts["total"] == pytest.approx(total, rel=1e-6)
        assert facts["total"] == ranks[0]["total"]
        for name, full in FULL.items():
            assert torch.allclose(torch.tensor(facts["clipped"][name]), full * (1.5 / total), rtol=1e-5), name


def test_a_gradient_that_one_rank_lacks_makes_nobody_wait(ranks):
    first = FULL["rows"][:3].double().square().sum().item()
    rest = sum(full.double().square().sum().item() for name, full in FULL.items() if name != "rows")
    for facts in ranks:
        assert facts["absent here"] == pytest.approx(math.sqrt(first + rest), rel=1e-6)


def test_a_nan_on_one_rank_leaves_all_gradients_as_they_are_on_every_rank(ranks):
    for facts in ranks:
        assert math.isnan(facts["nan"])
        assert facts["unscaled"]
