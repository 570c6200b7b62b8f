"""A checkpoint is there whole or not at all, and comes back as the same bits."""

import errno
import json
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clinometer.lm.model import TransformerLM
from clinometer.lm.transformer_config import TransformerConfig
from clinometer.messages import InputError
from clinometer.optim.make_optimizers import make_optimizers
from clinometer.training.checkpoints import checkpoint, retention
from clinometer.training.checkpoints.generator_state import random_state, restore_random_state

CONFIG = TransformerConfig(vocab_size=11, context_length=8, d_model=8, num_layers=1, num_heads=2, d_ff=12)


def trained(name="adamw", steps=3, seed=0, **options):
    model = TransformerLM(CONFIG, generator=torch.Generator().manual_seed(seed))
    optimizers = make_optimizers(model.named_parameters(), name=name, lr=1e-2, **options)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        ids = torch.randint(0, 11, (2, 8), generator=generator)
        model.loss(ids, ids).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return model, optimizers


def flat(model, optimizers):
    """All the bits that a run goes on from, with names."""
    tensors = dict(model.state_dict())
    for i, optimizer in enumerate(optimizers):
        for index, entry in optimizer.state_dict()["state"].items():
            for key, value in entry.items():
                tensors[f"{i}.{index}.{key}"] = torch.as_tensor(value)
    return tensors


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


def test_an_optimizer_made_without_names_is_saved_by_numbers(tmp_path):
    def two(seed):
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
        adam = torch.optim.Adam(model[0].parameters())
        return model, [adam, torch.optim.SGD(model[1].parameters(), lr=1.0, momentum=0.9)]

    model, optimizers = two(0)
    model(torch.ones(1, 2)).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    path = checkpoint.save_checkpoint(tmp_path, 1, model, optimizers, {})
    other, others = two(1)
    checkpoint.load_checkpoint(path, other, others)
    assert_same(flat(model, optimizers), flat(other, others))
    for optimizer, restored in zip(optimizers, others, strict=True):
        assert optimizer.state_dict()["param_groups"] == restored.state_dict()["param_groups"]
    one = [torch.optim.SGD(other.parameters(), lr=1.0)]
    with pytest.raises(InputError):
        checkpoint.load_checkpoint(path, other, one)


@pytest.mark.parametrize(
    ("name", "options"), [("adamw", {}), ("sgd", {}), ("sgd", {"momentum": 0.9}), ("muon", {})]
)
def test_everything_comes_back_to_the_bit_and_goes_on_the_same(tmp_path, name, options):
    model, optimizers = trained(name, **options)
    path = checkpoint.save_checkpoint(tmp_path, 3, model, optimizers, {"note": "梯度"})
    other, others = trained(name, steps=1, seed=9, **options)
    state = checkpoint.load_checkpoint(path, other, others)
    assert state["step"] == 3
    assert state["note"] == "梯度"
    assert_same(flat(model, optimizers), flat(other, others))
    for m, o in ((model, optimizers), (other, others)):
        ids = torch.arange(8).remainder(11)[None]
        m.loss(ids, ids).backward()
        for optimizer in o:
            optimizer.step()
    assert_same(flat(model, optimizers), flat(other, others))


def test_changed_group_options_come_back(tmp_path):
    model, optimizers = trained()
    optimizers[0].param_groups[0]["lr"] = 0.123
    path = checkpoint.save_checkpoint(tmp_path, 3, model, optimizers, {})
    other, others = trained()
    checkpoint.load_checkpoint(path, other, others)
    group = others[0].param_groups[0]
    assert group["lr"] == 0.123
    assert group["betas"] == optimizers[0].param_groups[0]["betas"]
    assert isinstance(group["betas"], tuple)


def test_random_numbers_go_on_where_they_were():
    torch.randn(7)
    state = json.loads(json.dumps(random_state()))
    want = torch.randn(5)
    torch.manual_seed(99)
    restore_random_state(state)
    assert torch.equal(torch.randn(5), want)


FILES = ("model.safetensors", "optimizer.safetensors", "state.json")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    model, optimizers = trained()
    return checkpoint.save_checkpoint(folder, 3, model, optimizers, {})


@given(name=st.sampled_from(FILES), share=st.floats(0, 0.999))
def test_every_truncation_is_found(saved, tmp_path_factory, name, share):
    path = copy_of(saved, tmp_path_factory)
    size = (path / name).stat().st_size
    os.truncate(path / name, int(size * share))
    with pytest.raises(InputError) as error:
        checkpoint.load_checkpoint(path, *trained())
    assert error.value.key == "checkpoint.torn"


@given(name=st.sampled_from(FILES), share=st.floats(0, 0.999), bit=st.integers(0, 7))
def test_every_flipped_bit_is_found(saved, tmp_path_factory, name, share, bit):
    path = copy_of(saved, tmp_path_factory)
    content = bytearray((path / name).read_bytes())
    content[int(len(content) * share)] ^= 1 << bit
    (path / name).write_bytes(content)
    before = flat(*trained())
    model, optimizers = trained()
    try:
        checkpoint.load_checkpoint(path, model, optimizers)
    except InputError as error:
        assert error.key in ("checkpoint.torn", "checkpoint.format")  # noqa: PT017
        assert_same(flat(model, optimizers), before)
    else:  # white space between two JSON values says the same
        assert name == "state.json"
        assert json.loads((path / name).read_text()) == json.loads((saved / name).read_text())


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(saved, tmp_path_factory, name):
    path = copy_of(saved, tmp_path_factory)
    (path / name).unlink()
    with pytest.raises(InputError) as error:
        checkpoint.load_checkpoint(path, *trained())
    assert error.value.key == "checkpoint.missing"
    assert name in str(error.value)


def test_another_models_checkpoint_is_refused(saved):
    config = TransformerConfig(vocab_size=12, context_length=8, d_model=8, num_layers=1, num_heads=2, d_ff=12)
    with pytest.raises(InputError) as error:
        checkpoint.load_checkpoint(saved, TransformerLM(config))
    assert error.value.key == "checkpoint.foreign"


def test_another_optimizers_checkpoint_is_refused(saved):
    with pytest.raises(InputError) as error:
        checkpoint.load_checkpoint(saved, *trained("muon"))
    assert error.value.key == "checkpoint.foreign"


@pytest.mark.parametrize("fails", ["save_file", "rename"])
def test_no_space_left_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, fails):
    model, optimizers = trained()
    good = checkpoint.save_checkpoint(tmp_path, 3, model, optimizers, {})

    def full(*_args, **_options):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if fails == "save_file":
            patch.setattr(checkpoint, "save_file", full)
        else:
            patch.setattr(type(tmp_path), "rename", full)
        with pytest.raises(InputError) as error:
            checkpoint.save_checkpoint(tmp_path, 4, model, optimizers, {})
    assert error.value.key == "checkpoint.not_written"
    assert "No space left" in str(error.value)
    assert checkpoint.checkpoints(tmp_path) == [good]
    assert [p.name for p in tmp_path.iterdir()] == [good.name]  # no leftovers
    checkpoint.load_checkpoint(good, *trained())


def test_an_unfinished_checkpoint_does_not_count(tmp_path):
    (tmp_path / ".step-00000009.123.tmp").mkdir()
    (tmp_path / "step-00000010").mkdir()  # no state.json: not one of ours, or damaged by hand
    (tmp_path / "step-x").mkdir()
    assert checkpoint.checkpoints(tmp_path) == []


def test_pruning_keeps_the_newest_and_the_best(tmp_path):
    model, optimizers = trained()
    for step in (1, 2, 3, 4, 5):
        checkpoint.save_checkpoint(tmp_path, step, model, optimizers, {})
    (tmp_path / ".step-00000009.123.tmp").mkdir()
    retention.prune(tmp_path, 2, best_step=2)
    kept = [f"step-0000000{s}" for s in (2, 4, 5)]
    assert sorted(p.name for p in tmp_path.iterdir()) == [".step-00000009.123.tmp", *kept]
    retention.sweep(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == kept


def test_no_pickle_is_written(saved):
    from safetensors import safe_open

    for name in ("model.safetensors", "optimizer.safetensors"):
        with safe_open(saved / name, "pt") as file:
            assert len(list(file.keys())) > 0
    assert sorted(p.name for p in saved.iterdir()) == sorted(FILES)


def test_others_may_read_a_checkpoint_if_they_may_read_our_files(saved):
    (saved / "ordinary").touch()
    modes = {(saved / name).stat().st_mode for name in (*FILES, "ordinary")}
    (saved / "ordinary").unlink()
    assert len(modes) == 1


def copy_of(saved, tmp_path_factory):
    import shutil

    path = tmp_path_factory.mktemp("copy") / saved.name
    shutil.copytree(saved, path)
    return path


def damages(size, stride):
    """Every prefix, and one flipped bit in every byte; of a large file each `stride`-th."""
    for at in sorted({*range(0, size, stride), size - 1}):
        yield "cut", at
        yield "flip", at


def damaged(path, content, how, at, bit):
    if how == "cut":
        path.write_bytes(content[:at])
    else:
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])


def count_found(path, name, stride):
    """How many damages of a checkpoint's file are found; asserts that all are."""
    content, count = (path / name).read_bytes(), 0
    whole = checkpoint.read_state(path)
    for how, at in damages(len(content), stride):
        damaged(path / name, content, how, at, at % 8)
        try:
            state = checkpoint.read_state(path)
            for file, written in state["files"].items():
                checkpoint.verify(path / file, written)
        except InputError:
            count += 1
        else:  # white space between two JSON values says the same
            assert name == "state.json"
            assert state == whole, (how, at)
    (path / name).write_bytes(content)
    return count


@pytest.mark.parametrize("name", FILES)
def test_a_prefix_and_a_flipped_bit_at_many_places_are_found(saved, tmp_path_factory, name):
    path = copy_of(saved, tmp_path_factory)
    places = len(list(damages((path / name).stat().st_size, 61)))
    assert count_found(path, name, 61) >= 0.95 * places


@pytest.mark.soak
@pytest.mark.parametrize("name", FILES)
def test_every_prefix_and_a_flipped_bit_in_every_byte_are_found(saved, tmp_path_factory, name):
    path = copy_of(saved, tmp_path_factory)
    print(name, (path / name).stat().st_size, "bytes:", count_found(path, name, 1), "damages found")
