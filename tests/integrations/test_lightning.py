"""Lightning's callback against a plain loop over the same batches: the same numbers, the same bits."""

import itertools
import warnings
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import clinometer
from clinometer.integrations.lightning import ClinometerCallback
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


class One(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Words()

    def training_step(self, batch, index):
        return self.net(**batch)["loss"]

    def validation_step(self, batch, index):
        self.log("val_loss", self.net(**batch)["loss"])

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-2)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Still(One):
    """Without dropout, whose numbers Lightning does not restore."""

    def __init__(self) -> None:
        super().__init__()
        self.net.drop.p = 0.0


class Two(L.LightningModule):
    """Two optimizers, by hand: the second steps on the same loss after the first has moved its half."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = Words()

    def training_step(self, batch, index):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.net(**batch)["loss"])
            self.clip_gradients(optimizer, gradient_clip_val=0.5)
            optimizer.step()

    def configure_optimizers(self):
        return [
            torch.optim.SGD(self.net.table.parameters(), 0.5),
            torch.optim.Adam(self.net.head.parameters()),
        ]


def fit(kind, callbacks, loader=None, ckpt_path=None, **settings):
    L.seed_everything(7, verbose=False)
    module = kind()
    given = {"max_steps": 6, "max_epochs": -1, "limit_val_batches": 0, "enable_checkpointing": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one = L.Trainer(
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=callbacks,
            **(given | settings),
        )
        one.fit(module, loader or batches(), DataLoader(words(8), 4), ckpt_path=ckpt_path, weights_only=False)
    return module, one


def batches():
    return DataLoader(words(), batch_size=4)


@pytest.fixture(autouse=True)
def _quiet(caplog):
    import logging

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


@pytest.mark.parametrize(
    ("accumulate", "clip", "precision"),
    [(1, None, "32-true"), (3, 0.5, "32-true"), (2, 1.0, "bf16-mixed")],
    ids=str,
)
def test_the_callback_records_what_a_plain_loop_records_and_changes_no_bit(
    tmp_path: Path, capsys, accumulate: int, clip: float | None, precision: str
) -> None:
    settings = {"accumulate_grad_batches": accumulate, "gradient_clip_val": clip, "precision": precision}
    bare, _ = fit(One, [], **settings)
    callback = ClinometerCallback(tmp_path / "watched")
    watched, _ = fit(One, [callback], **settings)

    L.seed_everything(7, verbose=False)
    model = One()
    [optimizer], [schedule] = model.configure_optimizers()
    watch = clinometer.watch(model, optimizer, tmp_path / "plain")
    drawn = itertools.cycle(batches())
    for _ in range(6):
        for _ in range(accumulate):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
                loss = model.net(**next(drawn))["loss"]
            (loss / accumulate).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        schedule["scheduler"].step()
        optimizer.zero_grad()
    watch.close()
    assert_same_bits(bits(bare), bits(watched))
    assert callback.watch is not None
    assert callback.watch.closed
    assert assert_same_numbers(tmp_path / "watched", tmp_path / "plain") == 6
    assert info(tmp_path / "watched")["config"]["accumulate_grad_batches"] == accumulate


def test_several_optimizers_by_hand_make_one_step_a_round(tmp_path: Path, capsys) -> None:
    bare, _ = fit(Two, [])
    watched, one = fit(Two, [ClinometerCallback(tmp_path / "watched")])
    assert one.global_step == 6  # Lightning counts each optimizer's step
    assert_same_bits(bits(bare), bits(watched))

    L.seed_everything(7, verbose=False)
    model = Two()
    optimizers = model.configure_optimizers()
    watch = clinometer.watch(model, optimizers, tmp_path / "plain")
    for batch in itertools.islice(batches(), 3):
        for optimizer in optimizers:
            optimizer.zero_grad()
            model.net(**batch)["loss"].backward()
            nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 0.5)
            optimizer.step()
    watch.close()
    assert_same_bits(bits(bare), bits(model))
    assert assert_same_numbers(tmp_path / "watched", tmp_path / "plain") == 3


def test_a_resumed_training_goes_on_in_its_run_file_which_is_then_that_of_an_uninterrupted_one(
    tmp_path: Path, capsys
) -> None:
    def saver(name):
        return L.callbacks.ModelCheckpoint(tmp_path / name, "{step}", every_n_train_steps=4, save_top_k=-1)

    settings = {"enable_checkpointing": True, "limit_val_batches": 1, "val_check_interval": 4}
    loader = DataLoader(words(16), batch_size=4)  # an epoch of four steps
    callback = ClinometerCallback(tmp_path / "whole")
    whole, _ = fit(Still, [callback, saver("a")], loader, max_steps=10, **settings)
    fit(Still, [ClinometerCallback(tmp_path / "cut"), saver("b")], loader, max_steps=6, **settings)
    again = [ClinometerCallback(tmp_path / "cut"), saver("b")]
    second, _ = fit(Still, again, loader, max_steps=10, ckpt_path=tmp_path / "b" / "step=4.ckpt", **settings)
    assert_same_bits(bits(whole), bits(second))
    assert assert_same_numbers(tmp_path / "whole", tmp_path / "cut") == 10
    told = events(tmp_path / "cut")
    assert [event for event in told if event[1] == "validation"] == [(4, "validation"), (8, "validation")]
    assert (4, "resumed") in told
    assert (8, "checkpoint") in told


def test_how_a_training_ended_stands_in_its_run_file(tmp_path: Path, capsys) -> None:
    class Fails(One):
        def training_step(self, batch, index):
            if index == 2:
                raise RuntimeError("a broken batch")
            return super().training_step(batch, index)

    with pytest.raises(RuntimeError, match="a broken batch"):
        fit(Fails, [ClinometerCallback(tmp_path / "failed")])
    assert (info(tmp_path / "failed")["state"], info(tmp_path / "failed")["last_step"]) == ("failed", 2)
    with pytest.raises(InputError):
        fit(One, [ClinometerCallback(tmp_path / "failed")])  # from the start again: the folder holds a run
