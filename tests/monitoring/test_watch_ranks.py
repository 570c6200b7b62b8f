"""A watch on two processes, sharded or copied, tells what one process with the whole batch tells."""

import json
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from clinometer.distributed import rendezvous
from clinometer.messages import InputError
from clinometer.monitoring.measure.noise_scale import NoiseScale
from clinometer.monitoring.watch import watch
from clinometer.vocabulary import STATISTICS
from tests.forked_ranks import PATIENCE, run_ranks
from tests.monitoring.sharded import PINS, Net, facts_of, parts_of, train
from tests.monitoring.sink import Kept


def sharded(mesh=None, **options):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = Net()
    mesh = mesh or init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for part in (model.inner, model.head, model):
        fully_shard(part, mesh=mesh, **options)
    return model


def tensor_parallel(mesh):
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    return parallelize_module(Net(), mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def nan_on_the_last_rank(loss, step, rank):
    return loss * math.nan if step == 3 and rank == torch.distributed.get_world_size() - 1 else loss


class Reductions:
    """How many collectives the watch itself makes, by their operation."""

    def __enter__(self):
        self.seen = []
        self._original = torch.distributed.all_reduce
        torch.distributed.all_reduce = self._counted
        return self.seen

    def _counted(self, tensor, op=torch.distributed.ReduceOp.SUM, *args, **kwargs):
        self.seen.append(str(op))
        return self._original(tensor, op, *args, **kwargs)

    def __exit__(self, *_):
        torch.distributed.all_reduce = self._original


def heard(call):
    """The warnings of a call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(one.message) for one in caught if issubclass(one.category, RuntimeWarning)]


def refused(call):
    try:
        call()
    except InputError as error:
        return [error.key, str(error)]
    return None


def _rank(rank, folder):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=PATIENCE,
    )
    here = {"rank": rank, "ranks": 2}
    facts = {}
    mesh = init_device_mesh("cpu", (2,))

    # The numbers.
    with Reductions() as seen:
        facts["fsdp"] = facts_of(*train(sharded(), **here, clip=None, pins=PINS))
        facts["reductions"] = list(seen)
    facts["fsdp clipped"] = facts_of(*train(sharded(), **here, pins=PINS))
    facts["fsdp torch clip"] = facts_of(*train(sharded(), **here, clip=torch.nn.utils.clip_grad_norm_))
    facts["tp"] = facts_of(*train(tensor_parallel(mesh), pins=PINS))
    with Reductions() as seen:
        model = nn.parallel.DistributedDataParallel(Net(), find_unused_parameters=True)
        facts["ddp"] = facts_of(*train(model, **here, pins=PINS))
        facts["ddp reductions"] = list(seen)
    facts["offload"] = facts_of(
        *train(sharded(offload_policy=CPUOffloadPolicy(pin_memory=False)), **here, steps=3, pins=PINS)
    )
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    facts["mixed"] = facts_of(*train(sharded(mp_policy=half), **here, steps=3))

    # The noise scale, and gradients that are reduced once for several micro-batches.
    facts["parts"] = facts_of(*train(sharded(), **here, steps=52, parts=2))
    added = []
    original = NoiseScale.add
    NoiseScale.add = lambda self, *args: added.append(args) or original(self, *args)
    model = sharded()
    facts["no sync"] = facts_of(
        *train(model, **here, steps=20, parts=2, no_sync=model.set_requires_gradient_sync)
    )
    facts["no sync noise"] = list(added)
    model = sharded(mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float64))
    facts["no sync, reduced in another precision"] = facts_of(
        *train(model, **here, steps=3, parts=2, no_sync=model.set_requires_gradient_sync)
    )
    model = nn.parallel.DistributedDataParallel(Net(), find_unused_parameters=True)

    def ddp_sync(last):
        model.require_backward_grad_sync = last

    added.clear()
    facts["ddp no sync"] = facts_of(*train(model, **here, steps=20, parts=2, no_sync=ddp_sync))
    facts["ddp no sync noise"] = list(added)
    NoiseScale.add = original

    # The alerts.
    facts["nan"] = facts_of(
        *train(sharded(), **here, steps=5, spoil=nan_on_the_last_rank, closure=True, clip=None)
    )
    facts["nan clipped"] = facts_of(*train(sharded(), **here, steps=5, spoil=nan_on_the_last_rank))
    torch_clip = torch.nn.utils.clip_grad_norm_
    facts["nan torch clip"] = facts_of(
        *train(sharded(), **here, steps=5, spoil=nan_on_the_last_rank, clip=torch_clip)
    )
    facts["accumulating"] = facts_of(*train(sharded(), **here, steps=14, zero=False, clip=None))
    facts["every"] = facts_of(*train(sharded(), **here, steps=5, every=2, clip=None))

    # What goes wrong makes nobody wait for ever.
    facts["skipped by one"] = heard(
        lambda: train(sharded(), **here, steps=4, clip=None, before_step=lambda s: s != 2 or rank == 0)
    )
    # Three seconds only where the other does not come: on a busy machine it comes late.
    patience, rendezvous.EXCHANGE_PATIENCE = rendezvous.EXCHANGE_PATIENCE, 3.0
    facts["never steps again"] = heard(
        lambda: train(sharded(), **here, steps=4, clip=None, before_step=lambda s: s < 3 or rank == 0)
    )
    rendezvous.EXCHANGE_PATIENCE = patience
    dist.barrier()
    facts["closed by one"] = heard(
        lambda: train(
            sharded(), **here, steps=5, loop=lambda one, step: one.close() if (rank, step) == (1, 2) else None
        )
    )
    facts["pins of one"] = heard(
        lambda: facts.update(p=train(sharded(), **here, pins=PINS[: rank * 2])[0].pinned)
    )
    model = sharded()
    optimizer = torch.optim.AdamW(model.parameters())
    rendezvous.EXCHANGE_PATIENCE = 3.0
    facts["alone"] = refused(lambda: rank or watch(model, optimizer, Kept()))
    rendezvous.EXCHANGE_PATIENCE = patience
    dist.barrier()
    facts["others"] = refused(lambda: watch(model, optimizer, Kept(), 1 + rank).close())
    facts["flattened"] = refused(
        lambda: watch(
            dist.fsdp.FullyShardedDataParallel(Net(), device_id=torch.device("cpu")), optimizer, Kept()
        )
    )
    # A flush by one rank alone, and numbers it logs, are its own affair.
    facts["flushed by one"] = facts_of(
        *train(sharded(), **here, steps=3, clip=None, loop=lambda one, step: rank or one.flush())
    )
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(facts, file, default=lambda value: None)
    dist.barrier()  # taken down while another rank is in it, gloo now and then aborts
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(_rank, str(folder), count=2)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def alone(**options):
    return facts_of(*train(Net(), **options))


def same_numbers(found, expected, rtol=2e-5):
    """All numbers of all steps; what cancels to almost nothing has the rounding of what cancelled."""
    assert [row[0] for row in found["rows"]] == [row[0] for row in expected["rows"]]
    a, b = (np.array([row[1] for row in facts["rows"]], float) for facts in (found, expected))
    order = [found["names"].index(name) for name in expected["names"]]
    a = a[:, order]
    assert np.array_equal(np.isnan(a), np.isnan(b))
    for column, name in enumerate(STATISTICS):
        atol = 1e-4 if name == "cosine" else 1e-6 * np.nanmax(b[..., column])
        assert np.allclose(a[..., column], b[..., column], rtol=rtol, atol=atol, equal_nan=True), name
    for mine, theirs in zip(found["scalars"], expected["scalars"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, nan_ok=True)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("fsdp", {"clip": None}),
        ("fsdp clipped", {}),
        ("fsdp torch clip", {}),
        ("tp", {}),
        ("offload", {"steps": 3}),
        ("parts", {"steps": 52, "parts": 2}),
        ("accumulating", {"steps": 14, "zero": False, "clip": None}),
        ("every", {"steps": 5, "every": 2, "clip": None}),
        ("no sync, reduced in another precision", {"steps": 3, "parts": 2}),
    ],
)
def test_all_statistics_are_those_of_one_process(ranks, kind, options):
    expected = alone(**options)
    found = ranks[0][kind]
    same_numbers(found, expected)
    assert found["numel"] == [expected["numel"][expected["names"].index(name)] for name in found["names"]]
    if kind != "fsdp torch clip":  # measured before clipping; one process counts what is left after it
        assert _nearly(found["counts"], expected["counts"])
    assert ranks[1][kind]["rows"] == []  # the first rank alone writes
    for facts in ranks:
        assert facts[kind]["alerts"] == expected["alerts"]


def _nearly(found, expected):
    """Histograms of sums in another order: an entry on a power of two's edge may fall on its other side."""
    a, b = (np.array([counts for _, counts in both]) for both in (found, expected))
    assert a.shape == b.shape
    assert np.array_equal(a.sum(-1), b.sum(-1))
    return np.abs(a - b).sum() <= 0.01 * b.sum()


def test_the_tensors_stand_in_the_order_of_use(ranks):
    expected = alone(steps=2)
    assert ranks[0]["fsdp"]["names"] == expected["names"]
    assert ranks[0]["fsdp"]["positions"] == expected["positions"]


def test_two_reductions_a_step_and_none_for_ddp(ranks):
    for facts in ranks:
        assert sorted(set(facts["reductions"])) == ["RedOpType.MAX", "RedOpType.SUM"]
        assert len(facts["reductions"]) == 2 * 18
        assert facts["ddp reductions"] == []


def test_under_ddp_the_first_ranks_numbers_are_those_of_one_process_but_for_its_loss(ranks):
    expected = alone()
    found = ranks[0]["ddp"]
    for facts in (found, expected):
        for scalars in facts["scalars"]:
            assert scalars.pop("loss") > 0
    same_numbers(found, expected)
    assert ranks[1]["ddp"]["rows"] == []


@pytest.mark.parametrize("kind", ["fsdp", "fsdp clipped", "tp", "ddp", "offload"])
def test_a_pinned_entry_is_told_whichever_rank_has_it(ranks, kind):
    clip = {"clip": None} if kind == "fsdp" else {}
    expected = alone(pins=PINS, steps=3 if kind == "offload" else 18, **clip)["pinned"]
    assert len(ranks[0][kind]["pinned"]) == len(expected)
    for (step, rows), (step_there, rows_there) in zip(ranks[0][kind]["pinned"], expected, strict=True):
        assert step == step_there
        for row, there in zip(rows, rows_there, strict=True):
            assert row.pop("index") == list(there.pop("index"))
            assert row == pytest.approx(there, rel=1e-4, abs=2e-8)


def test_mixed_precision_is_measured_as_it_is(ranks):
    """Gradients come in bfloat16's precision; they are those numbers that the optimizer takes."""
    expected = alone(steps=3)
    same = np.array(ranks[0]["mixed"]["rows"][0][1])[:, 0]
    there = np.array(expected["rows"][0][1])[:, 0]
    assert np.allclose(same, there, rtol=0.05, equal_nan=True)


def test_the_noise_scale_is_that_of_one_process(ranks):
    found, expected = (
        {
            number: scalars["noise_scale"]
            for number, scalars in enumerate(facts["scalars"])
            if "noise_scale" in scalars
        }
        for facts in (ranks[0]["parts"], alone(steps=52, parts=2))
    )
    assert found
    assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("kind", ["no sync", "ddp no sync"])
def test_micro_batches_that_are_reduced_together_count_each_rank_apart(ranks, kind):
    model = Net()
    train(model, steps=16, parts=2)
    squares = []
    for rank in range(2):
        model.zero_grad()
        (model(parts_of(17, 2, rank, 2)[0]).square().mean() / 2).backward()
        squares.append(
            sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None)
        )
    ((first, _, parts, count),) = ranks[0][f"{kind} noise"]
    assert (parts, count) == (2, 2)
    assert first == pytest.approx(sum(squares) / 2 if kind == "no sync" else squares[0], rel=1e-3)
    if kind == "no sync":
        expected = [scalars["loss"] for scalars in alone(steps=20, parts=2)["scalars"]]
        assert [scalars["loss"] for scalars in ranks[0][kind]["scalars"]] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", ["nan", "nan clipped", "nan torch clip"])
def test_a_nan_of_one_rank_raises_the_same_alert_on_all(ranks, kind):
    alerts = [facts[kind]["alerts"] for facts in ranks]
    assert alerts[0] == alerts[1]
    alert = next(one for one in alerts[0] if one["cause"] == "non-finite")
    assert alert["step"] == 3
    assert "inner.weight" in alert["tensors"]
    if kind == "nan":
        assert [event for event in ranks[0][kind]["events"] if event[1] == "report"] == [[2, "report"]]


def test_gradients_that_pile_up_are_seen(ranks):
    for facts in ranks:
        assert "accumulating" in {alert["cause"] for alert in facts["accumulating"]["alerts"]}


def test_a_rank_that_skips_a_step_ends_the_watching_with_the_reason_and_not_the_training(ranks):
    for facts in ranks:
        (said,) = facts["skipped by one"]
        assert "not at the same step: backwards is 2 on one and 3 on another" in said
    (said,) = ranks[0]["never steps again"]
    assert "did not come within 3 s" in said or "rank 1 no longer watches (done)" in said
    assert ranks[1]["never steps again"] == []


def test_a_watch_closed_on_one_rank_is_named(ranks):
    assert any("rank 1 no longer watches (done)" in said for said in ranks[0]["closed by one"])
    assert ranks[1]["closed by one"] == []


def test_pins_of_one_rank_alone_are_not_written_and_said_so(ranks):
    for facts in ranks:
        assert any("Pinned weights are not recorded" in said for said in facts["pins of one"])
    assert ranks[0]["p"] == []


def test_a_rank_that_does_not_watch_or_watches_something_else_is_named(ranks):
    key, said = ranks[0]["alone"]
    assert key == "watch.ranks.absent"
    assert "rank 1 did not call watch() within 3 s" in said
    for rank, facts in enumerate(ranks):
        key, said = facts["others"]
        assert key == "watch.ranks.differ"
        assert f"every is {2 - rank} on rank {1 - rank} and {1 + rank} here" in said


def test_flattened_parameters_are_refused(ranks):
    for facts in ranks:
        assert facts["flattened"][0] == "gradients.ranks.fsdp1"


def test_one_rank_may_flush_alone(ranks):
    assert [row[0] for row in ranks[0]["flushed by one"]["rows"]] == [1, 2, 3]
