"""accelerate and Fabric: two lines in their loops record what they record in a plain one."""

import itertools
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from lightning.fabric import Fabric
from torch import nn
from torch.utils.data import DataLoader

import clinometer
from tests.integrations.recorded import Words, assert_same_bits, assert_same_numbers, bits, words


def parts() -> tuple[nn.Module, torch.optim.Optimizer, DataLoader]:
    torch.manual_seed(7)
    model = Words()
    return model, torch.optim.AdamW(model.parameters(), lr=3e-2), DataLoader(words(48), batch_size=4)


def with_accelerate(folder: Path | None, bfloat16: bool) -> nn.Module:
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(
        gradient_accumulation_steps=3, cpu=True, mixed_precision="bf16" if bfloat16 else "no"
    )
    model, optimizer, loader = accelerator.prepare(*parts())
    watch = None if folder is None else clinometer.watch(model, optimizer, folder)
    torch.manual_seed(8)
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch)["loss"])
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
    if watch is not None:
        watch.close()
    return accelerator.unwrap_model(model)


def with_fabric(folder: Path | None, bfloat16: bool) -> nn.Module:
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed" if bfloat16 else "32-true")
    model, optimizer, loader = parts()
    model, optimizer = fabric.setup(model, optimizer)
    watch = None if folder is None else clinometer.watch(model, optimizer, folder)
    torch.manual_seed(8)
    for number, batch in enumerate(fabric.setup_dataloaders(loader), 1):
        with fabric.no_backward_sync(model, enabled=number % 3 != 0):
            fabric.backward(model(**batch)["loss"] / 3)
        if number % 3 == 0:
            fabric.clip_gradients(model, optimizer, max_norm=0.5)
            optimizer.step()
            optimizer.zero_grad()
    if watch is not None:
        assert watch.names == ["table.weight", "head.weight", "head.bias"]
        watch.close()
    return model.module


def plain(folder: Path, bfloat16: bool) -> nn.Module:
    model, optimizer, loader = parts()
    watch = clinometer.watch(model, optimizer, folder)
    torch.manual_seed(8)
    batches = iter(loader)
    while group := list(itertools.islice(batches, 3)):
        for batch in group:
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                loss = model(**batch)["loss"]
            (loss.float() / 3).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    watch.close()
    return model


@pytest.mark.parametrize("bfloat16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("loop", [with_accelerate, with_fabric])
def test_the_recipe_records_what_a_plain_loop_records_and_changes_no_bit(
    tmp_path: Path, capsys, loop, bfloat16: bool
) -> None:
    bare, watched = loop(None, bfloat16), loop(tmp_path / "watched", bfloat16)
    alone = plain(tmp_path / "plain", bfloat16)
    assert_same_bits(bits(bare), bits(watched))
    assert_same_bits(bits(bare), bits(alone))
    assert assert_same_numbers(tmp_path / "watched", tmp_path / "plain") == 4
