"""Each token's share of every tensor's gradient, held against a copy of the tensor for each position."""

import json

import pytest
import torch
from safetensors.torch import load_file

from clinometer.lm import functional
from clinometer.lm.model import TransformerLM
from clinometer.record.replays.replays import Replay
from clinometer.training.checkpoints import checkpoint
from clinometer.training.replay import by_token
from clinometer.training.replay.replay import replay_step
from clinometer.training.replay.replay_folder import find_replay
from clinometer.training.run import prepare
from clinometer.training.run.run_folder import RunFolder
from clinometer.training.settings.precision import choose
from tests.training.conftest import Silent, small_config
from tests.training.test_replay import trained, unheard


def brute_force(model, ids, targets, count, monkeypatch):
    """Every weight anew at every position: the gradient of that copy is what the position adds."""
    names = {id(p): name for name, p in model.named_parameters()}
    copies = {}

    def at_each(weight, lead):
        name = names[id(weight)]
        assert name not in copies
        copies[name] = weight.detach().expand(*lead, *weight.shape).clone().requires_grad_()
        return copies[name]

    def linear(x, weight):
        return torch.einsum("bsoi,bsi->bso", at_each(weight, x.shape[:-1]), x)

    def embedding(ids, weight):
        each = at_each(weight, ids.shape)
        return each.gather(-2, ids[..., None, None].expand(*ids.shape, 1, each.shape[-1])).squeeze(-2)

    def rms_norm(x, weight, eps=1e-5):
        return torch.nn.functional.rms_norm(x, weight.shape, None, eps) * at_each(weight, x.shape[:-1])

    with monkeypatch.context() as patch:
        for function in (linear, embedding, rms_norm):
            patch.setattr(functional, function.__name__, function)
        logits = linear(model.hidden(ids), model.lm_head.weight)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    (loss / count).backward()
    return {name: copy.grad for name, copy in copies.items()}


@pytest.mark.parametrize(("micro", "vocabulary"), [(None, 10**6), (2, 10**6), (4, 200)])
def test_a_tokens_share_of_every_tensor_is_that_of_a_copy_used_by_it_alone(
    corpus, tmp_path, monkeypatch, micro, vocabulary
):
    from clinometer.lm import model

    monkeypatch.setattr(model, "CHUNKED_LOSS_VOCABULARY", vocabulary)
    monkeypatch.setattr(by_token, "CHUNKED_LOSS_VOCABULARY", vocabulary)
    run = trained(small_config(corpus, micro_batch_size=micro, steps=3), tmp_path / "run")
    found = Replay.at(replay_step(run, 2, unheard))
    tensors, batch = load_file(found.path / "tensors.safetensors"), found.step_info["batch"]
    session = prepare.resume(run, None, Silent())
    session.close()
    session.model.load_state_dict({n: tensors[f"{n}.before"] for n in found.names})
    ids, targets = torch.tensor(batch["token_ids"]), torch.tensor(batch["targets"])
    each = brute_force(session.model, ids, targets, targets.numel(), monkeypatch)
    assert set(each) == set(found.names)
    for name, added in each.items():
        assert torch.allclose(added.sum((0, 1)), tensors[f"{name}.grad"], rtol=1e-3, atol=1e-7), name
    for place in ((0, 0), (1, 7), (3, 15)):
        told = found.token(*place)
        assert len(told) == len(each)
        assert [one["norm"] for one in told] == sorted((one["norm"] for one in told), reverse=True)
        for one in told:
            whole = float(tensors[f"{one['name']}.grad"].double().norm())
            wanted = float(each[one["name"]][place].norm())
            # The first query sees one key only: its gradient is zero, and what is found is rounding.
            assert one["norm"] == pytest.approx(wanted, rel=1e-4, abs=1e-6 * whole), one
            assert one["share"] == pytest.approx(one["norm"] / whole, rel=1e-9)
    shares = load_file(found.path / "tokens.safetensors")["shares"]
    embedding = shares[found.names.index("token_embeddings.weight")]
    assert torch.allclose(embedding, torch.tensor(batch["grad_norm"]), rtol=1e-5)


def test_a_tokens_share_that_is_not_finite_is_told_as_such(config):
    model = TransformerLM(config.model.transformer(300))
    with torch.no_grad():
        model.ln_final.weight[3] = float("nan")
    choices = choose(device="cpu", precision="float32", compile="off", total_flops=0.0)
    ids = torch.arange(32).reshape(2, 16)
    shares = by_token.by_token(model, choices, ids, ids, 1).shares
    assert torch.isinf(shares).all()


def test_a_replay_without_the_tokens_shares_is_made_again(config, tmp_path):
    run = trained(config, tmp_path / "run")
    path = replay_step(run, 20, unheard)
    row = next(r for r in RunFolder(run).metrics() if r["step"] == 20 and "lr" in r)
    assert find_replay(run, 20, row["loss"], row["grad_norm"]) is not None
    info = json.loads((path / "step.json").read_text())
    info.pop("sha256")
    info["files"].pop("tokens.safetensors")
    (path / "step.json").write_text(json.dumps(info | {"sha256": checkpoint.digest(info)}))
    (path / "tokens.safetensors").unlink()
    assert Replay.open(run, 20).token(0, 0) is None
    assert find_replay(run, 20, row["loss"], row["grad_norm"]) is None
