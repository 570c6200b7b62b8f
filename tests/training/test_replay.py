"""A replayed step is the run's own step: the same bits that a live recording of it has."""

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from clinometer import whole_files
from clinometer.messages import InputError
from clinometer.record.replays.replays import Replay, replay_places, replayed_steps
from clinometer.training.checkpoints import checkpoint
from clinometer.training.replay import by_token, replay
from clinometer.training.replay.replay import replay_step
from clinometer.training.replay.replayed_weight import explain_weight, replayed_weight
from clinometer.training.run import loop, prepare
from clinometer.training.run.loop import Outcome, train
from clinometer.training.run.run_folder import RunFolder
from clinometer.training.settings.config import OptimConfig
from tests.training.conftest import Silent, small_config

WATCHED = {
    "layers.1.attn.q_proj.weight": (3, 5),
    "ln_final.weight": (2,),
    "token_embeddings.weight": (101, 7),
}


def unheard(stage, done, total):
    pass


def trained(config, path, display=None):
    session = prepare.start(config, path, Silent())
    try:
        assert train(session, display or Silent()) is Outcome.DONE
    finally:
        session.close()
    return path


def everything(path):
    """The run's files with their bytes, replays left aside."""
    return {
        p.relative_to(path): p.read_bytes()
        for p in path.rglob("*")
        if p.is_file() and "replays" not in p.relative_to(path).parts
    }


class Live:
    """Records every step of a run while it is trained, from outside of the loop."""

    def __init__(self, monkeypatch):
        self.steps = []
        clip = loop.clip_grad_norm_
        session = None

        def clipping(parameters, max_norm):
            raw = {n: p.grad.clone() for n, p in session.model.named_parameters()}
            before = {n: p.detach().clone() for n, p in session.model.named_parameters()}
            self.steps.append({"grad": raw, "before": before, "state": self._state(session)})
            norm = clip(parameters, max_norm)
            self.steps[-1]["norm"] = float(norm)
            return norm

        def stepped(row):
            after = {n: p.detach().clone() for n, p in session.model.named_parameters()}
            self.steps[-1] |= {"after": after, "state_after": self._state(session), "lr": row["lr"]}

        def run(config, path):
            nonlocal session
            display = Silent()
            display.step = stepped
            session = prepare.start(config, path, Silent())
            assert train(session, display) is Outcome.DONE
            session.close()
            monkeypatch.setattr(loop, "clip_grad_norm_", clip)

        monkeypatch.setattr(loop, "clip_grad_norm_", clipping)
        self.run = run

    def _state(self, session):
        names = {p: n for n, p in session.model.named_parameters()}
        return {
            f"{names[p]}.{key}": value.clone()
            for o in session.optimizers
            for p, state in o.state.items()
            for key, value in state.items()
            if torch.is_tensor(value)
        }


def moments(state, name, index, when):
    keys = ("exp_avg", "exp_avg_sq", "momentum_buffer")
    return {f"{k}_{when}": float(state[f"{name}.{k}"][index]) for k in keys if f"{name}.{k}" in state}


@pytest.mark.parametrize(
    ("optim", "micro", "precision"),
    [
        (OptimConfig(lr=1e-2, max_norm=0.5), None, "float32"),
        (OptimConfig(lr=1e-2), 2, "bfloat16"),
        (OptimConfig(name="sgd", lr=0.1, momentum=0.9), 1, "float32"),
        (OptimConfig(name="sgd", lr=0.1, max_norm=float("inf")), None, "float32"),
        (OptimConfig(name="muon", lr=1e-2), 2, "float32"),
    ],
)
def test_replays_have_the_bits_that_were_seen_live(corpus, tmp_path, monkeypatch, optim, micro, precision):
    config = replace(small_config(corpus, micro_batch_size=micro, precision=precision), optim=optim)
    live = Live(monkeypatch)
    live.run(config, tmp_path / "run")
    files = everything(tmp_path / "run")
    saved = [checkpoint.step_of(p) for p in checkpoint.checkpoints(tmp_path / "run" / "checkpoints")]
    assert saved[-1] == 20
    for step in (1, saved[0] - 1, saved[0], saved[0] + 1, 20):
        path = replay_step(tmp_path / "run", step, unheard)
        seen, found = live.steps[step - 1], load_file(path / "tensors.safetensors")
        for kind in ("before", "after", "grad"):
            for name, tensor in seen[kind].items():
                assert torch.equal(found[f"{name}.{kind}"], tensor), (step, name, kind)
        for key, tensor in seen["state"].items():
            assert torch.equal(found[key], tensor), (step, key)
        info = Replay.open(tmp_path / "run", step).step_info
        assert info["exact"]
        assert info["from_step"] == max((s for s in saved if s < step), default=0)
        assert info["loss"] == info["recorded_loss"]
        assert info["lr"] == seen["lr"]
        assert info["loss_before"] == pytest.approx(
            info["loss"], rel=1e-2 if precision != "float32" else 1e-5
        )
        for name, index in WATCHED.items():
            assert replayed_weight(tmp_path / "run", step, name, index) == {
                "tensor": info["names"].index(name),
                "index": list(index),
                **{key: float(seen[key][name][index]) for key in ("before", "after", "grad")},
                **moments(seen["state"], name, index, "before"),
                **moments(seen["state_after"], name, index, "after"),
                "clip": min(1.0, optim.max_norm / (seen["norm"] + 1e-6)),
                "lr": seen["lr"],
                "weight_decay": 0.0 if name == "ln_final.weight" else 0.1,
            }
    assert everything(tmp_path / "run") == files


def test_the_explained_weight_is_the_live_one_and_its_tokens_add_up(corpus, tmp_path, monkeypatch):
    config = small_config(corpus, micro_batch_size=2)
    live = Live(monkeypatch)
    live.run(config, tmp_path / "run")
    path = replay_step(tmp_path / "run", 9, unheard)
    for name, index in WATCHED.items():
        explained = explain_weight(path, name, index)
        gradient = float(live.steps[8]["grad"][name][index])
        assert explained.anatomy.gradient == gradient
        assert explained.anatomy.before == float(live.steps[8]["before"][name][index])
        assert explained.anatomy.after == float(live.steps[8]["after"][name][index])
        assert explained.anatomy.faithful
        assert explained.attribution.complete
        told = Replay.at(path).weight(name, index)
        assert told["anatomy"]["gradient"] == gradient
        tokens = torch.tensor(told["tokens"], dtype=torch.float64)
        assert tokens.shape == (4, 16)
        assert float(tokens.sum()) == pytest.approx(gradient, rel=1e-4, abs=1e-9)
        assert name in told["anatomy_text"]["en"]
        assert "梯度" in told["attribution_text"]["zh"]
    changed = explained.anatomy.to_dict()
    assert changed["loss_after"] - changed["loss_before"] != 0


def test_micro_batches_attribute_what_the_whole_batch_does(corpus, tmp_path):
    terms = []
    for micro in (None, 1):
        run = trained(small_config(corpus, micro_batch_size=micro, steps=2), tmp_path / f"run{micro}")
        path = replay_step(run, 1, unheard)
        terms.append(explain_weight(path, "layers.0.ffn.w1.weight", (1, 2)).attribution.matrix)
        assert explain_weight(path, "layers.0.ffn.w1.weight", (1,)).attribution.complete
        assert explain_weight(path, "layers.0.ffn.w1.weight", ()).attribution.complete
    assert torch.allclose(terms[0], terms[1], rtol=1e-4, atol=1e-9)


def test_loss_and_embedding_gradient_by_token_are_those_of_the_whole_batch(corpus, tmp_path):
    run = trained(small_config(corpus, micro_batch_size=2, steps=3), tmp_path / "run")
    info = Replay.at(replay_step(run, 2, unheard)).step_info
    batch, tensors = info["batch"], load_file(run / "replays" / "step-00000002" / "tensors.safetensors")
    session = prepare.resume(run, None, Silent())
    session.close()
    session.model.load_state_dict({n: tensors[f"{n}.before"] for n in info["names"]})
    ids, targets = torch.tensor(batch["token_ids"]), torch.tensor(batch["targets"])
    loss = session.model.loss(ids, targets)
    loss.backward()
    assert torch.tensor(batch["loss"]).mean() == pytest.approx(float(loss.detach()), rel=1e-5)
    # A token that stands only once in the batch: its row's gradient is that position's.
    values, counts = ids.flatten().unique(return_counts=True)
    once = [int(v) for v, c in zip(values, counts, strict=True) if c == 1]
    assert once
    rows = session.model.token_embeddings.weight.grad.norm(dim=1)
    for token in once:
        b, s = (int(i) for i in (ids == token).nonzero()[0])
        assert batch["grad_norm"][b][s] == pytest.approx(float(rows[token]), rel=1e-4)
        assert batch["pieces"][b][s] == session.tokenizer.decode([token])


def test_a_large_vocabulary_is_attributed_though_training_never_holds_its_logits(
    corpus, tmp_path, monkeypatch
):
    from clinometer.lm import model

    monkeypatch.setattr(model, "CHUNKED_LOSS_VOCABULARY", 200)
    monkeypatch.setattr(by_token, "CHUNKED_LOSS_VOCABULARY", 200)
    run = trained(small_config(corpus, steps=3), tmp_path / "run")
    path = replay_step(run, 2, unheard)
    assert Replay.at(path).step_info["exact"]
    for name, index in (("lm_head.weight", (101, 3)), *WATCHED.items()):
        explained = explain_weight(path, name, index)
        assert explained.attribution.complete
        assert not explained.attribution.unseen
        assert explained.attribution.gradient == pytest.approx(explained.anatomy.gradient, rel=1e-3, abs=1e-8)


def test_a_run_that_was_resumed_with_more_steps_replays_from_before_and_after(corpus, tmp_path):
    path = trained(small_config(corpus, steps=10), tmp_path / "run")
    for steps in (14, 23):
        session = prepare.resume(path, small_config(corpus, steps=steps), Silent())
        assert train(session, Silent()) is Outcome.DONE
        session.close()
    for step in (4, 10, 11, 14, 15, 23):  # the learning rate of each stretch was another one
        assert Replay.at(replay_step(path, step, unheard)).step_info["exact"]


def test_a_live_run_is_replayed_without_its_lock_and_before_its_first_checkpoint(corpus, tmp_path):
    seen = []
    display = Silent()

    def look(row):
        if row["step"] in (4, 12):
            for step in (1, row["step"] - 1, row["step"]):
                seen.append(Replay.at(replay_step(tmp_path / "run", step, unheard)).step_info["exact"])

    display.step = look
    trained(small_config(corpus), tmp_path / "run", display)
    assert seen == [True] * 6
    trained(small_config(corpus), tmp_path / "quiet")
    assert rows_of(tmp_path / "run") == rows_of(tmp_path / "quiet")


def rows_of(path):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in RunFolder(path).metrics()]


def test_an_imported_run_replays_from_its_first_checkpoint(corpus, tmp_path):
    from clinometer.lm.llama_files import export_llama
    from clinometer.training.run.load_run import import_run, load_run

    first = load_run(trained(small_config(corpus, steps=2), tmp_path / "first"), "last")
    export_llama(
        first.model, first.model.config, tmp_path / "llama", end_of_text_id=None, also=first.tokenizer.save
    )
    import_run(tmp_path / "llama", tmp_path / "run", small_config(corpus))
    session = prepare.resume(tmp_path / "run", None, Silent())
    assert train(session, Silent()) is Outcome.DONE
    session.close()
    for step in (1, 3, 20):
        assert Replay.at(replay_step(tmp_path / "run", step, unheard)).step_info["exact"]
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000000")
    with pytest.raises(InputError) as error:
        replay_step(tmp_path / "run", 3, unheard)
    assert error.value.key == "explain.differs_start"


def test_a_checkpoint_that_vanishes_gives_way_to_the_one_before(config, tmp_path, monkeypatch):
    config = replace(config, training=replace(config.training, keep=5))
    run = trained(config, tmp_path / "run")
    for moment in ("read_state", "load_checkpoint"):
        newest = run / "checkpoints" / "step-00000015"
        kept = shutil.copytree(newest, tmp_path / f"kept-{moment}")
        before = getattr(checkpoint, moment)

        def vanish(path, *rest, before=before, newest=newest):
            if path == newest and newest.exists():
                shutil.rmtree(newest)
            return before(path, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, moment, vanish)
            info = Replay.at(replay_step(run, 17, unheard)).step_info
        assert info["exact"]
        assert info["from_step"] == 14
        shutil.copytree(kept, newest)


def test_a_damaged_checkpoint_is_an_error_and_not_passed_over(config, tmp_path):
    run = trained(config, tmp_path / "run")
    file = checkpoint.checkpoints(run / "checkpoints")[-2] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(InputError) as error:
        replay_step(run, 20, unheard)
    assert error.value.key == "checkpoint.torn"


@pytest.mark.parametrize("field", ["loss", "grad_norm", "lr"])
@pytest.mark.parametrize("at", [3, 5, 6, 20])
def test_one_changed_bit_in_the_record_is_found_and_said_with_its_step(corpus, tmp_path, field, at):
    run = trained(small_config(corpus, sample_tokens=0), tmp_path / "run")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if row["step"] == at and field in row:
            row[field] *= 1 + 2**-40 if field == "lr" else 1 + 2**-22
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    step = min(at, 5) if at < 20 else 20
    if field == "lr" and at == 6:  # what comes after a step cannot be seen in it
        assert Replay.at(replay_step(run, step, unheard)).step_info["exact"]
        return
    if field == "lr" and at < 20:
        for row in rows:  # a difference that float32 weights show
            if row["step"] == at and field in row:
                row[field] *= 1.5
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError) as error:
        replay_step(run, step, unheard)
    assert error.value.key == "explain.differs"
    assert error.value.values["step"] == at + (field == "lr" and at < 20)
    assert error.value.values["what"] == ("loss" if field == "lr" and at < 20 else field)
    assert replayed_steps(run) == []
    info = Replay.at(replay_step(run, step, unheard, inexact=True)).step_info
    assert not info["exact"]
    assert info["differs"]["step"] == error.value.values["step"]


def test_what_was_not_recorded_cannot_be_replayed(config, tmp_path):
    run = trained(config, tmp_path / "run")
    for step, key in ((0, "no_step"), (-3, "no_step"), (21, "no_step")):
        with pytest.raises(InputError) as error:
            replay_step(run, step, unheard)
        assert error.value.key == f"explain.{key}"
        assert "1 to 20" in str(error.value)
    text = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    without = [line for line in text if '"step": 18,' not in line]
    (run / "metrics.jsonl").write_text("".join(without))
    for step in (18, 19):
        with pytest.raises(InputError) as error:
            replay_step(run, step, unheard)
        assert error.value.key == "explain.not_recorded"
    (run / "metrics.jsonl").write_text("".join(text[:4]) + "no json\n" + "".join(text[4:]))
    with pytest.raises(InputError) as error:
        replay_step(run, 2, unheard)
    assert error.value.key == "explain.metrics"
    assert error.value.values["line"] == 5
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(InputError) as error:
        replay_step(run, 1, unheard)
    assert error.value.key == "explain.no_steps"


def test_a_text_that_changed_is_said_and_one_that_is_gone_is_not_needed(
    config, corpus, tmp_path, monkeypatch
):
    run = trained(config, tmp_path / "run")
    kept = corpus.read_text(encoding="utf-8")
    corpus.unlink()
    assert Replay.at(replay_step(run, 20, unheard)).step_info["exact"]  # its tokens are in the cache
    monkeypatch.setenv("CLINOMETER_CACHE", str(tmp_path / "empty"))
    with pytest.raises(InputError) as error:
        replay_step(run, 19, unheard)
    assert str(corpus) in str(error.value)
    corpus.write_text("more " + kept, encoding="utf-8")
    with pytest.raises(InputError) as error:
        replay_step(run, 20, unheard)
    assert error.value.key == "explain.text"
    with pytest.raises(InputError) as error:
        replay_step(run, 2, unheard)  # from the beginning, where no checkpoint says what the text was
    assert error.value.key == "explain.differs_start"


def test_a_skipped_step_is_replayed_as_skipped(corpus, tmp_path, monkeypatch):
    config = small_config(corpus)
    original = loop.forward_backward

    def spoilt(computation, before_clipping=None):
        if computation.step == 4:  # as an overflow that belongs to this batch would
            with torch.no_grad():
                kept = computation.model.ln_final.weight.clone()
                computation.model.ln_final.weight.fill_(float("inf"))
            told = original(computation, before_clipping)
            with torch.no_grad():
                computation.model.ln_final.weight.copy_(kept)
            return told
        return original(computation, before_clipping)

    monkeypatch.setattr(loop, "forward_backward", spoilt)
    monkeypatch.setattr(replay, "forward_backward", spoilt)
    run = trained(config, tmp_path / "run")
    rows = {row["step"]: row for row in RunFolder(run).metrics() if "taken" in row}
    assert not rows[5]["taken"]
    for step in (4, 5, 6, 20):
        found = Replay.at(replay_step(run, step, unheard))
        assert found.step_info["exact"]
        assert found.step_info["taken"] == (step != 5)
        if step == 5:
            told = load_file(found.path / "tensors.safetensors")
            for name in found.names:
                assert torch.equal(told[f"{name}.before"], told[f"{name}.after"])
            assert found.step_info["loss"] in ("NaN", "Infinity")


def test_only_the_newest_three_are_kept_and_leftovers_go(config, tmp_path):
    run = trained(config, tmp_path / "run")
    leftover = run / "replays" / ".step-00000009.1.tmp"
    leftover.mkdir(parents=True)
    os.utime(leftover, (0, 0))
    for step in (20, 3, 19, 18):
        replay_step(run, step, unheard)
    assert replayed_steps(run) == [3, 18, 19]
    assert sorted(p.name for p in (run / "replays").iterdir()) == [f"step-{s:08d}" for s in (3, 18, 19)]


def test_a_run_that_cannot_be_written_keeps_its_replays_in_the_cache(config, tmp_path):
    run = trained(config, tmp_path / "run")
    (run / "replays").write_text("a file where the folder would be, as a read-only disk would refuse it")
    path = replay_step(run, 20, unheard)
    assert path.parent == replay_places(run)[1]
    assert (tmp_path / "cache") in path.parents
    assert replayed_steps(run) == [20]
    assert Replay.open(run, 20).path == path
    explain_weight(path, "ln_final.weight", (0,))
    other = trained(config, tmp_path / "other")
    shutil.rmtree(run)
    other.rename(run)
    assert replayed_steps(run) == []  # another run in the same place


def test_a_read_only_run_folder_is_replayed(config, tmp_path):
    run = trained(config, tmp_path / "run")
    folders = [run, *(p for p in run.rglob("*") if p.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    try:
        if os.access(run, os.W_OK):
            pytest.skip("this user may write anywhere")
        assert (tmp_path / "cache") in replay_step(run, 20, unheard).parents
        assert replayed_weight(run, 20, "ln_final.weight", (0,))["lr"] > 0
    finally:
        for folder in folders:
            folder.chmod(0o755)


@pytest.mark.parametrize("at", ["replay", "write"])
def test_an_interrupted_replay_leaves_nothing(config, tmp_path, monkeypatch, at):

    run = trained(config, tmp_path / "run")

    def interrupt(*_):
        raise KeyboardInterrupt

    if at == "write":
        monkeypatch.setattr(whole_files, "sync_folder", interrupt)
    threads = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt):
        replay_step(run, 18, interrupt if at == "replay" else unheard)
    assert not (run / "replays").exists()
    assert torch.get_num_threads() == threads


def test_a_full_disk_is_said_and_leaves_nothing(config, tmp_path, monkeypatch):
    from clinometer.training.replay import replay_folder

    run = trained(config, tmp_path / "run")

    def full(path, tensors):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(replay_folder, "save_tensors", full)
    with pytest.raises(InputError) as error:
        replay_step(run, 18, unheard)
    assert error.value.key == "explain.not_written"
    assert "No space" in str(error.value)
    assert not (run / "replays").exists()
