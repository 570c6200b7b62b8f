"""The Trainer's callback against a plain loop over the same batches: the same numbers, the same bits."""

import contextlib
import importlib
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import Trainer, TrainingArguments

import clinometer
from clinometer.integrations.transformers import ClinometerCallback
from clinometer.messages import InputError
from tests.integrations.recorded import (
    Words,
    assert_same_bits,
    assert_same_numbers,
    bits,
    events,
    info,
    words,
)

RATE = 3e-2


def parts():
    torch.manual_seed(7)
    model = Words()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


def trainer(folder: Path, callbacks, model_parts=None, **settings) -> Trainer:
    model, optimizer, schedule = model_parts or parts()
    given = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "logging_strategy": "no",
    }
    args = TrainingArguments(
        str(folder),
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **(given | settings),
    )
    return Trainer(
        model,
        args,
        train_dataset=words(),
        eval_dataset=words(8),
        callbacks=callbacks,
        optimizers=(optimizer, schedule),
    )


def plain(folder: Path, batches, steps: int, accumulate: int, clip: float, bfloat16: bool):
    model, optimizer, schedule = parts()
    watch = clinometer.watch(model, optimizer, folder)
    batches = iter(batches)
    for _ in range(steps):
        for _ in range(accumulate):
            batch, drawing = next(batches)
            torch.set_rng_state(drawing)
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                loss = model(**batch)["loss"]
            (loss.float() / accumulate).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf)  # so the Trainer takes its norm
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    watch.close()
    return model


@pytest.mark.parametrize(
    ("accumulate", "clip", "bfloat16"), [(1, 0.0, False), (3, 0.5, False), (2, 1.0, True)], ids=str
)
def test_the_callback_records_what_a_plain_loop_records_and_changes_no_bit(
    tmp_path: Path, capsys, accumulate: int, clip: float, bfloat16: bool
) -> None:
    settings = {"gradient_accumulation_steps": accumulate, "max_grad_norm": clip, "bf16": bfloat16}
    bare = trainer(tmp_path / "out", None, **settings, eval_strategy="steps", eval_steps=2)
    batches = []

    def keep(module, _, kwargs):
        if module.training:
            batch = {name: tensor.clone() for name, tensor in kwargs.items()}
            batches.append((batch, torch.get_rng_state()))

    with bare.model.register_forward_pre_hook(keep, with_kwargs=True):
        bare.train()
    assert len(batches) == 6 * accumulate
    callback = ClinometerCallback(tmp_path / "watched")
    watched = trainer(tmp_path / "out", [callback], **settings, eval_strategy="steps", eval_steps=2)
    watched.train()
    alone = plain(tmp_path / "plain", batches, 6, accumulate, clip, bfloat16)
    assert_same_bits(bits(bare.model), bits(watched.model))
    assert_same_bits(bits(bare.model), bits(alone))
    assert callback.watch is not None
    assert callback.watch.closed
    assert assert_same_numbers(tmp_path / "watched", tmp_path / "plain") == 6
    assert events(tmp_path / "watched") == [(2, "validation"), (4, "validation"), (6, "validation")]
    assert info(tmp_path / "watched")["config"]["gradient_accumulation_steps"] == accumulate


def test_a_resumed_training_goes_on_in_its_run_file_which_is_then_that_of_an_uninterrupted_one(
    tmp_path: Path, capsys
) -> None:
    settings = {"save_strategy": "steps", "save_steps": 3, "max_grad_norm": 0.5}
    whole = trainer(tmp_path / "a", [ClinometerCallback(tmp_path / "whole")], **settings)
    whole.train()
    first = trainer(tmp_path / "b", [ClinometerCallback(tmp_path / "cut")], **settings, max_steps=5)
    first.train()  # two steps farther than its checkpoint
    second = trainer(tmp_path / "b", [ClinometerCallback(tmp_path / "cut")], **settings)
    second.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-3"))
    assert_same_bits(bits(whole.model), bits(second.model))
    assert assert_same_numbers(tmp_path / "whole", tmp_path / "cut") == 6
    assert events(tmp_path / "cut") == [(3, "checkpoint"), (3, "resumed"), (6, "checkpoint")]


def test_a_model_of_transformers_with_its_tokens_and_a_run_that_failed(tmp_path: Path, capsys) -> None:
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    callback = ClinometerCallback(tmp_path / "run", name="mine")
    settings = {"include_num_input_tokens_seen": "all", "gradient_accumulation_steps": 2, "max_steps": 3}
    one = trainer(tmp_path / "out", [callback], (model, optimizer, schedule), **settings)

    def fail(*_):
        if one.state.global_step == 2:
            raise RuntimeError("a broken batch")

    with model.register_forward_pre_hook(fail), pytest.raises(RuntimeError, match="a broken batch"):
        one.train()
    assert callback.watch is not None
    assert not callback.watch.closed  # the Trainer tells nobody that it failed
    with pytest.raises(InputError):
        one.train()  # from the start again: its folder holds a run
    assert callback.watch.closed
    found = info(tmp_path / "run")
    assert (found["name"], found["state"], found["last_step"]) == ("mine", "failed", 2)
    assert found["model"] == "LlamaForCausalLM"
    row = clinometer_row(tmp_path / "run", 2)
    assert row["tokens"] == 2 * 4 * 6


def clinometer_row(folder: Path, step: int) -> dict[str, float]:
    from clinometer.record.read.reader import RunFile

    with contextlib.closing(RunFile.open(folder)) as file:
        row = file.row(step)
    assert row is not None
    return row["scalars"]


@pytest.mark.parametrize("package", ["transformers", "lightning"])
def test_without_its_package_an_integration_says_what_to_install(package: str, monkeypatch) -> None:
    ours = f"clinometer.integrations.{package}"
    monkeypatch.delitem(sys.modules, ours, raising=False)
    for name in ("transformers.trainer_callback", "lightning.pytorch"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    for name in ("transformers", "lightning", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=f"^{package} is not installed") as raised:
        importlib.import_module(ours)
    assert f"pip install 'clinometer[{package}]'" in str(raised.value)
    assert isinstance(raised.value, InputError)


def test_deepspeed_is_refused_before_the_first_step(tmp_path: Path) -> None:
    args = SimpleNamespace(deepspeed={"zero_optimization": {"stage": 2}})
    with pytest.raises(InputError, match="DeepSpeed"):
        ClinometerCallback(tmp_path / "run").on_train_begin(args, None, None)
    assert not (tmp_path / "run").exists()
