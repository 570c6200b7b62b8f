"""Two processes on one model, sharded (FSDP2) or copied (DDP), say what one with the whole batch says."""

import json
import math

import pytest
import torch
from tests.forked_ranks import PATIENCE, run_ranks
from torch import nn

from clinometer.gradients.attribute.attribute import attribute
from clinometer.gradients.check.check_gradients import check_gradients
from clinometer.gradients.diagnose.diagnose import diagnose
from clinometer.gradients.step.explain_step import explain_step
from clinometer.messages import InputError
from clinometer.optim.clipping import clip_grad_norm_, gradient_norms

IDS = torch.randint(0, 7, (4, 6), generator=torch.Generator().manual_seed(3))


class Net(nn.Module):
    def __init__(self, fault=""):
        super().__init__()
        torch.manual_seed(0)
        self.fault = fault
        self.embed = nn.Embedding(7, 5)
        self.inner = nn.Linear(5, 3)  # three rows on two ranks
        self.norm = nn.LayerNorm(3)
        self.counted = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 1)  # one row: the second rank holds nothing of it
        self.rest = nn.Linear(3, 3)
        self.up, self.down = nn.Linear(3, 6), nn.Linear(6, 3)

    def forward(self, ids, rank=0):
        h = self.embed(ids)
        if self.fault == "cut":
            h = h.detach()  # planted
        h = self.norm(self.inner(h))
        if self.fault == "nan" and rank == 1:
            h = torch.log(h - 100)  # planted nan
        if self.fault == "chance" and torch.rand(()) < 0.5:
            h = h + getattr(self, "re" + "st")(h)  # so that no reader of the code finds it
        if self.fault == "one rank" and rank == 1:
            h = h + getattr(self, "re" + "st")(h)
        if self.fault == "log" and rank == 1:
            getattr(self, "re" + "st")(h).mean().item()  # planted log
        if self.fault == "masked":
            h = h * torch.tensor([1.0, 0.0, 1.0])  # planted mask
        if self.fault == "overwritten":
            h = torch.exp(h)  # needs its result
            h += 1
        if self.fault in ("log", "masked"):
            meet()
        if self.fault == "batch norm":
            h = self.counted(h.flatten(0, 1)).view(h.shape)
        return self.head(torch.tanh(h + self.down(torch.relu(self.up(h)))))


def meet():
    """A forward that each rank waits in for the other's, as in SyncBatchNorm."""
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(torch.ones(()))


def wrapped(kind, fault=""):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = Net(fault)
    mesh = init_device_mesh("cpu", (2,))
    if kind == "tensor parallel":
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        return parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    if kind == "fsdp":
        for part in (model.inner, model.head, model):
            fully_shard(part, mesh=mesh)
        return model
    return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)


def told(found):
    return {
        "healthy": found.healthy,
        "findings": [[f.cause, f.severity, f.variant, f.where and f.where.source] for f in found.findings],
        "status": {name: found[name].status for name in found},
        "text": found.render(),
    }


def stepped(model, closure, clip=torch.nn.utils.clip_grad_norm_):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        closure().backward()
        with explain_step(optimizer, model, loss=closure) as anatomy:
            total = clip(model.parameters(), 0.1)
            optimizer.step()
    facts = anatomy.to_dict()
    return {
        "total": float(total.full_tensor() if hasattr(total, "full_tensor") else total),
        "measures": {
            name: anatomy[name].measures.to_dict() for name in ("inner.weight", "head.bias", "up.weight")
        },
        "entry": anatomy["inner.weight"][2, 4].to_dict(),
        "losses": [facts["loss_before"], facts["loss_after"]],
        "text": " ".join(anatomy.render().split()),
        "faithful": all(anatomy[name].faithful for name in anatomy if anatomy[name].status == "stepped"),
    }


def refused(call):
    try:
        call()
    except InputError as error:
        return error.key
    return None


def noted(model, closure):
    forwards = []
    try:
        diagnose(model, lambda: forwards.append(1) or closure())
    except RuntimeError as error:
        return [len(forwards), *error.__notes__]


def hooks(model):
    return sum(
        len(value)
        for part in model.modules()
        for key, value in vars(part).items()
        if "hook" in key and hasattr(value, "__len__")
    )


def _rank(rank, folder):
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=PATIENCE
    )
    mine = IDS[2 * rank : 2 * rank + 2]
    facts = {}

    def run(kind, fault=""):
        model = wrapped(kind, fault)
        return model, lambda: model(mine, rank).square().mean()

    for kind in ("fsdp", "ddp"):
        model, closure = run(kind)
        before = hooks(model)
        # AdamW holds them all, so that only the two that rest are to be spoken of.
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for key, fault in (("healthy", ""), ("cut", "cut"), ("nan", "nan"), ("one rank", "one rank")):
            if kind == "fsdp" and fault == "one rank":
                continue  # FSDP itself cannot: its ranks gather together
            other, asked = run(kind, fault)
            facts[kind, key] = told(diagnose(other, asked))
        for key in ("log", "masked"):  # for which diagnose runs once more
            facts[kind, key] = told(diagnose(*run(kind, key)))
        facts[kind, "overwritten"] = noted(*run(kind, "overwritten"))
        facts[kind, "optimizer"] = told(diagnose(model, closure, optimizer=optimizer))
        closure().backward()
        facts[kind, "standing"] = told(diagnose(model))
        facts[kind, "norms"] = gradient_norms(model.parameters()).per_tensor.tolist()
        clip_grad_norm_(model.parameters(), 0.05)
        facts[kind, "clipped"] = float(gradient_norms(model.parameters()).total)
        # A gradient of which this rank's shard alone is zero.
        for name, parameter in model.named_parameters():
            if name.endswith("inner.weight"):
                grad = parameter.grad.to_local() if kind == "fsdp" else parameter.grad
                if rank == 1:
                    grad.zero_()
        if kind == "fsdp":
            facts[kind, "half zero"] = told(diagnose(model))
            with torch.no_grad():
                closure()  # a forward alone leaves the outermost module gathered
            assert diagnose(model, closure)["inner.weight"].status == "ok"
        facts[kind, "step"] = stepped(*run(kind))
        facts[kind, "hooks"] = [before, hooks(model)]
        optimizer.zero_grad()
        closure().backward()
        optimizer.step()
        facts[kind, "trains"] = float(closure())

    torch.manual_seed(rank)  # ranks that draw different numbers
    model, closure = run("ddp", "chance")
    facts["ddp", "chance"] = told(diagnose(model, closure))
    model, closure = run("ddp", "batch norm")
    if rank == 0:  # no collective: one rank may ask alone
        facts["ddp", "check"] = check_gradients(model, closure).healthy
        attribution = attribute(model, closure, "inner.weight", (1, 2))
        facts["ddp", "attribute"] = [attribution.gradient, attribution.total, attribution.complete]
    dist.barrier()
    # Every rank sees the whole batch, and holds a part of two layers.
    model = wrapped("tensor parallel", "cut")
    facts["tensor parallel", "cut"] = told(diagnose(model, lambda: model(IDS).square().mean()))
    model = wrapped("tensor parallel")
    # torch's own clipping does not take DTensors and plain tensors together
    facts["tensor parallel", "step"] = stepped(model, lambda: model(IDS).square().mean(), clip_grad_norm_)
    flat = torch.distributed.fsdp.FullyShardedDataParallel(Net(), device_id=torch.device("cpu"))
    facts["fsdp1", "refusals"] = [refused(lambda: diagnose(flat)), refused(lambda: diagnose(flat, lambda: 0))]
    model, closure = run("fsdp")
    facts["fsdp", "refusals"] = [
        refused(lambda: check_gradients(model, closure)),
        refused(lambda: attribute(model, closure, "inner.weight", (1, 2))),
    ]
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump({"/".join(key): value for key, value in facts.items()}, file)
    dist.barrier()  # taken down while another rank is in it, gloo now and then aborts
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(_rank, str(folder), count=2)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def alone(fault=""):
    model = Net(fault)
    return model, lambda: model(IDS).square().mean()


LOG = 'getattr(self, "re" + "st")(h).mean().item()  # planted log'
KINDS = pytest.mark.parametrize("kind", ["fsdp", "ddp"])


@KINDS
@pytest.mark.parametrize("key", ["healthy", "cut"])
def test_every_rank_says_what_one_process_says(ranks, kind, key):
    expected = told(diagnose(*alone("" if key == "healthy" else key)))
    for facts in ranks:
        found = facts[f"{kind}/{key}"]
        assert found["status"] == expected["status"]
        assert found["findings"] == expected["findings"]
    if key == "cut":
        assert ["cut", "fault", "detach", "h = h.detach()  # planted"] in expected["findings"]


@KINDS
def test_the_rank_is_named(ranks, kind):
    assert "Seen from rank 1 of 2" in ranks[1][f"{kind}/healthy"]["text"]


@KINDS
def test_a_nan_of_the_other_rank_is_blamed_on_no_line_here(ranks, kind):
    (here,), (there,) = ([f for f in r[f"{kind}/nan"]["findings"] if f[0] != "unused"] for r in ranks)
    assert here == ["unknown", "fault", "elsewhere", None]
    assert there == ["forward", "fault", "outside", "h = torch.log(h - 100)  # planted nan"]
    for facts in ranks:
        assert facts[f"{kind}/nan"]["status"]["embed.weight"] == "non-finite"


@KINDS
def test_a_log_on_one_rank_is_no_cut_and_its_second_forward_waits_for_nobody(ranks, kind):
    model = Net("log")
    expected = told(diagnose(model, lambda: model(IDS, rank=1).square().mean()))["findings"]
    assert ["not-reaching-loss", "fault", "", LOG] in expected
    assert ranks[1][f"{kind}/log"]["findings"] == expected
    assert ranks[0][f"{kind}/log"]["findings"] == told(diagnose(*alone("log")))["findings"]


@KINDS
def test_rows_that_a_mask_made_zero_are_explained_where_each_rank_has_them_whole(ranks, kind):
    expected = told(diagnose(*alone("masked")))
    assert ["masked", "explained", "", "h = h * torch.tensor([1.0, 0.0, 1.0])  # planted mask"] in expected[
        "findings"
    ]
    for facts in ranks:
        found = facts[f"{kind}/masked"]
        assert found["status"] == expected["status"]
        if kind == "ddp":
            assert found["findings"] == expected["findings"]


@KINDS
def test_the_line_that_needs_a_value_is_named_without_another_forward(ranks, kind):
    for facts in ranks:
        forwards, note = facts[f"{kind}/overwritten"]
        assert forwards == 1
        assert "h = torch.exp(h)  # needs its result" in note


def test_a_layer_that_one_rank_uses_is_not_unused(ranks):
    for facts in ranks:
        found = facts["ddp/one rank"]
        assert found["status"]["rest.weight"] == "ok"
        assert found["status"]["counted.weight"] == "none"
        assert found["healthy"]


def test_a_layer_used_by_chance_is_told_so_on_both(ranks):
    statuses = [facts["ddp/chance"]["status"] for facts in ranks]
    assert statuses[0] == statuses[1]
    for facts in ranks:
        assert facts["ddp/chance"]["healthy"]


@KINDS
def test_a_step_moves_every_parameter_though_a_rank_holds_nothing_of_some(ranks, kind):
    model, closure = alone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    expected = told(diagnose(model, closure, optimizer=optimizer))["findings"]
    if kind == "fsdp":  # single rows that decay are looked at in whole tensors only
        expected = [finding for finding in expected if finding[0] != "decay"]
    for facts in ranks:
        assert facts[f"{kind}/optimizer"]["findings"] == expected


@KINDS
def test_gradients_that_are_there_are_judged_whole(ranks, kind):
    model, closure = alone()
    closure().backward()
    expected = told(diagnose(model))
    norms = gradient_norms(model.parameters())
    for facts in ranks:
        assert facts[f"{kind}/standing"]["status"] == expected["status"]
        assert facts[f"{kind}/standing"]["findings"] == expected["findings"]
        assert facts[f"{kind}/norms"] == pytest.approx(norms.per_tensor.tolist(), rel=1e-5)
        assert facts[f"{kind}/clipped"] == pytest.approx(0.05, rel=1e-4)


def test_a_shard_that_is_zero_is_no_zero_gradient(ranks):
    for facts in ranks:
        assert facts["fsdp/half zero"]["status"]["inner.weight"] == "partly-zero"  # the last row


@KINDS
def test_the_anatomy_of_a_step_is_that_of_one_process(ranks, kind):
    expected = stepped(*alone())
    for facts in ranks:
        found = facts[f"{kind}/step"]
        assert found["faithful"]
        assert found["total"] == pytest.approx(expected["total"], rel=1e-5)
        for name, measures in expected["measures"].items():
            for key in ("numbers", "rms_update", "update_ratio", "predicted", "momentum_share"):
                assert found["measures"][name][key] == pytest.approx(measures[key], rel=1e-4), (name, key)
        assert math.isfinite(facts[f"{kind}/trains"])
    found = [facts[f"{kind}/step"] for facts in ranks]
    assert found[0]["entry"]["after"] == found[1]["entry"]["after"]
    if kind == "fsdp":
        assert found[0]["losses"] == found[1]["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    else:  # of each rank's own part, and said to be
        mean = [sum(pair) / 2 for pair in zip(*(f["losses"] for f in found), strict=True)]
        assert mean == pytest.approx(expected["losses"], rel=1e-4)
        assert all("this rank's part of the batch" in f["text"] for f in found)


def test_layers_in_parts_are_diagnosed_and_stepped_as_whole_ones(ranks):
    expected = stepped(*alone(), clip_grad_norm_)
    cut = told(diagnose(*alone("cut")))
    for facts in ranks:
        found = facts["tensor parallel/cut"]
        assert found["status"] == cut["status"]
        assert [f for f in found["findings"] if f[1] == "fault"] == [
            ["cut", "fault", "detach", "h = h.detach()  # planted"]
        ]
        found = facts["tensor parallel/step"]
        assert found["faithful"]
        assert found["total"] == pytest.approx(expected["total"], rel=1e-5)
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-4)
        for name, measures in expected["measures"].items():
            assert found["measures"][name]["predicted"] == pytest.approx(measures["predicted"], rel=1e-4)


def test_flattened_parameters_are_refused(ranks):
    for facts in ranks:
        assert facts["fsdp1/refusals"] == ["gradients.ranks.fsdp1"] * 2


@KINDS
def test_no_hook_is_left(ranks, kind):
    for facts in ranks:
        before, after = facts[f"{kind}/hooks"]
        assert before == after


def test_what_needs_whole_tensors_refuses_shards(ranks):
    for facts in ranks:
        assert facts["fsdp/refusals"] == ["check.sharded", "attribution.sharded"]


def test_one_rank_of_ddp_may_check_and_attribute_alone(ranks):
    """Without waiting for the others, and about its own part of the batch."""
    model = Net("batch norm")
    expected = attribute(model, lambda: model(IDS[:2]).square().mean(), "inner.weight", (1, 2))
    assert ranks[0]["ddp/check"]
    gradient, total, complete = ranks[0]["ddp/attribute"]
    assert gradient == pytest.approx(expected.gradient, rel=1e-5)
    assert total == pytest.approx(gradient, rel=1e-4)
    assert complete
