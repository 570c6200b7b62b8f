"""NaN and infinity, planted in what is computed, in gradients, weights and moments, at any step."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from clinometer.messages import InputError
from clinometer.training.checkpoints import checkpoint
from clinometer.training.ranks.world import World
from clinometer.training.run import prepare
from clinometer.training.run.finite_checks import first_spoilt, not_finite
from clinometer.training.run.loop import Outcome, train
from clinometer.training.run.recording import open_record
from tests.training.conftest import Silent, small_config
from tests.training.ranks import OPTIMIZERS
from tests.training.test_loop import assert_same_run, final_bits, run_whole

STEPS = 12
WEIGHTS = ["token_embeddings.weight", "layers.0.attn.q_proj.weight", "layers.1.ln2.weight", "lm_head.weight"]
VALUES = [float("nan"), float("inf"), float("-inf")]
FRESH = {
    "suppress_health_check": [HealthCheck.function_scoped_fixture],
    "deadline": None,
    "phases": [Phase.reuse, Phase.generate],
}


def configured(corpus, optimizer, every):
    config = small_config(corpus, steps=STEPS, checkpoint_every=every, sample_tokens=0, eval_every=6, keep=20)
    return replace(config, optim=OPTIMIZERS[optimizer])


def standing(session):
    """Copies of all weights and moments."""
    tensors, _ = checkpoint.flatten(session.optimizers)
    held = {**session.model.state_dict(), **tensors}
    return {name: tensor.detach().clone() for name, tensor in held.items()}


def hook_at(session, step, where, name, value):
    """What the embeddings give ("batch"), or one weight's gradient, has `value` in it in that step only."""
    if where == "batch":
        original = session.model.loss

        def loss(token_ids, targets, **options):
            weight = session.model.token_embeddings.weight
            kept = weight.detach().clone()
            if session.step == step - 1 and torch.is_grad_enabled():
                with torch.no_grad():
                    weight[token_ids[0, 3], 1] = value
            result = original(token_ids, targets, **options)
            with torch.no_grad():
                weight.copy_(kept)
            return result

        session.model.loss = loss
        return

    def spoil(grad):
        grad = grad.clone()
        grad.view(-1)[3] = value if session.step == step - 1 else grad.view(-1)[3]
        return grad

    session.model.get_parameter(name).register_hook(spoil)


@settings(max_examples=6, **FRESH)
@given(
    where=st.sampled_from(["batch", "gradient"]),
    step=st.integers(1, STEPS),
    value=st.sampled_from(VALUES),
    name=st.sampled_from(WEIGHTS),
    optimizer=st.sampled_from(list(OPTIMIZERS)),
)
def test_a_step_whose_gradient_is_not_finite_moves_nothing_and_the_run_goes_on(
    corpus, tmp_path_factory, where, step, value, name, optimizer
):
    path = tmp_path_factory.mktemp("run") / "run"
    session = prepare.start(configured(corpus, optimizer, 5), path, Silent())
    hook_at(session, step, where, name, value)
    display, seen = Silent(), {0: standing(session)}

    def look(row):
        display.rows.append(row)
        seen[row["step"]] = standing(session)

    display.step = look
    assert train(session, display) is Outcome.DONE
    session.close()
    assert [row["step"] for row in display.rows if not row["taken"]] == [step]
    before, after = seen[step - 1], seen[step]
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert not not_finite(final_bits(path))
    kept = [json.loads(line)["step"] for line in (path / "skipped.jsonl").read_text().splitlines()]
    assert kept == [step]


@settings(max_examples=8, **FRESH)
@given(
    where=st.sampled_from(["weight", "moment"]),
    step=st.integers(1, STEPS),
    every=st.integers(1, 5),
    value=st.sampled_from(VALUES),
    name=st.sampled_from(WEIGHTS),
    optimizer=st.sampled_from(list(OPTIMIZERS)),
    place=st.integers(0, 15),
)
def test_what_is_spoilt_is_never_kept_is_named_and_the_last_good_checkpoint_goes_on(
    corpus, tmp_path_factory, where, step, every, value, name, optimizer, place
):
    folder = tmp_path_factory.mktemp("runs")
    config = configured(corpus, optimizer, every)
    whole = run_whole(config, folder / "whole")
    session = prepare.start(config, folder / "run", Silent())
    display = Silent()

    def plant(row):
        if row["step"] == step:
            weight = session.model.get_parameter(name)
            (state,) = (o.state[weight] for o in session.optimizers if weight in o.state)
            moments = [key for key in ("exp_avg", "exp_avg_sq", "momentum_buffer") if key in state]
            target = weight.data if where == "weight" else state[moments[place % len(moments)]]
            target.view(-1)[place] = value

    display.step = plant
    assert train(session, display) is Outcome.NOT_FINITE
    session.close()
    ((key, values),) = [(k, v) for k, v in display.notices if k.startswith("train.spoilt")]
    assert values["tensor"].startswith(name)
    # SGD's decay takes an infinite weight into the momentum.
    assert key.startswith(f"train.spoilt_{where}") or where == "weight"
    # Found at the next checkpoint, or earlier by a loss that was not finite.
    assert step <= values["step"] <= min(STEPS, step + every)
    saved = checkpoint.checkpoints(folder / "run" / "checkpoints")
    assert all(checkpoint.step_of(path) < step for path in saved)
    assert key.endswith("_from_start") == (not saved)
    if saved:
        assert values["path"] == saved[-1]
    session = prepare.resume(folder / "run", None, Silent())
    assert train(session, Silent()) is Outcome.DONE
    session.close()
    assert_same_run_without_samples(whole, folder / "run")


def assert_same_run_without_samples(a, b):
    for path in (a, b):
        (path / "samples").mkdir()
    assert_same_run(a, b)


def test_a_checkpoint_with_a_nan_in_it_is_not_resumed_from(config, tmp_path):
    path = run_whole(config, tmp_path / "run")
    session = prepare.resume(path, None, Silent())
    session.optimizers[0].state[session.model.lm_head.weight]["exp_avg_sq"][0, 0] = float("nan")
    last = checkpoint.checkpoints(path / "checkpoints")[-1]
    state = checkpoint.read_state(last)
    more = {k: v for k, v in state.items() if k not in ("format", "step", "files", "optimizers", "random")}
    checkpoint.save_checkpoint(path / "checkpoints", 20, session.model, session.optimizers, more)
    session.close()
    with pytest.raises(InputError) as error:
        prepare.resume(path, None, Silent())
    assert error.value.key == "checkpoint.not_finite"
    assert error.value.values["tensor"] == "lm_head.weight.exp_avg_sq"


@pytest.mark.parametrize("where", ["batch", "gradient"])
def test_the_operation_is_named_in_the_alert(config, tmp_path, where):
    session = prepare.start(config, tmp_path / "run", Silent())
    hook_at(session, 4, where, "layers.0.ffn.w1.weight", float("nan"))
    display = Silent()
    record = open_record(session, display)
    assert train(session, display, record) is Outcome.DONE
    record.close(Outcome.DONE)
    session.close()
    told = [values["text"] for key, values in display.notices if key == "train.alert"]
    assert any("not finite" in text or "NaN" in text for text in told), told
    if where == "batch":
        assert any("functional.py" in text or "token_embeddings" in text for text in told), told
    else:
        assert any("layers.0.ffn.w1.weight" in text for text in told), told


def test_large_finite_numbers_are_not_taken_for_infinities():
    large = torch.full((1000,), 3e38)
    half = torch.full((1000,), 60000.0, dtype=torch.float16)
    tensors = {"large": large, "half": half, "none": torch.zeros(0), "whole": torch.arange(3)}
    assert not_finite(tensors) == []
    for position, value in ((0, float("nan")), (999, float("inf")), (500, float("-inf"))):
        spoilt = large.clone()
        spoilt[position] = value
        assert not_finite({**tensors, "spoilt": spoilt}) == ["spoilt"]
    both = torch.tensor([float("inf"), float("-inf")])
    assert not_finite({"both": both}) == ["both"]


def test_a_moment_is_told_before_the_weight_it_spoils():
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(3)).sum().backward()
    optimizer.step()
    assert first_spoilt(layer.named_parameters(), [optimizer], World()) is None
    with torch.no_grad():
        layer.weight[0, 0] = float("nan")
        assert first_spoilt(layer.named_parameters(), [optimizer], World()).described == "weight"
        optimizer.state[layer.bias]["exp_avg_sq"][1] = float("inf")
        assert first_spoilt(layer.named_parameters(), [optimizer], World()).described == "bias.exp_avg_sq"
