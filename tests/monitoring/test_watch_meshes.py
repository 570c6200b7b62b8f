"""Four processes in two dimensions: replicas of shards (HSDP), shards of split layers (tensor parallel)."""

import json

import pytest
import torch
from torch import nn

from tests.forked_ranks import PATIENCE, run_ranks
from tests.monitoring.sharded import PINS, Net, facts_of, train
from tests.monitoring.test_watch_ranks import alone, nan_on_the_last_rank, same_numbers, sharded

pytestmark = pytest.mark.soak


def split_and_sharded(mesh):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = Net()
    parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    for part in (model.inner, model):
        fully_shard(part, mesh=mesh["dp"])
    return model


def _rank(rank, folder):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=4,
        timeout=PATIENCE,
    )
    copies = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards"))
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    here = {"rank": rank, "ranks": 4}
    facts = {
        "fsdp": facts_of(*train(sharded(), **here, steps=5, pins=PINS)),
        "hsdp": facts_of(*train(sharded(copies), **here, pins=PINS)),
        "hsdp nan": facts_of(*train(sharded(copies), **here, steps=5, spoil=nan_on_the_last_rank)),
        # The ranks of one split layer see the same part of the batch.
        "both": facts_of(*train(split_and_sharded(both), rank=rank // 2, ranks=2, pins=PINS)),
        "ddp": facts_of(
            *train(nn.parallel.DistributedDataParallel(Net(), find_unused_parameters=True), **here)
        ),
    }
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(facts, file)
    dist.barrier()  # taken down while another rank is in it, gloo now and then aborts
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("meshes")
    run_ranks(_rank, str(folder), count=4)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(4)]


@pytest.mark.parametrize("kind", ["fsdp", "hsdp", "both"])
def test_all_statistics_and_pins_are_those_of_one_process(ranks, kind):
    steps = 5 if kind == "fsdp" else 18
    expected = alone(steps=steps, pins=PINS)
    same_numbers(ranks[0][kind], expected)
    for (_, rows), (_, rows_there) in zip(ranks[0][kind]["pinned"], expected["pinned"], strict=True):
        for row, there in zip(rows, rows_there, strict=True):
            assert row.pop("index") == list(there.pop("index"))
            assert row == pytest.approx(there, rel=1e-4, abs=2e-8)
    for facts in ranks[1:]:
        assert facts[kind]["rows"] == []
        assert facts[kind]["alerts"] == ranks[0][kind]["alerts"]


def test_a_nan_of_the_last_rank_is_every_ranks_alert(ranks):
    for facts in ranks:
        assert facts["hsdp nan"]["alerts"] == ranks[0]["hsdp nan"]["alerts"]
        assert [alert["step"] for alert in facts["hsdp nan"]["alerts"] if alert["cause"] == "non-finite"] == [
            3
        ]


def test_ddp_tells_what_one_process_tells(ranks):
    expected = alone()
    for facts in (ranks[0]["ddp"], expected):
        for scalars in facts["scalars"]:
            del scalars["loss"]
    same_numbers(ranks[0]["ddp"], expected)
