"""Several ranks train the run that one process trains: the same batches, numbers, files, and way to stop."""

import json
import math
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clinometer.text import sampler
from clinometer.training.checkpoints import checkpoint, retention
from clinometer.training.checkpoints.checkpoint import checkpoints
from clinometer.training.ranks.rows import rows_of
from clinometer.training.run import prepare
from clinometer.training.run.load_run import load_run
from clinometer.training.run.loop import Outcome, train
from clinometer.training.run.run_folder import RunFolder
from tests.training.conftest import SENTENCES, stopped_after
from tests.training.ranks import OPTIMIZERS, configured, ranks_of, resumed, whole_run


@given(
    batch=st.integers(1, 17),
    size=st.integers(1, 6),
    world=st.sampled_from([1, 2, 3, 4, 8]),
    step=st.integers(0, 50),
    seed=st.integers(0, 5),
)
def test_the_global_batch_is_the_same_for_any_number_of_ranks_and_cut(batch, size, world, step, seed):
    tokens = np.arange(700)
    whole, _ = sampler.batch(tokens, context_length=4, batch_size=batch, seed=seed, step=step)
    seen, counts = [], set()
    for rank in range(min(world, batch)):
        mine, targets = sampler.batch(
            tokens, context_length=4, batch_size=batch, seed=seed, step=step, rank=rank, world_size=world
        )
        assert np.array_equal(targets, mine + 1)
        cut = sampler.parts(batch, size, rank, world)
        counts.add(len(cut))
        for part, counted in cut:
            assert 1 <= len(mine[part]) <= size
            seen += mine[part].tolist() if counted else []
    assert sorted(seen) == sorted(whole.tolist())
    if world <= batch:
        assert len(counts) == 1  # a collective waits for every rank


@given(rows=st.integers(0, 40), size=st.integers(1, 9))
def test_rows_are_split_as_torch_splits_them(rows, size):
    chunks = torch.arange(rows).chunk(size) if rows else ()
    for rank in range(size):
        first, last = rows_of(rows, rank, size)
        wanted = chunks[rank].tolist() if rank < len(chunks) else []
        assert list(range(first, last)) == wanted


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    yield from run_job(tmp_path_factory.mktemp("ranks"), 2)


def run_job(folder, size):
    """(folder, what each rank told); one process's runs are made first, with the same settings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLINOMETER_CACHE", str(folder / "cache"))
        text = "\n".join(SENTENCES[i % 4] + f" {i * i}" for i in range(400))
        (folder / "corpus.txt").write_text(text, encoding="utf-8")
        path = folder / "one" / "to-ranks"
        session = prepare.start(configured(folder, "adamw"), path, display := stopped_after(9))
        assert train(session, display, request=display.request) is Outcome.INTERRUPTED
        session.close()
        ranks = ranks_of(size, ["tests.training.ranks", str(folder)], folder)
        out = [rank.communicate(timeout=600) for rank in ranks]
        assert [rank.returncode for rank in ranks] == [0] * size, "\n".join(map(str, out))
        yield folder, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]


ONE: dict[str, list] = {}


def one(folder, name, **training):
    """The same run in one process: its numbers."""
    key = f"{folder}-{name}-{sorted(training.items())}"
    if key not in ONE:
        ONE[key] = whole_run(configured(folder, name, **training), folder / "one" / f"run-{len(ONE)}")
    return ONE[key]


def assert_close(found, wanted, tolerance=2e-4):
    """`tolerance`: relative; sums in another order, over twenty steps that amplify it."""
    assert len(found) == len(wanted)
    for step, (mine, theirs) in enumerate(zip(found, wanted, strict=True), 1):
        assert mine == pytest.approx(theirs, rel=tolerance), step


KINDS = ["fsdp-adamw", "ddp-adamw", "fsdp-sgd", "fsdp-muon"]


@pytest.mark.parametrize("name", KINDS)
def test_twenty_steps_are_those_of_one_process(job, name):
    folder, told = job
    wanted = one(folder, name.partition("-")[2])
    assert any(norm > 0.5 for _, norm, _ in wanted[:20])  # clipped
    assert told[0]["losses"][name] == told[1]["losses"][name]  # to the bit: every rank decides the same
    assert_close(told[0]["losses"][name], wanted, 5e-3 if "muon" in name else 2e-4)


def test_a_batch_that_does_not_divide_is_weighed_exactly(job):
    folder, told = job
    assert_close(told[0]["losses"]["odd"], one(folder, "adamw", batch_size=5))


def test_accumulated_parts_on_copies_are_the_batch(job):
    folder, told = job
    assert_close(told[0]["losses"]["ddp-parts"], one(folder, "adamw", batch_size=8))


def test_bfloat16_is_the_bfloat16_of_one_process(job):
    folder, told = job
    assert_close(told[0]["losses"]["bfloat16"], one(folder, "adamw", precision="bfloat16"), 2e-2)


def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_by_all(job):
    folder, told = job
    rows = told[0]["losses"]["spoilt"][:20]
    for rank in told:
        assert [row[2] for row in rank["losses"]["spoilt"][:20]] == [step != 4 for step in range(1, 21)]
    assert math.isnan(rows[3][0])
    assert all(math.isfinite(row[0]) for row in rows[4:])
    kept = (folder / "ranks" / "spoilt" / "skipped.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in kept] == [4]


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_ranks_asked_to_stop_stop_after_the_same_step_and_resume_to_the_bit(job, name):
    folder, told = job
    assert {rank[f"stopped-{name}"] for rank in told} == {9}
    whole = told[0]["losses"][f"fsdp-{name}"]
    steps, validations = whole[:20], whole[20:]
    again = told[0]["losses"][f"resumed-{name}"]
    assert again[:11] == steps[9:]
    assert again[11:] == validations[-3:]
    last = checkpoints(folder / "ranks" / f"fsdp-{name}" / "checkpoints")[-1]
    other = checkpoints(folder / "ranks" / f"stopped-{name}" / "checkpoints")[-1]
    files = sorted(p.name for p in last.glob("*.safetensors"))
    assert len(files) == 2 * len(told)
    for file in files:
        assert (last / file).read_bytes() == (other / file).read_bytes(), file


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_sharded_tensors_are_updated_like_whole_ones(job, name):
    for rank in job[1]:
        assert max(rank["updates"][name]) <= 4, rank["updates"][name]


def test_one_process_begins_and_two_go_on(job):
    folder, told = job
    wanted = one(folder, "adamw")
    assert_close(told[0]["losses"]["from-one"], wanted[9:20] + wanted[-3:])


def test_two_begin_and_one_process_goes_on(job, monkeypatch):
    folder, told = job
    monkeypatch.setenv("CLINOMETER_CACHE", str(folder / "cache"))
    assert {rank["stopped-to-one"] for rank in told} == {9}
    wanted = told[0]["losses"]["fsdp-muon"]
    assert_close(resumed(folder / "ranks" / "to-one"), wanted[9:20] + wanted[-3:], 5e-3)
    last = checkpoints(folder / "ranks" / "to-one" / "checkpoints")[-1]
    assert {p.name for p in last.iterdir()} == {"model.safetensors", "optimizer.safetensors", "state.json"}


def test_only_the_first_rank_writes_and_once_a_step(job):
    folder, _ = job
    rows = [row["step"] for row in RunFolder(folder / "ranks" / "fsdp-adamw").metrics() if "lr" in row]
    assert rows == list(range(1, 21))


def test_a_checkpoint_of_ranks_loads_whole_and_gives_its_bits_back(job):
    folder, _ = job
    run = folder / "ranks" / "fsdp-adamw"
    trained = load_run(run, "last")
    path = checkpoints(run / "checkpoints")[-1]
    state = checkpoint.read_state(path)
    assert state["format"] == checkpoint.IN_PARTS
    copied = [checkpoints(folder / "ranks" / "ddp-adamw" / "checkpoints")[-1]]
    assert checkpoint.read_state(copied[0])["format"] == checkpoint.FORMAT
    for name, weight in load_run(folder / "ranks" / "ddp-adamw", "last").model.state_dict().items():
        assert torch.allclose(trained.model.state_dict()[name], weight, atol=1e-3), name


@pytest.mark.parametrize("damage", ["cut", "changed", "taken away", "of another shape"])
def test_a_damaged_part_is_refused(job, tmp_path, damage):
    from clinometer.messages import InputError

    folder, _ = job
    shutil.copytree(folder / "ranks" / "fsdp-adamw", tmp_path / "run")
    path = checkpoints(tmp_path / "run" / "checkpoints")[-1]
    part = path / "model-00002-of-00002.safetensors"
    data = bytearray(part.read_bytes())
    if damage == "cut":
        part.write_bytes(data[:-5])
    elif damage == "changed":
        data[-1] ^= 1
        part.write_bytes(data)
    elif damage == "taken away":
        part.unlink()
    else:
        part.write_bytes((path / "model-00001-of-00002.safetensors").read_bytes()[:-8] + bytes(8))
    with pytest.raises(InputError) as error:
        load_run(tmp_path / "run", "last")
    assert error.value.key in ("checkpoint.torn", "checkpoint.missing")


def test_activation_checkpointing_changes_no_bit_in_one_process(job):
    folder, _ = job
    assert one(folder, "adamw", activation_checkpointing=True) == one(folder, "adamw")


def test_checkpoints_written_beside_the_training_are_those_written_at_once(job):
    folder, _ = job
    runs = []
    for beside in (False, True):
        path = Path(folder / "one" / f"beside-{beside}")
        config = configured(folder, "adamw", async_checkpoints=beside, keep=10, checkpoint_every=3)
        whole_run(replace(config), path)
        runs.append(checkpoints(path / "checkpoints"))
    assert [p.name for p in runs[0]] == [p.name for p in runs[1]]
    for at_once, beside in zip(*runs, strict=True):
        for name in ("model.safetensors", "optimizer.safetensors"):
            assert (at_once / name).read_bytes() == (beside / name).read_bytes(), at_once.name


def test_nothing_is_tidied_up_while_a_checkpoint_is_being_written(job, monkeypatch):
    folder, _ = job
    write, prune, under_way = checkpoint.write_checkpoint, retention.prune, []

    def slow(folder, snapshot):
        under_way.append(snapshot)
        time.sleep(0.05)
        try:
            return write(folder, snapshot)
        finally:
            under_way.pop()

    def seen(*arguments):
        assert not under_way
        prune(*arguments)

    monkeypatch.setattr(checkpoint, "write_checkpoint", slow)
    monkeypatch.setattr(retention, "prune", seen)
    path = Path(folder / "one" / "tidied")
    whole_run(replace(configured(folder, "adamw", async_checkpoints=True, keep=2, checkpoint_every=1)), path)
    assert len(checkpoints(path / "checkpoints")) >= 2
