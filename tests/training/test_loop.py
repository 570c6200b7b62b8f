"""The loop: stopped and resumed is never stopped; a bad step is not taken; micro-batches are the batch."""

import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from clinometer.lm.functional import cross_entropy, transformer_lm
from clinometer.messages import InputError
from clinometer.training.checkpoints import checkpoint
from clinometer.training.run import computation, loop, prepare
from clinometer.training.run.loop import Outcome, train
from clinometer.training.run.run_folder import RunFolder
from clinometer.training.settings.config import OptimConfig, RunConfig, ScheduleConfig
from tests.training.conftest import Silent, small_config, stopped_after


def run_whole(config, path):
    session = prepare.start(config, path, Silent())
    try:
        assert train(session, Silent()) is Outcome.DONE
    finally:
        session.close()
    return path


def final_bits(path):
    last = checkpoint.checkpoints(path / "checkpoints")[-1]
    return {
        f"{file}:{name}": tensor
        for file in ("model.safetensors", "optimizer.safetensors")
        for name, tensor in load_file(last / file).items()
    }


def assert_same_run(a, b):
    first, second = final_bits(a), final_bits(b)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
    rows = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in RunFolder(p).metrics()] for p in (a, b)
    ]
    assert rows[0] == rows[1]
    samples = [{s.name: s.read_text() for s in (p / "samples").iterdir()} for p in (a, b)]
    assert samples[0] == samples[1]


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    stops=st.lists(st.integers(1, 19), min_size=1, max_size=3, unique=True).map(sorted),
    optim=st.sampled_from(
        [
            OptimConfig(lr=1e-2),
            OptimConfig(name="sgd", lr=0.1, momentum=0.9),
            OptimConfig(name="muon", lr=1e-2),
            OptimConfig(name="muon", lr=1e-2, embedding_lr=3e-2),
        ]
    ),
    micro=st.sampled_from([None, 2, 1]),
    precision=st.sampled_from(["float32", "bfloat16"]),
    schedule=st.sampled_from(["cosine", "wsd", "constant"]),
    number=st.sampled_from([signal.SIGINT, signal.SIGTERM]),
)
def test_a_run_that_was_stopped_and_resumed_is_one_that_never_was(
    corpus, tmp_path_factory, stops, optim, micro, precision, schedule, number
):
    config = small_config(corpus, micro_batch_size=micro, precision=precision)
    config = replace(config, optim=optim, schedule=ScheduleConfig(name=schedule))
    folder = tmp_path_factory.mktemp("runs")
    whole = run_whole(config, folder / "whole")

    path = folder / "stopped"
    session = prepare.start(config, path, Silent())
    for stop in stops:
        display = stopped_after(stop, number)
        outcome = train(session, display, request=display.request)
        assert outcome is (Outcome.INTERRUPTED if number == signal.SIGINT else Outcome.TERMINATED)
        assert session.step == stop
        session.close()
        session = prepare.resume(path, None, Silent())
        assert session.step == stop
    assert train(session, Silent()) is Outcome.DONE
    session.close()
    assert_same_run(whole, path)


def test_a_run_killed_between_checkpoints_resumes_from_the_last_one_to_the_same_bits(config, tmp_path):
    whole = run_whole(config, tmp_path / "whole")
    session = prepare.start(config, tmp_path / "killed", Silent())

    class Killed(BaseException):
        pass

    display = Silent()

    def die(row):
        if row["step"] == 12:
            raise Killed

    display.step = die
    with pytest.raises(Killed):
        train(session, display)
    session.close()  # the system would drop the lock with the process
    assert len(list(RunFolder(tmp_path / "killed").metrics())) > 12  # rows that no checkpoint knows of
    session = prepare.resume(tmp_path / "killed", None, Silent())
    assert 0 < session.step < 12
    assert train(session, Silent()) is Outcome.DONE
    session.close()
    assert_same_run(whole, tmp_path / "killed")


def test_a_run_stopped_before_its_first_checkpoint_resumes_from_the_beginning(config, tmp_path):
    whole = run_whole(config, tmp_path / "whole")
    prepare.start(config, tmp_path / "early", Silent()).close()
    session = prepare.resume(tmp_path / "early", None, Silent())
    assert session.step == 0
    assert train(session, Silent()) is Outcome.DONE
    session.close()
    assert_same_run(whole, tmp_path / "early")


@pytest.mark.parametrize("micro", [1, 2, 3, 6])
def test_micro_batches_add_up_to_the_whole_batchs_gradient(corpus, tmp_path, micro):
    gradients = []
    for size in (6, micro):
        config = small_config(corpus, batch_size=6, micro_batch_size=size)
        config = replace(config, optim=replace(config.optim, max_norm=float("inf")))
        session = prepare.start(config, tmp_path / f"run{len(gradients)}", Silent())
        session.model.double()
        loss, norm = loop.forward_backward(session)
        gradients.append((loss, norm, {n: p.grad for n, p in session.model.named_parameters()}))
        session.close()
    (loss_a, norm_a, a), (loss_b, norm_b, b) = gradients
    assert loss_a == pytest.approx(loss_b, rel=1e-6)  # summed in float32 for display
    assert norm_a == pytest.approx(norm_b, rel=1e-6)
    for name in a:
        assert float((a[name] - b[name]).abs().max()) <= 1e-14, name


def test_the_recorded_loss_and_norm_are_those_of_the_batch(config, tmp_path):
    session = prepare.start(config, tmp_path / "run", Silent())
    weights = {n: p.detach().clone().requires_grad_() for n, p in session.model.named_parameters()}
    token_ids, targets = loop.batch_of(session, 0)
    want = cross_entropy(transformer_lm(weights, token_ids, session.model.config), targets)
    want.backward()
    want = want.detach()
    norm = torch.cat([w.grad.flatten() for w in weights.values()]).norm()
    display = stopped_after(1)
    train(session, display, request=display.request)
    session.close()
    row = display.rows[0]
    assert row["loss"] == pytest.approx(float(want), rel=1e-6)
    assert row["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
    assert row["lr"] == pytest.approx(config.optim.lr / max(1, config.warmup_steps))


def spoil_at(session, steps, value=float("nan")):
    """Make the loss of these steps (0-based) not finite, by spoiling what the model computes."""
    original = session.model.loss

    def loss(*args, **options):
        result = original(*args, **options)
        return result * value if session.step in steps else result

    session.model.loss = loss


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_is_not_taken_and_leaves_the_optimizer_clean(config, tmp_path, value):
    session = prepare.start(config, tmp_path / "run", Silent())
    spoil_at(session, {3}, value)
    before, after = {}, {}
    display = Silent()

    def look(row):
        if row["step"] in (3, 4):
            (before if row["step"] == 3 else after).update(
                {n: p.detach().clone() for n, p in session.model.named_parameters()}
            )
            state = session.optimizers[0].state
            for n, p in session.model.named_parameters():
                for key, v in state[p].items():
                    (before if row["step"] == 3 else after)[f"{n}.{key}"] = v.clone()
        display.rows.append(row)

    display.step = look
    assert train(session, display) is Outcome.DONE
    session.close()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert [r["step"] for r in display.rows if not r["taken"]] == [4]
    assert all(torch.isfinite(t).all() for t in final_bits(tmp_path / "run").values())

    (kept,) = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert kept["step"] == 4
    token_ids, _ = loop.batch_of(session, 3)
    first = kept["windows"][0]
    assert np.array_equal(session.data.train[first : first + 16], token_ids[0].numpy())


def test_steps_that_stay_not_finite_stop_the_run_with_the_last_good_weights(config, tmp_path):
    config = replace(config, training=replace(config.training, max_skipped=4))
    session = prepare.start(config, tmp_path / "run", Silent())
    spoil_at(session, set(range(5, 20)))
    display = Silent()
    assert train(session, display) is Outcome.NOT_FINITE
    session.close()
    assert session.step == 9
    assert [key for key, _ in display.notices].count("train.skipped") == 4
    assert all(torch.isfinite(t).all() for t in final_bits(tmp_path / "run").values())


def test_validation_is_the_mean_over_a_fixed_set_and_moves_nothing(config, tmp_path):
    session = prepare.start(config, tmp_path / "run", Silent())
    state = torch.get_rng_state()
    first, second = loop.evaluate(session), loop.evaluate(session)
    assert first == second
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in session.model.parameters())

    tokens = torch.from_numpy(session.data.validation[: len(session.data.validation)].astype(np.int64))
    count = min(config.training.eval_batches * config.training.batch_size, (len(tokens) - 1) // 16)
    starts = [i * ((len(tokens) - 1) // 16) // count * 16 for i in range(count)]
    with torch.no_grad():
        losses = [
            float(session.model.loss(tokens[None, s : s + 16], tokens[None, s + 1 : s + 17])) for s in starts
        ]
    assert first == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    session.close()


def test_the_best_checkpoint_is_kept(config, tmp_path):
    path = run_whole(replace(config, training=replace(config.training, keep=1)), tmp_path / "run")
    session = prepare.resume(path, None, Silent())
    session.close()
    losses = {r["step"]: r["validation_loss"] for r in RunFolder(path).metrics() if "validation_loss" in r}
    assert session.best_step == min(losses, key=losses.__getitem__)
    assert session.best_loss == losses[session.best_step]
    steps = {checkpoint.step_of(p) for p in checkpoint.checkpoints(path / "checkpoints")}
    assert steps == {session.best_step, 20}


def test_a_checkpoint_that_fails_in_the_middle_is_reported_and_the_run_goes_on(config, tmp_path, monkeypatch):
    session = prepare.start(config, tmp_path / "run", Silent())
    real = checkpoint.save_checkpoint

    def sometimes(folder, step, *rest):
        if step == 7:
            raise InputError("checkpoint.not_written", path=folder, reason="No space left on device")
        return real(folder, step, *rest)

    monkeypatch.setattr(checkpoint, "save_checkpoint", sometimes)
    display = Silent()
    assert train(session, display) is Outcome.DONE
    session.close()
    assert "train.checkpoint_failed" in [key for key, _ in display.notices]


def test_the_last_checkpoint_must_not_fail_silently(config, tmp_path, monkeypatch):
    session = prepare.start(config, tmp_path / "run", Silent())

    def full(folder, *_rest):
        raise InputError("checkpoint.not_written", path=folder, reason="No space left on device")

    monkeypatch.setattr(checkpoint, "save_checkpoint", full)
    with pytest.raises(InputError):
        train(session, Silent())
    session.close()


def test_the_loss_falls(corpus, tmp_path):
    session = prepare.start(small_config(corpus, steps=60), tmp_path / "run", Silent())
    display = Silent()
    train(session, display)
    session.close()
    losses = [row["loss"] for row in display.rows]
    assert losses[0] == pytest.approx(np.log(257), abs=0.6)
    assert np.mean(losses[-5:]) < losses[0] - 2.0


# Resuming


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"optim": OptimConfig(lr=2e-2)}, "optim.lr"),
        ({"schedule": ScheduleConfig(name="wsd")}, "schedule.name"),
    ],
)
def test_resuming_with_another_configuration_says_which_field(config, tmp_path, change, field):
    path = run_whole(config, tmp_path / "run")
    with pytest.raises(InputError) as error:
        prepare.resume(path, replace(config, **change), Silent())
    assert error.value.key == "resume.config"
    assert field in str(error.value)


def test_more_steps_may_be_asked_for_on_resume_and_fewer_may_not(config, tmp_path):
    path = run_whole(config, tmp_path / "run")
    longer = replace(config, training=replace(config.training, steps=24))
    session = prepare.resume(path, longer, Silent())
    assert train(session, Silent()) is Outcome.DONE
    session.close()
    assert session.step == 24
    assert RunFolder(path).config.training.steps == 24
    shorter = replace(config, training=replace(config.training, steps=22))
    with pytest.raises(InputError) as error:
        prepare.resume(path, shorter, Silent())
    assert error.value.key == "resume.steps"


def test_resuming_on_a_changed_corpus_is_refused(config, tmp_path, corpus):
    path = run_whole(config, tmp_path / "run")
    corpus.write_text(corpus.read_text(encoding="utf-8") + "one more line", encoding="utf-8")
    with pytest.raises(InputError) as error:
        prepare.resume(path, None, Silent())
    assert error.value.key == "resume.data"


@pytest.mark.parametrize("damage", ["truncate", "foreign"])
def test_resuming_from_a_damaged_checkpoint_is_refused_and_the_one_before_still_works(
    config, tmp_path, damage
):
    path = run_whole(config, tmp_path / "run")
    last = checkpoint.checkpoints(path / "checkpoints")[-1]
    if damage == "truncate":
        os.truncate(last / "model.safetensors", 100)
    else:
        (last / "state.json").write_text('{"a": "foreign file"}')
    with pytest.raises(InputError) as error:
        prepare.resume(path, None, Silent())
    assert error.value.key == "checkpoint.torn"
    import shutil

    shutil.rmtree(last)  # what the message says
    whole = run_whole(config, tmp_path / "whole")
    session = prepare.resume(path, None, Silent())
    assert 0 < session.step < 20
    assert train(session, Silent()) is Outcome.DONE
    session.close()
    assert_same_run(whole, path)


def test_a_second_trainer_in_the_same_folder_is_refused(config, tmp_path):
    session = prepare.start(config, tmp_path / "run", Silent())
    with pytest.raises(InputError) as error:
        prepare.resume(tmp_path / "run", None, Silent())
    assert error.value.key == "run.in_use"
    session.close()
    prepare.resume(tmp_path / "run", None, Silent()).close()


def test_a_failed_start_leaves_nothing_behind(tmp_path, corpus):
    corpus.write_text("too short", encoding="utf-8")
    with pytest.raises(InputError):
        prepare.start(small_config(corpus), tmp_path / "run", Silent())
    assert not (tmp_path / "run").exists()


def test_learning_rates_start_above_zero_and_end_at_the_lowest():
    for name in ("cosine", "wsd"):
        config = RunConfig(schedule=ScheduleConfig(name=name, warmup_steps=10, min_lr=1e-5))
        rates = [computation.learning_rate(config, step) for step in range(1, config.training.steps + 1)]
        assert rates[0] == pytest.approx(config.optim.lr / 10)
        assert rates[9] == config.optim.lr
        assert rates[-1] == pytest.approx(1e-5)
        assert max(rates) == config.optim.lr


def test_the_embeddings_take_their_own_rate_at_every_step(config, tmp_path):
    config = replace(config, optim=OptimConfig(name="muon", lr=1e-2, embedding_lr=4e-2))
    session = prepare.start(config, tmp_path / "run", Silent())
    rates = {group["name"]: group for o in session.optimizers for group in o.param_groups}
    seen = []

    class Looking(Silent):
        def step(self, row):
            seen.append(
                (row["lr"], rates["embeddings"]["lr"], rates["matrices"]["lr"], rates["decayed"]["lr"])
            )

    assert train(session, Looking()) is Outcome.DONE
    session.close()
    assert len({lr for lr, *_ in seen}) > 10
    for lr, embeddings, *others in seen:
        assert embeddings == pytest.approx(4 * lr, rel=1e-12)
        assert others == [lr, lr]
