"""Under DistributedDataParallel an unused layer is a fault of all ranks: each waits for its gradient."""

import json

import pytest
import torch
from tests.forked_ranks import PATIENCE, run_ranks
from torch import nn

from clinometer.gradients.diagnose.diagnose import diagnose

KINDS = ("unused", "branch", "looked for", "frozen", "used", "inside")


class Net(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.first, self.spare = kind, nn.Linear(4, 4), nn.Linear(4, 4)
        if kind == "frozen":
            self.spare.requires_grad_(False)

    def forward(self, inputs):
        return self.first(inputs)


class Branch(Net):
    def forward(self, inputs):
        return self.first(self.spare(inputs) if self.kind == "used" else inputs)


def rank(number, folder):
    import torch.distributed as dist

    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=number, world_size=2, timeout=PATIENCE)
    told = {}
    for kind in KINDS:
        net = (Branch if kind in ("branch", "used") else Net)(kind)
        wrapped = nn.parallel.DistributedDataParallel(net, find_unused_parameters=kind == "looked for")
        called = net if kind == "inside" else wrapped
        found = diagnose(
            wrapped, lambda called=called: called(torch.ones(3, 4) * (number + 1)).square().mean()
        )
        told[kind] = [
            [f.cause, f.severity, f.variant, list(f.names), f.say("what", "en"), f.say("remedy", "en")]
            for f in found.findings
        ]
    with open(f"{folder}/{number}.json", "w", encoding="utf-8") as file:
        json.dump(told, file)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replicas")
    run_ranks(rank, str(folder), count=2)
    return [json.loads((folder / f"{number}.json").read_text(encoding="utf-8")) for number in range(2)]


@pytest.mark.parametrize("kind", ["unused", "branch"])
def test_an_unused_layer_stops_every_rank_and_has_the_wrapper_s_remedy(told, kind):
    assert told[0][kind] == told[1][kind]
    ((cause, severity, variant, names, what, remedy),) = told[0][kind]
    assert (cause, severity, variant) == ("unused", "fault", "replicated")
    assert names == ["spare.weight", "spare.bias"]
    assert "waits for them on every rank" in what
    assert "find_unused_parameters=True" in remedy
    assert "remove the layer" in remedy


def test_a_wrapper_that_looks_for_unused_parameters_does_not_wait(told):
    ((cause, severity, variant, *_),) = told[0]["looked for"]
    assert (cause, severity, variant) == ("unused", "fault", "")


def test_a_model_that_is_called_without_its_wrapper_does_not_wait(told):
    assert [finding[2] for finding in told[0]["inside"]] == [""]


def test_a_frozen_layer_is_not_waited_for_and_a_used_one_is_healthy(told):
    assert [finding[0] for finding in told[0]["frozen"]] == ["frozen"]
    assert told[0]["used"] == []
